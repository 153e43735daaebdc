"""Counters of a server, cheap to raise and consistent to read."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hps_numba.errors import UnknownTableError
from hps_numba.tiers.base import TierStats

if TYPE_CHECKING:
    from hps_numba.runtime.updates.stats import UpdateStats

_SUB_BITS = 3  # eight buckets per power of two: a percentile is right within 13 %
_BUCKETS = 64 << _SUB_BITS


@dataclass(frozen=True)
class Latency:
    """Distribution of the time per lookup."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class TierUse:
    """What one tier did for one table.

    ``asked`` and ``hits`` count keys as the tier gets them: every occurrence in a GPU
    cache and in host memory, unique keys below it. A GPU cache tells unique keys apart
    in lookups that may give default rows, with a ``hit_rate_threshold`` between 0 and
    1; ``unique_asked`` and ``unique_hits`` are of those.
    """

    tier: str
    asked: int
    hits: int
    rows: int
    bytes: int
    evictions: int
    refused_backfills: int
    dropped_rows: int
    unique_asked: int = 0
    unique_hits: int = 0
    failures: int = 0  # times that it could not answer a lookup
    down: tuple[str, ...] = ()  # its servers that do not answer now

    @property
    def unique_hit_rate(self) -> float:
        """Share of the unique keys of each lookup that hit; 1.0 before the first."""
        return self.unique_hits / self.unique_asked if self.unique_asked else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the keys asked for that this tier had; 1.0 before the first."""
        return self.hits / self.asked if self.asked else 1.0


@dataclass(frozen=True)
class TableStats:
    """Counters of one table since it was opened; keys count per occurrence."""

    model: str
    table: str
    lookups: int
    keys: int
    defaults: int  # keys that no tier knew
    errors: int  # lookups that raised
    degraded: int  # lookups served although a tier failed
    joined: int  # keys that waited for another lookup's fetch
    deferred: int  # keys that got the default row, while theirs is fetched
    updated_rows: int
    deleted_keys: int
    non_finite_rows: int  # updated rows with NaN or infinity
    latency: Latency
    tiers: tuple[TierUse, ...]


@dataclass(frozen=True)
class BackfillStats:
    """Rows on their way from a lower tier to an upper one."""

    queued_rows: int
    stored_rows: int
    refused_rows: int
    dropped_rows: int
    failed_rows: int = 0  # the tier could not store them


NO_BACKFILLS = BackfillStats(0, 0, 0, 0)


@dataclass(frozen=True)
class ServerStats:
    """Counters of a whole server.

    ``deferred`` is of keys that lookups gave default rows, and whose own rows are
    fetched in the background for the GPU caches.
    """

    tables: tuple[TableStats, ...]
    backfill: BackfillStats
    deferred: BackfillStats = NO_BACKFILLS
    updates: UpdateStats | None = None  # if there is an update_source

    def table(self, model: str, name: str) -> TableStats:
        """Return the counters of one table."""
        for table in self.tables:
            if (table.model, table.table) == (model, name):
                return table
        raise UnknownTableError(f"no table {name!r} of a model {model!r} is served")


class Histogram:
    """Counts of durations in logarithmic buckets. Guarded by its owner's lock."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._total = 0
        self._max_ns = 0

    def add(self, ns: int) -> None:
        """Count one duration in nanoseconds."""
        shift = max(ns.bit_length() - 1 - _SUB_BITS, 0)
        self._counts[(shift << _SUB_BITS) + (ns >> shift)] += 1
        self._total += 1
        self._max_ns = max(self._max_ns, ns)

    def summary(self) -> Latency:
        """Return percentiles; each is the upper edge of its bucket."""
        p50, p95, p99 = (self._percentile_ms(q) for q in (0.50, 0.95, 0.99))
        return Latency(self._total, p50, p95, p99, self._max_ns / 1e6)

    def _percentile_ms(self, q: float) -> float:
        rank = q * self._total
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return min(_upper_edge_ns(bucket), self._max_ns) / 1e6
        return 0.0


def _upper_edge_ns(bucket: int) -> int:
    shift = max((bucket >> _SUB_BITS) - 1, 0)
    return (bucket - (shift << _SUB_BITS) + 1) << shift


class TableCounters:
    """Counters of one table. Thread-safe."""

    def __init__(self, tiers: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._latency = Histogram()  # this and all below: guarded by _lock
        self._use = {tier: [0, 0] for tier in tiers}
        self._failures = dict.fromkeys(self._use, 0)
        self._unique: dict[str, list[int]] = {}  # of GPU caches
        self._counts = dict.fromkeys(
            (
                "lookups",
                "keys",
                "defaults",
                "errors",
                "degraded",
                "joined",
                "deferred",
                "updated_rows",
                "deleted_keys",
                "non_finite_rows",
            ),
            0,
        )

    def add_lookup(self, n_keys: int, n_defaults: int, ns: int) -> None:
        """Count a lookup that returned."""
        with self._lock:
            counts = self._counts
            counts["lookups"] += 1
            counts["keys"] += n_keys
            counts["defaults"] += n_defaults
            self._latency.add(ns)

    def add_use(self, tier: str, asked: int, hits: int) -> None:
        """Count keys that a tier was asked for."""
        with self._lock:
            use = self._use[tier]
            use[0] += asked
            use[1] += hits

    def add_failure(self, tier: str) -> None:
        """Count a time that a tier could not answer."""
        with self._lock:
            self._failures[tier] += 1

    def add_unique(self, tier: str, asked: int, hits: int) -> None:
        """Count unique keys that a GPU cache was asked for."""
        with self._lock:
            use = self._unique.setdefault(tier, [0, 0])
            use[0] += asked
            use[1] += hits

    def add(self, **amounts: int) -> None:
        """Raise other counters by name."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def snapshot(
        self,
        model: str,
        table: str,
        tiers: Iterable[tuple[str, TierStats]],
        caches: Iterable[TierUse] = (),
    ) -> TableStats:
        """Return the counters, with what caches and tiers say of the table."""
        with self._lock:
            above = tuple(
                replace(use, unique_asked=unique[0], unique_hits=unique[1])
                for use in caches
                for unique in [self._unique.get(use.tier, (0, 0))]
            )
            uses = tuple(
                TierUse(
                    tier=tier,
                    asked=self._use[tier][0],
                    hits=self._use[tier][1],
                    rows=stats.rows,
                    bytes=stats.bytes,
                    evictions=stats.evictions,
                    refused_backfills=stats.refused_backfills,
                    dropped_rows=stats.dropped_rows,
                    failures=self._failures[tier],
                    down=stats.down,
                )
                for tier, stats in tiers
            )
            return TableStats(
                model=model,
                table=table,
                latency=self._latency.summary(),
                tiers=above + uses,
                **self._counts,
            )
