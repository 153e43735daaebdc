"""Overflow handling: what happens when a partition has more rows than its margin.

A write is told by the servers how many rows its partitions have. If that is too many,
the writer waits until about as many rows have gone as it brought, so that a partition
does not outgrow its margin however fast rows come; the rest, down to the target, is
done by a background thread. The same thread notes which rows lookups found. Nothing
of this makes an insert or a lookup fail: what a server that is down would have had to
do is left out, and counted.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

import numpy as np

from hps_numba.tiers.redis.evicting import Answer, Evictor, victims_of
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.types import Keys, OverflowPolicy

logger = logging.getLogger(__name__)

_MAX_USES = 1 << 18  # keys that wait to be noted
_PAUSE_S = 0.5  # before a partition that is being moved is looked at again
_START = b"0"  # cursor


@dataclass(frozen=True)
class OverflowStats:
    """What the background thread has to do, and what was left out."""

    queued_partitions: int
    queued_uses: int
    dropped_partitions: int
    dropped_uses: int


@dataclass
class _Chore:
    """A partition that is too large, or whose numbers of uses are to be halved."""

    table: RedisTable
    partition: int
    cursor: bytes | None = None  # None while rows are to be removed
    due_s: float = 0.0


class OverflowWorker:
    """Keeps partitions within their margins. Thread-safe.

    Parameters
    ----------
    evictor
        Does the steps.
    max_uses
        Most keys that wait to be noted as used; more are dropped.
    monotonic
        Time in s.
    """

    def __init__(
        self,
        evictor: Evictor,
        *,
        max_uses: int = _MAX_USES,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        self._evictor = evictor
        self._max_uses = max_uses
        self._monotonic = monotonic
        self._changed = threading.Condition(threading.Lock())
        # All below is guarded by _changed.
        self._chores: dict[tuple[str, int], _Chore] = {}
        self._uses: deque[tuple[RedisTable, Keys]] = deque()
        self._n_uses = self._dropped_uses = self._dropped_partitions = 0
        self._busy = self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def relieve(self, table: RedisTable, brought: Mapping[int, int]) -> None:
        """Remove rows of partitions that are too large.

        Waits until as many were removed as ``brought`` says, or enough; what is above
        the target then is removed in the background.
        """
        margin = table.margin
        each = victims_of(table)
        steps = {p: max(-(-n // each), 1) for p, n in brought.items()}
        while steps:
            for answer in self._evictor.evict(table, list(steps)):
                p, value = answer.partition, answer.value
                steps[p] -= 1
                if value is not None and value.rows > margin and steps[p]:
                    continue
                del steps[p]
                self._settle(_Chore(table, p), answer)

    def note(self, table: RedisTable, keys: Keys) -> None:
        """Queue keys as used, or drop them if there is no room; never waits."""
        with self._changed:
            self._start_locked()
            if self._n_uses + keys.size > self._max_uses:
                self._dropped_uses += keys.size
                return
            self._uses.append((table, keys))
            self._n_uses += keys.size
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until nothing is left to do."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._failure
                    or self._closed
                    or not (self._chores or self._uses or self._busy)
                )
            )
            self._check_locked()

    def forget(self, tag: str) -> None:
        """Drop what is left to do for a table."""
        with self._changed:
            self._chores = {k: c for k, c in self._chores.items() if k[0] != tag}
            self._uses = deque(item for item in self._uses if item[0].spec.tag != tag)
            self._n_uses = sum(keys.size for _, keys in self._uses)
            self._changed.notify_all()

    def stats(self) -> OverflowStats:
        """Return what waits and what was dropped."""
        with self._changed:
            return OverflowStats(
                len(self._chores),
                self._n_uses,
                self._dropped_partitions,
                self._dropped_uses,
            )

    def close(self) -> None:
        """Stop the thread after its present step; the second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _settle(self, chore: _Chore, answer: Answer) -> None:
        """Queue what is left to do of a partition."""
        value = answer.value
        if value is None and not answer.again:
            with self._changed:
                self._dropped_partitions += 1
            return
        if value is None:
            chore.due_s = self._monotonic() + _PAUSE_S
        elif chore.cursor is not None:
            if value == _START:  # all are halved
                return
            chore.cursor = value
        elif value.rows <= chore.table.goal:
            # Of several servers the one whose step came to the goal ages the rest.
            policy = chore.table.overflow.policy
            if not value.removed or policy is not OverflowPolicy.EVICT_LEAST_USED:
                return
            chore.cursor = _START
        self._queue(chore)

    def _queue(self, chore: _Chore) -> None:
        with self._changed:
            self._start_locked()
            place = chore.table.spec.tag, chore.partition
            waiting = self._chores.get(place)
            # Once rows were removed the partition is aged from the start.
            if waiting is None or waiting.cursor is not None:
                self._chores[place] = chore
            self._changed.notify_all()

    def _start_locked(self) -> None:
        self._check_locked()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(
                target=self._run, name="hps-redis-overflow", daemon=True
            )
            self._thread.start()

    def _check_locked(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the overflow thread died") from self._failure

    def _run(self) -> None:
        try:
            while self._wait():
                self._note_some()
                self._do_some()
        except BaseException as exc:
            logger.exception("overflow thread died")
            with self._changed:
                self._failure = exc
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for something to do; return False when closed."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not self._closed:
                wait_s = 0.0 if self._uses else self._pause_s_locked()
                if wait_s is not None and wait_s <= 0:
                    self._busy = True
                    return True
                self._changed.wait(wait_s)
            return False

    def _pause_s_locked(self) -> float | None:
        if not self._chores:
            return None
        return min(c.due_s for c in self._chores.values()) - self._monotonic()

    def _note_some(self) -> None:
        """Note the uses of one table, all that wait at once."""
        with self._changed:
            if not self._uses:
                return
            table = self._uses[0][0]
            mine = [keys for other, keys in self._uses if other is table]
            self._uses = deque(item for item in self._uses if item[0] is not table)
            self._n_uses = sum(keys.size for _, keys in self._uses)
        keys, counts = np.unique(np.concatenate(mine), return_counts=True)
        dropped = self._evictor.note(table, keys, counts)
        with self._changed:
            self._dropped_uses += dropped

    def _do_some(self) -> None:
        """Do one step of each partition of one table."""
        with self._changed:
            now_s = self._monotonic()
            due = [c for c in self._chores.values() if c.due_s <= now_s]
            chores = {c.partition: c for c in due if c.table is due[0].table}
            for chore in chores.values():
                del self._chores[chore.table.spec.tag, chore.partition]
        if not chores:
            return
        table = due[0].table
        cursors = {p: c.cursor for p, c in chores.items() if c.cursor is not None}
        full = [p for p, c in chores.items() if c.cursor is None]
        answers = self._evictor.evict(table, full) if full else []
        answers += self._evictor.age(table, cursors) if cursors else []
        for answer in answers:
            self._settle(chores[answer.partition], answer)
