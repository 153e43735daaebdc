"""A progress bar per step of the demo, and the seconds that each step took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

Advance = Callable[[int], None]
"""Called with the number of steps that were done since the last call."""


class Bars(AbstractContextManager["Bars"]):
    """Progress bars on a terminal; nothing elsewhere.

    Parameters
    ----------
    console
        Where the bars are drawn.
    """

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, title: str, total: int = 1) -> Iterator[Advance]:
        """Show a bar, and note how long the context took."""
        task = self._progress.add_task(title, total=total)
        began = monotonic()
        yield lambda done: self._progress.advance(task, done)
        self.seconds[title] = monotonic() - began
        self._progress.update(task, completed=total)

    @contextmanager
    def loading(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """Show a bar per table that a server loads; the callback is the server's."""
        tasks: dict[str, TaskID] = {}

        def progress(label: str, done_rows: int, total_rows: int) -> None:
            if label not in tasks:
                description = f"{title}: {label}"
                tasks[label] = self._progress.add_task(description, total=total_rows)
            self._progress.update(tasks[label], completed=done_rows, total=total_rows)

        began = monotonic()
        yield progress
        self.seconds[title] = monotonic() - began
        for task in self._progress.tasks:  # a total may have been an estimate
            if task.id in tasks.values():
                self._progress.update(task.id, completed=task.total)
