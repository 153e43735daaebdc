"""The commands of ``hps-numba`` and what becomes of their errors.

Results go to standard output, everything else to standard error. The exit code is 0, 1
for an error of this package, and 2 for arguments that cannot be used.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from hps_numba._version import __version__
from hps_numba.errors import HPSError

_MIN_KEY, _MAX_KEY = -(1 << 63), (1 << 63) - 1

# Commands import what they use, so that `hps-numba --help` does not load Numba.


class _Commands(typer.core.TyperGroup):
    """Turns errors of this package into a line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HPSError as exc:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {exc}", err=True)
            raise typer.Exit(1) from exc


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it would show the values of variables
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON for a script instead of a table.")
]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The ps.json of the deployment.")
]


def main() -> None:
    """Run the command that the process was started with, and exit."""
    app(prog_name="hps-numba")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hps-numba {__version__}")
        raise typer.Exit


@app.callback()
def hps_numba(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Log details; show where an error came from."),
    ] = False,
) -> None:
    """Embedding inference parameter server: host memory over RocksDB."""
    del version  # its callback did the work
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # At DEBUG these write a line for everything they compile or plot.
    for library in ("numba", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A model directory of one table.")],
    dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Values per row; by default it follows from the sizes."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe the files of one table: rows, keys, duplicates, values."""
    from hps_numba.cli.output import print_json, print_summary
    from hps_numba.cli.progress import row_progress
    from hps_numba.tiers.model_files import open_model_directory, summarise

    files = open_model_directory(directory, dim)
    with row_progress("reading", files.n_rows) as progress:
        summary = summarise(files, progress=progress)
    if as_json:
        print_json(summary.to_json())
    else:
        print_summary(summary)


@app.command()
def deploy(
    config: ConfigArgument,
    force: Annotated[
        bool,
        typer.Option("--force", help="Load unchanged files, too. Undoes updates."),
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the bytes it takes; load nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Load model directories into the tiers, or resume what is stored."""
    if estimate:
        _print_estimate(config, as_json=as_json)
        return
    from hps_numba.cli.deploy import LoadWatch
    from hps_numba.cli.output import deployment_json, print_deployment, print_json
    from hps_numba.cli.progress import table_progress
    from hps_numba.runtime.hps import HPS

    with table_progress() as bars:
        watch = LoadWatch(bars)
        with HPS.from_json(config, force_reload=force, progress=watch) as server:
            tables = watch.tables(server.stats())
    if as_json:
        print_json(deployment_json(tables))
    else:
        print_deployment(tables)


def _print_estimate(config: Path, *, as_json: bool) -> None:
    from hps_numba.cli.output import print_estimate, print_json
    from hps_numba.config import ParameterServerConfig
    from hps_numba.runtime.estimate import estimate

    expected = estimate(ParameterServerConfig.from_json(config))
    if as_json:
        print_json(asdict(expected))
    else:
        print_estimate(expected)


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a key
def lookup(
    config: ConfigArgument,
    model: Annotated[str, typer.Argument(help="A model of the configuration.")],
    table: Annotated[str, typer.Argument(help="Its table, by name or position.")],
    keys: Annotated[
        list[int],
        typer.Argument(
            metavar="KEY...", min=_MIN_KEY, max=_MAX_KEY, help="Keys to look up."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Print the rows of keys, and the tier that each came from.

    Deploys the configuration first, as any server does; what is stored is resumed.
    """
    from hps_numba.cli.lookup import look_up
    from hps_numba.cli.output import print_json, print_rows, rows_json
    from hps_numba.cli.progress import table_progress
    from hps_numba.runtime.hps import HPS

    with table_progress() as bars:
        server = HPS.from_json(config, progress=bars)
    with server:
        rows = look_up(server, model, table, keys)
    if as_json:
        print_json(rows_json(model, table, rows))
    else:
        print_rows(rows)


@app.command()
def produce(  # noqa: PLR0913 -- one parameter per option
    brokers: Annotated[
        str, typer.Argument(help="Kafka brokers, host:port[,host:port...].")
    ],
    source: Annotated[
        Path,
        typer.Argument(help="A model directory, or an .npz of keys and rows."),
    ],
    model: Annotated[str, typer.Option(help="The model.")],
    table: Annotated[str, typer.Option(help="Its table, by name.")],
    delete: Annotated[
        bool, typer.Option("--delete", help="Publish that the keys are gone.")
    ] = False,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Values per row, if sizes do not tell.")
    ] = None,
    partitions: Annotated[
        int, typer.Option(min=1, help="Groups that keys are spread over.")
    ] = 8,
    message_bytes: Annotated[
        int, typer.Option(min=1024, help="Most bytes of a message.")
    ] = 1 << 20,
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of librdkafka; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish rows, or deletions, to the servers that follow a table's topic."""
    from hps_numba.cli import produce as work
    from hps_numba.cli.output import print_json, print_published
    from hps_numba.cli.progress import row_progress

    try:
        settings = work.parse_settings(setting or [])
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--setting") from exc
    given = work.read_source(source, delete=delete, dim=dim)
    with (
        work.open_producer(
            brokers,
            partitions=partitions,
            message_bytes=message_bytes,
            settings=settings,
        ) as producer,
        row_progress(f"{model}/{table}", len(given.keys)) as progress,
    ):
        try:
            done = work.publish(producer, model, table, given, progress=progress)
        except ValueError as exc:  # no name of a topic, or rows beyond a message
            raise typer.BadParameter(str(exc)) from exc
    if as_json:
        print_json(asdict(done))
    else:
        print_published(done)


@app.command()
def demo(  # noqa: PLR0913 -- one parameter per option
    output: Annotated[
        Path, typer.Option(help="Directory for models, database, plot and report.")
    ] = Path("demo-output"),
    requests: Annotated[
        int | None, typer.Option(min=1, help="Number of requests; all by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per request.")] = 1024,
    trace: Annotated[
        Path | None,
        typer.Option(help="File of int64 keys (raw or .npy) to replay instead."),
    ] = None,
    update_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows that are updated.")
    ] = 0.05,
    host_share: Annotated[
        float, typer.Option(help="Host memory, as a share of the tables' bytes.")
    ] = 0.35,
    seed: Annotated[
        int, typer.Option(help="Decides which rows are updated, and when.")
    ] = 20130101,
    gpu: Annotated[
        bool, typer.Option("--gpu/--no-gpu", help="Use the GPU cache if there is one.")
    ] = True,
) -> None:
    """Replay real requests while rows are updated, and check every returned row."""
    from hps_numba.demo import run
    from hps_numba.demo.options import DemoOptions

    options = DemoOptions(
        output=output,
        requests=requests,
        batch=batch,
        trace=trace,
        update_share=update_share,
        host_share=host_share,
        seed=seed,
        gpu=gpu,
    )
    raise typer.Exit(run(options))
