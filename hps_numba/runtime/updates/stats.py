"""Counters of a server's update stream."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from time import monotonic

from hps_numba.runtime.stats import Histogram, Latency
from hps_numba.types import Position

_RATE_S = 5.0  # rows per second are an average over this


class StreamState(str, Enum):
    """What a stream partition is doing."""

    READING = "reading"
    PAUSED = "paused"  # by the user
    RETRYING = "retrying"  # a tier failed; it is tried again
    STOPPED = "stopped"  # records are gone, and by configuration that ends it


@dataclass(frozen=True)
class PartitionStats:
    """One partition of a table's stream."""

    partition: int
    state: StreamState
    reason: str  # why it does not read, else ""
    position: Position  # the first record that is not applied
    end: int | None  # offset after the last message, as last seen
    lag: int | None  # messages that are not applied


@dataclass(frozen=True)
class StreamStats:
    """The stream of one table, since the server follows it.

    ``staleness`` is the time from a message's timestamp to the moment from which on all
    lookups see its rows, by the clocks of the producer and of this machine.
    """

    model: str
    table: str
    partitions: tuple[PartitionStats, ...]
    messages: int
    rows: int  # records that brought rows, repeats included
    deletes: int
    skipped: dict[str, int]  # messages that were not applied, by reason
    retries: int  # times that a tier failed and was tried again
    rewinds: int  # times that a tier had lost records, which were read again
    resets: int  # times that records were gone from the stream
    rows_per_s: float
    staleness: Latency

    @property
    def lag(self) -> int | None:
        """Messages that are not applied; None if the end is not known."""
        lags = [p.lag for p in self.partitions]
        known = [lag for lag in lags if lag is not None]
        return sum(known) if known and len(known) == len(lags) else None


@dataclass(frozen=True)
class UpdateStats:
    """The update streams of a server."""

    connected: bool  # whether a broker answers
    unknown_topics: tuple[str, ...]  # that the filters take, and no table has
    streams: tuple[StreamStats, ...]

    def stream(self, model: str, table: str) -> StreamStats | None:
        """Return the counters of one table's stream, if it has one."""
        for stream in self.streams:
            if (stream.model, stream.table) == (model, table):
                return stream
        return None


class StreamCounters:
    """Counters of the stream of one table. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._staleness = Histogram()  # this and all below: guarded by _lock
        self._skipped: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, **amounts: int) -> None:
        """Raise counters by name."""
        with self._lock:
            self._counts.update(amounts)

    def skip(self, reason: str) -> None:
        """Count a message that is not applied."""
        with self._lock:
            self._skipped[reason] += 1

    def applied(self, n_records: int, *, rows: bool, ages_s: Iterable[float]) -> None:
        """Count records that are visible now, and the ages of their messages."""
        now_s = monotonic()
        with self._lock:
            self._counts["rows" if rows else "deletes"] += n_records
            self._recent.append((now_s, n_records))
            self._forget_old_locked(now_s)
            for age_s in ages_s:
                self._staleness.add(max(int(age_s * 1e9), 0))

    def snapshot(
        self, model: str, table: str, partitions: Iterable[PartitionStats]
    ) -> StreamStats:
        """Return the counters."""
        with self._lock:
            self._forget_old_locked(monotonic())
            counts = self._counts
            return StreamStats(
                model=model,
                table=table,
                partitions=tuple(partitions),
                messages=counts["messages"],
                rows=counts["rows"],
                deletes=counts["deletes"],
                skipped=dict(self._skipped),
                retries=counts["retries"],
                rewinds=counts["rewinds"],
                resets=counts["resets"],
                rows_per_s=sum(n for _, n in self._recent) / _RATE_S,
                staleness=self._staleness.summary(),
            )

    def _forget_old_locked(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - _RATE_S:
            self._recent.popleft()
