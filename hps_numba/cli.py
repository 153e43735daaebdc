"""The command line: ``hps-numba``.

Results go to standard output, everything else to standard error. The exit code is 0, 1
for an error of this package, and 2 for arguments that cannot be used.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from hps_numba._version import __version__
from hps_numba.errors import HPSError

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
    from hps_numba.cli_output import print_json, print_summary
    from hps_numba.cli_progress import row_progress
    from hps_numba.tiers.model_files import open_model_directory, summarise

    files = open_model_directory(directory, dim)
    with row_progress("reading", files.n_rows) as progress:
        summary = summarise(files, progress=progress)
    if as_json:
        print_json(summary.to_json())
    else:
        print_summary(summary)
