"""The demo from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from hps_numba.demo.bars import Bars
from hps_numba.demo.checker import Tally, VersionLedger
from hps_numba.demo.deployment import (
    PLOT_FILE,
    REPORT_FILE,
    output_directory,
    write_deployment,
)
from hps_numba.demo.options import DemoOptions
from hps_numba.demo.plots import write_plot
from hps_numba.demo.replay import ReplayResult, replay, sweep
from hps_numba.demo.report import Outcome, as_json, summary
from hps_numba.demo.updater import Updater, plan_updates
from hps_numba.demo.workload import build_workload
from hps_numba.runtime.gpu.devices import device_name
from hps_numba.runtime.hps import HPS


def run(options: DemoOptions) -> int:
    """Deploy, replay while rows are updated, check every row, and report.

    Writes model directories, ``ps.json``, the database, ``report.json`` and
    ``demo.png`` to the output directory, prints a table to standard output and draws
    progress bars on standard error if that is a terminal.

    Parameters
    ----------
    options
        What to run.

    Returns
    -------
    int
        0 if every row was right, else 1.

    Raises
    ------
    HPSError
        If the demo cannot run: its data set is not installed, the trace cannot be read,
        the output directory is not the demo's, or the server fails.
    """
    with output_directory(options.output) as output:
        with Bars(Console(stderr=True)) as bars:
            outcome = _Run(options, output, bars).measure()
            with bars.step("drawing the plot"):
                write_plot(outcome, output / PLOT_FILE)
        report = as_json(outcome)
        (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        _print(outcome, output)
    return 1 if outcome.total.wrong_rows else 0


class _Run:
    """One run in an output directory of its own."""

    def __init__(self, options: DemoOptions, output: Path, bars: Bars) -> None:
        self._options = options
        self._bars = bars
        with bars.step("reading the samples"):
            self._workload = build_workload(options)
        with bars.step("writing model directories"):
            self._deployment = write_deployment(
                self._workload,
                output,
                host_share=options.host_share,
                gpu=device_name() if options.gpu else None,
            )
        self._ledgers = {t.name: VersionLedger(t) for t in self._workload.tables}

    def measure(self) -> Outcome:
        """Serve the replay, start again, and return what was measured and checked."""
        with self._server("loading") as server:
            result, updater = self._replay(server)
            stats = server.stats()
            after_replay = self._sweep(server, "after the replay")
        with self._server("starting again") as server:
            after_restart = self._sweep(server, "after a restart")
        checks = {
            "in the replay": result.tally,
            "right after their update": updater.tally,
            "after the replay": after_replay,
            "after a restart": after_restart,
        }
        return Outcome(
            workload=self._workload,
            replay=result,
            updates=updater.records,
            stats=stats,
            host_budget_bytes=self._deployment.host_bytes,
            gpu=self._deployment.gpu,
            checks=checks,
            phases_s=self._bars.seconds,
        )

    def _server(self, title: str) -> HPS:
        with self._bars.loading(title) as progress:
            return HPS.from_json(self._deployment.config, progress=progress)

    def _replay(self, server: HPS) -> tuple[ReplayResult, Updater]:
        options, workload = self._options, self._workload
        plan = plan_updates(workload, options.update_share, options.seed)
        updater = Updater(server, workload, ledgers=self._ledgers, plan=plan)
        with (
            self._bars.step("replaying requests", workload.n_requests) as advance,
            updater,
        ):
            result = replay(
                server,
                workload,
                ledgers=self._ledgers,
                updater=updater,
                advance=advance,
            )
        return result, updater

    def _sweep(self, server: HPS, occasion: str) -> Tally:
        n_ids = sum(len(table.ids) for table in self._workload.tables)
        with self._bars.step(f"checking every row {occasion}", n_ids) as advance:
            return sweep(server, self._workload, ledgers=self._ledgers, advance=advance)


def _print(outcome: Outcome, output: Path) -> None:
    console = Console()
    console.print(summary(outcome, output))
    for example in outcome.total.examples:
        console.print(f"wrong: {example}", style="red", markup=False)
