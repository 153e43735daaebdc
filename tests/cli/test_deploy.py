"""What a deployment notes of its tables."""

from __future__ import annotations

from hps_numba.cli.deploy import LoadWatch
from hps_numba.runtime.stats import BackfillStats, Latency, ServerStats, TableStats

BACKFILL = BackfillStats(0, 0, 0, 0)


def table_stats(model: str, name: str) -> TableStats:
    return TableStats(model, name, *[0] * 10, Latency(0, 0, 0, 0, 0), ())


def test_a_load_is_timed_from_its_first_to_its_last_step() -> None:
    ticks = iter([10.0, 11.0, 14.5, 20.0])
    calls = []
    watch = LoadWatch(lambda *call: calls.append(call), clock=lambda: next(ticks))
    watch("wdl/wide check", 0, 3)
    watch("wdl/wide check", 3, 3)
    watch("wdl/wide rocksdb", 3, 3)
    watch("wdl/deep host", 0, 5)
    names = ("wide", "deep", "quiet")
    stats = ServerStats(tuple(table_stats("wdl", name) for name in names), BACKFILL)
    assert [(t.table, t.loaded, t.seconds) for t in watch.tables(stats)] == [
        ("wide", True, 4.5),
        ("deep", False, 0.0),
        ("quiet", False, 0.0),
    ]
    assert calls[0] == ("wdl/wide check", 0, 3)
    assert len(calls) == 4
