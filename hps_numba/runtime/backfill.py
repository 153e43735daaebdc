"""Rows that a lower tier found, on their way to the tiers above.

The queue is bounded in bytes. What does not fit is dropped and counted: the next lookup
of such a key goes to the lower tier again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from hps_numba.errors import UnknownTableError
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.stats import BackfillStats
from hps_numba.tiers.base import Epoch, Tier
from hps_numba.types import Keys, Rows

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # for a tier that hangs when the queue is closed


class Job(Protocol):
    """Optional work on some keys of a table, for the background."""

    @property
    def tag(self) -> str:
        """Tag of the table."""

    @property
    def keys(self) -> Keys:
        """The keys."""

    @property
    def n_bytes(self) -> int:
        """Bytes that the queue holds for it."""

    def store(self) -> int:
        """Do it; return the number of rows stored."""


@dataclass(frozen=True)
class Backfill:
    """Rows for one tier, read by a lookup that saw ``epoch`` before it read them."""

    tier: Tier
    tag: str
    keys: Keys
    rows: Rows
    epoch: Epoch

    @property
    def n_bytes(self) -> int:
        """Bytes that the queue holds for it."""
        return self.keys.nbytes + self.rows.nbytes

    def store(self) -> int:
        """Give the rows to the tier; return how many it stored."""
        return self.tier.backfill(self.tag, self.keys, self.rows, self.epoch)


class BackfillQueue:
    """A bounded queue with one background thread. Thread-safe.

    Parameters
    ----------
    max_bytes
        Most bytes of rows and keys that wait.
    name
        Of the thread.
    """

    def __init__(self, max_bytes: int, *, name: str = "hps-backfill") -> None:
        self._max_bytes = max_bytes
        self._failures = FailureLog(logger)
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[Job] = deque()  # this and all below: guarded by _changed
        self._bytes = 0
        self._storing: Job | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self._stored = self._refused = self._dropped = self._failed = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Job) -> bool:
        """Queue rows, or drop them if there is no room; never waits.

        Raises
        ------
        RuntimeError
            If the background thread died, with what killed it as the cause.
        """
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the backfill thread died") from self._failure
            if self._closed or self._bytes + item.n_bytes > self._max_bytes:
                self._dropped += item.keys.size
                return False
            self._queue.append(item)
            self._bytes += item.n_bytes
            self._changed.notify_all()
            return True

    def drain(self) -> None:
        """Wait until everything that was queued is stored, refused or failed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not (self._queue or self._storing)
            )

    def forget(self, tag: str) -> None:
        """Drop what waits for a table, and wait for what is being stored of it.

        Afterwards the table may be dropped, and another one of its tag opened.
        """
        with self._changed:
            kept = [item for item in self._queue if item.tag != tag]
            waiting = sum(item.keys.size for item in self._queue)
            self._dropped += waiting - sum(item.keys.size for item in kept)
            self._queue = deque(kept)
            self._bytes = sum(item.n_bytes for item in kept)
            self._changed.wait_for(
                lambda: (
                    self._failure or self._storing is None or self._storing.tag != tag
                )
            )

    def stats(self) -> BackfillStats:
        """Return the counters."""
        with self._changed:
            queued = sum(item.keys.size for item in self._queue)
            return BackfillStats(
                queued, self._stored, self._refused, self._dropped, self._failed
            )

    def close(self) -> None:
        """Drop what waits and stop the thread; the second call does nothing."""
        with self._changed:
            self._closed = True
            self._dropped += sum(item.keys.size for item in self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._store(item)
        except BaseException as exc:
            logger.exception("backfill thread died")
            with self._changed:
                self._failure = exc
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._storing = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            item = self._storing = self._queue.popleft()
            self._bytes -= item.n_bytes
            return item

    def _store(self, item: Job) -> None:
        stored = failed = 0
        try:
            stored = item.store()
        except UnknownTableError:
            pass  # The model was removed meanwhile.
        except Exception as exc:  # optional work: no lookup is to fail for it
            failed = item.keys.size
            self._failures.report("backfill failed", item.tag, exc)
        with self._changed:
            self._stored += stored
            self._failed += failed
            self._refused += item.keys.size - stored - failed
