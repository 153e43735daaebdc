"""The double buffer: the next chunk is asked for while the last ones are fetched.

::

    caller   | local 0 | local 1 | local 2 |  (wait)  | local 3 | remote 3 |
    worker           | remote 0           |    | remote 2     |
    worker                     | remote 1            |

On the way to an array of the caller's, a chunk's buffers are its slices of that array,
and nothing is copied between stages. On the way to a GPU they are blocks of pinned
memory, two in turn: a block is ``take``-n before its chunk is asked for, and ``give``-n
to the device when the chunk has landed.

At most two chunks are in the remote stage in workers; the caller takes the last chunk's
remote stage itself, so a lookup of one chunk changes threads nowhere. In a tier that
answers in turn, one of them at a time has still to ask: two would share its answers,
come back at the same time, and leave it idle while both ask the tier below.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, wait
from time import perf_counter
from typing import Protocol, TypeVar

from hps_numba.errors import ClosedError, HPSError
from hps_numba.runtime.chunk import Chunk, Turn
from hps_numba.runtime.hierarchy import Hierarchy

_T = TypeVar("_T")

BUFFERS = 2

Observer = Callable[[str, int, float, float], None]
"""Called with a stage, a chunk's number, begin and end in s.

Stages are ``local``, ``remote``, ``take`` and ``give``; and, within the first two, the
name of each tier while it is asked, whether it answers or fails. Called by several
threads at once.
"""


class Blocks(Protocol):
    """Memory that chunks share: chunk i uses block i % 2. Called by one thread."""

    def take(self, number: int) -> None:
        """Wait until a chunk's block is free."""

    def give(self, number: int) -> None:
        """Pass a chunk on, all of whose keys have been asked for."""


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

    def run(
        self, work: Sequence[tuple[Hierarchy, Chunk]], blocks: Blocks | None = None
    ) -> None:
        """Resolve all chunks; returns when nobody writes to them any more.

        Parameters
        ----------
        work
            The chunks, and where each is asked for.
        blocks
            The memory that chunks share, if they do.

        Raises
        ------
        TierError
            If a tier fails and failures are to be raised.
        ClosedError
            If the workers were sent home meanwhile.
        """
        last, turns = len(work) - 1, threading.Lock()
        flying: deque[tuple[int, Future[None]]] = deque()

        def land() -> None:
            """Wait for the oldest flight, which is in the queue until it is done."""
            number, future = flying[0]
            try:
                future.result()
            except CancelledError:
                raise _closed() from None
            flying.popleft()
            self._give(blocks, number)

        try:
            for number, (hierarchy, chunk) in enumerate(work):
                self._watch(number, chunk)
                chunk.turn = Turn(turns)
                if blocks is not None:
                    while flying and flying[0][0] <= number - BUFFERS:
                        land()
                    self._stage("take", number, blocks.take, number)
                self._stage("local", number, hierarchy.ask_local, chunk)
                if chunk.done:
                    self._give(blocks, number)
                elif number == last:
                    self._stage("remote", number, hierarchy.ask_remote, chunk)
                    self._give(blocks, number)
                else:
                    if len(flying) == BUFFERS:
                        land()
                    flying.append((number, self._fly(number, hierarchy, chunk)))
            while flying:
                land()
        finally:
            # What has not begun need not; nobody would ever wake who waits for it.
            wait([future for _, future in flying if not future.cancel()])

    def _watch(self, number: int, chunk: Chunk) -> None:
        """Let the observer be told of the tiers that a chunk's keys are asked of."""
        observer = self._observer
        if observer is not None:
            chunk.watch = lambda tier, begin_s, end_s: observer(
                tier, number, begin_s, end_s
            )

    def _fly(self, number: int, hierarchy: Hierarchy, chunk: Chunk) -> Future[None]:
        step = hierarchy.ask_remote
        try:
            return self._workers.submit(self._stage, "remote", number, step, chunk)
        except RuntimeError as exc:
            raise _closed() from exc

    def _give(self, blocks: Blocks | None, number: int) -> None:
        if blocks is not None:
            self._stage("give", number, blocks.give, number)

    def _stage(
        self, name: str, number: int, step: Callable[[_T], None], given: _T
    ) -> None:
        if self._observer is None:
            step(given)
            return
        begin_s = perf_counter()
        step(given)
        self._observer(name, number, begin_s, perf_counter())


def _closed() -> HPSError:
    return ClosedError("the server was closed while the lookup was under way")
