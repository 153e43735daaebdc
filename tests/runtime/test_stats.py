from __future__ import annotations

import numpy as np
import pytest

from hps_numba.errors import UnknownTableError
from hps_numba.runtime.stats import (
    BackfillStats,
    Histogram,
    Latency,
    ServerStats,
    TableCounters,
    TierUse,
)
from hps_numba.tiers.base import TierStats

RELATIVE_ERROR = 0.125  # a bucket is an eighth as wide as where it begins


@pytest.mark.parametrize("scale_ns", [30, 5_000, 2_000_000, 7 * 10**9])
@pytest.mark.parametrize("shape", ["uniform", "lognormal", "two peaks"])
def test_percentiles_are_close_to_the_exact_ones(scale_ns: int, shape: str) -> None:
    rng = np.random.default_rng(11)
    draws = {
        "uniform": rng.random(20_000) + 0.01,
        "lognormal": rng.lognormal(size=20_000),
        "two peaks": np.where(rng.random(20_000) < 0.97, 1.0, 40.0),
    }[shape]
    times = (draws * scale_ns).astype(np.int64)
    histogram = Histogram()
    for ns in times.tolist():
        histogram.add(ns)
    summary = histogram.summary()
    exact = np.percentile(times, [50, 95, 99], method="inverted_cdf") / 1e6
    told = np.array([summary.p50_ms, summary.p95_ms, summary.p99_ms])
    assert (told >= exact).all()
    assert (told <= exact * (1 + RELATIVE_ERROR) + 1e-6).all()
    assert summary.count == 20_000
    assert summary.max_ms == times.max() / 1e6


def test_each_duration_falls_into_a_bucket_that_ends_above_it() -> None:
    for bits in range(63):
        for ns in {1 << bits, (1 << bits) + 1, (2 << bits) - 1, 3 << bits >> 1}:
            histogram = Histogram()
            histogram.add(ns)
            histogram.add(1 << 63)  # so that the largest does not cut the edge
            p50_ns = histogram.summary().p50_ms * 1e6
            assert ns <= p50_ns * (1 + 1e-12)
            assert p50_ns <= ns * (1 + RELATIVE_ERROR) + 1


def test_an_empty_histogram_says_nothing() -> None:
    assert Histogram().summary() == Latency(0, 0.0, 0.0, 0.0, 0.0)


def test_a_percentile_is_not_above_the_largest() -> None:
    histogram = Histogram()
    histogram.add(1_000_001)
    assert histogram.summary() == Latency(1, *[1.000001] * 4)


def test_counters_are_told_with_what_the_tiers_say() -> None:
    counters = TableCounters(["host", "rocksdb"])
    counters.add_lookup(100, 7, 1_000_000)
    counters.add_lookup(20, 0, 3_000_000)
    counters.add_use("host", 120, 90)
    counters.add_use("rocksdb", 30, 23)
    counters.add(joined=4, errors=1)
    tiers = [
        ("host", TierStats(50, 4_000, 3, 2, 1)),
        ("rocksdb", TierStats(900, 70_000)),
    ]
    stats = counters.snapshot("model", "table", tiers)
    assert (stats.model, stats.table) == ("model", "table")
    assert (stats.lookups, stats.keys, stats.defaults) == (2, 120, 7)
    assert (stats.joined, stats.errors, stats.degraded) == (4, 1, 0)
    assert stats.latency.count == 2
    assert stats.tiers == (
        TierUse("host", 120, 90, 50, 4_000, 3, 2, 1),
        TierUse("rocksdb", 30, 23, 900, 70_000, 0, 0, 0),
    )
    assert stats.tiers[0].hit_rate == 0.75


def test_a_tier_that_was_never_asked_missed_nothing() -> None:
    assert TierUse("host", 0, 0, 0, 0, 0, 0, 0).hit_rate == 1.0


def test_a_table_is_found_by_its_names() -> None:
    a = TableCounters([]).snapshot("m", "a", [])
    b = TableCounters([]).snapshot("m", "b", [])
    stats = ServerStats((a, b), BackfillStats(0, 0, 0, 0))
    assert stats.table("m", "b") is b
    with pytest.raises(UnknownTableError, match="no table 'c' of a model 'm'"):
        stats.table("m", "c")
