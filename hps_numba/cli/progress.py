"""Progress bars of the command line, on standard error and only in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import TaskID as BarID

from hps_numba import types


class TableBars:
    """A bar per table, added when the table is first heard of.

    Callable as the ``progress`` of ``HPS.from_json``.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._ids: dict[str, BarID] = {}

    def __call__(self, label: str, done_rows: int, total_rows: int) -> None:
        """Show that a table has ``done_rows`` of ``total_rows``."""
        if label not in self._ids:
            self._ids[label] = self._bars.add_task(label, total=total_rows)
        self._bars.update(self._ids[label], completed=done_rows, total=total_rows)


@contextmanager
def table_progress() -> Iterator[TableBars]:
    """Show a bar per table while the context lasts."""
    with _bars() as bars:
        yield TableBars(bars)


@contextmanager
def row_progress(label: str, total_rows: int) -> Iterator[types.Progress]:
    """Show one bar while the context lasts, and yield the callback that moves it."""
    with _bars() as bars:
        bar = bars.add_task(label, total=total_rows)
        yield lambda done_rows: bars.advance(bar, done_rows)


def _bars() -> Progress:
    """Return bars that are erased at the end, and do nothing without a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
