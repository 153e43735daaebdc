"""The double buffer: the next chunk is asked for while the last ones are fetched.

::

    caller   | local 0 | local 1 | local 2 |  (wait)  | local 3 | remote 3 |
    worker           | remote 0           |    | remote 2     |
    worker                     | remote 1            |

A chunk's buffers are its slices of the caller's output, so nothing is copied between
stages. At most two chunks are in the remote stage in workers; the caller takes the last
chunk's remote stage itself, so a lookup of one chunk changes threads nowhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from time import perf_counter

from hps_numba.runtime.hierarchy import Chunk, Hierarchy

BUFFERS = 2

Observer = Callable[[str, int, float, float], None]
"""Called with a stage (``local``, ``remote``), a chunk's number, begin and end in s."""


class Pipeline:
    """Runs chunks through the stages of their hierarchies. Thread-safe.

    Parameters
    ----------
    workers
        Where the remote stage runs. A task never waits for one that has not begun.
    observer
        Told when each stage of each chunk began and ended.
    """

    def __init__(self, workers: Executor, observer: Observer | None = None) -> None:
        self._workers = workers
        self._observer = observer

    def run(self, work: Sequence[tuple[Hierarchy, Chunk]]) -> None:
        """Resolve all chunks; returns when nobody writes to them any more."""
        last = len(work) - 1
        flying: deque[Future[None]] = deque()
        try:
            for number, (hierarchy, chunk) in enumerate(work):
                self._stage("local", number, hierarchy.ask_local, chunk)
                if chunk.done:
                    continue
                if number == last:
                    self._stage("remote", number, hierarchy.ask_remote, chunk)
                    continue
                if len(flying) == BUFFERS:
                    _land(flying)
                flying.append(
                    self._workers.submit(
                        self._stage, "remote", number, hierarchy.ask_remote, chunk
                    )
                )
            while flying:
                _land(flying)
        finally:
            wait(flying)

    def _stage(
        self, name: str, number: int, step: Callable[[Chunk], None], chunk: Chunk
    ) -> None:
        if self._observer is None:
            step(chunk)
            return
        begin_s = perf_counter()
        step(chunk)
        self._observer(name, number, begin_s, perf_counter())


def _land(flying: deque[Future[None]]) -> None:
    """Wait for the oldest future, which stays in the queue until it is done."""
    flying[0].result()
    flying.popleft()
