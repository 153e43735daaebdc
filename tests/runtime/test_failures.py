"""Failing tiers are named in the log now and then, and counted every time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from hps_numba.errors import TierTimeoutError, TierUnavailableError
from hps_numba.runtime.backfill import Backfill, BackfillQueue
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, TableSpec
from tests.oracle import versioned_rows
from tests.runtime.histories import LowerTier
from tests.support.wrappers import FailingTier

SPEC = TableSpec("model", "table", 4)
OTHER = TableSpec("model", "other", 4)
KEYS = np.arange(40, dtype=np.int64)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> FailureLog:
    return FailureLog(logging.getLogger(__name__), every_s=10.0, clock=clock)


def failure(tier: str) -> TierUnavailableError:
    return TierUnavailableError("no answer", tier=tier, tag=SPEC.tag)


def test_a_tier_is_named_once_in_ten_seconds(
    log: FailureLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(21):
        clock.now_s = 100.0 + step
        log.report("lookup degraded", SPEC.tag, failure("redis"))
    assert [record.getMessage() for record in caplog.records] == [
        f"lookup degraded tag={SPEC.tag} unsaid={n} error=TierUnavailableError: "
        f"redis:{SPEC.tag}: no answer"
        for n in (0, 9, 9)
    ]


def test_tiers_are_named_apart_whatever_the_table(
    log: FailureLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.report("a", SPEC.tag, failure("redis"))
    log.report("b", OTHER.tag, failure("redis"))
    log.report("c", SPEC.tag, failure("rocksdb"))
    log.report("d", OTHER.tag, TierTimeoutError("slow", tier="redis"))
    assert [record.getMessage()[0] for record in caplog.records] == ["a", "c"]


def test_other_errors_are_named_by_table(
    log: FailureLog, caplog: pytest.LogCaptureFixture
) -> None:
    for tag in (SPEC.tag, SPEC.tag, OTHER.tag):
        log.report("backfill failed", tag, MemoryError("planted"))
    assert [record.getMessage() for record in caplog.records] == [
        f"backfill failed tag={tag} unsaid=0 error=MemoryError: planted"
        for tag in (SPEC.tag, OTHER.tag)
    ]


@pytest.fixture
def host() -> Iterator[FailingTier]:
    tier = FailingTier(HostTier())
    tier.open_table(SPEC)
    yield tier
    tier.close()


@pytest.fixture
def lower() -> Iterator[LowerTier]:
    tier = LowerTier()
    tier.open_table(SPEC)
    tier.insert(SPEC.tag, KEYS, versioned_rows(KEYS, 1, SPEC.dim))
    yield tier
    tier.close()


def test_backfills_to_a_tier_that_is_down_do_not_flood_the_log(
    host: FailingTier, caplog: pytest.LogCaptureFixture
) -> None:
    queue = BackfillQueue(1 << 20)
    host.fail("backfill")
    for key in KEYS:
        keys = np.array([key, key + 1000])
        rows = versioned_rows(keys, 1, SPEC.dim)
        queue.put(Backfill(host, SPEC.tag, keys, rows, 0))
    queue.drain()
    stats = queue.stats()
    assert (stats.stored_rows, stats.refused_rows, stats.failed_rows) == (0, 0, 80)
    (record,) = caplog.records
    assert "backfill failed" in record.getMessage()
    assert "host" in record.getMessage()
    host.heal()
    queue.put(Backfill(host, SPEC.tag, KEYS, versioned_rows(KEYS, 1, SPEC.dim), 0))
    queue.drain()
    assert (queue.stats().stored_rows, queue.stats().failed_rows) == (40, 80)
    queue.close()


@pytest.mark.parametrize("mode", list(FailureMode))
def test_every_failure_of_a_lookup_is_counted(
    host: FailingTier,
    lower: LowerTier,
    mode: FailureMode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = Hierarchy(
        SPEC, [host, lower], backfills=None, on_failure=mode, write_rows=64
    )
    host.fail("fetch", times=7)
    raised = 0
    for _ in range(10):
        rows, found = np.zeros((40, SPEC.dim), np.float32), np.zeros(40, np.bool_)
        try:
            table.ask_local(Chunk(KEYS, rows, found))
        except TierUnavailableError:
            raised += 1
    upper, below = table.stats().tiers
    assert (upper.failures, below.failures) == (7, 0)
    degrades = mode is FailureMode.DEGRADE
    assert raised == (0 if degrades else 7)
    assert len(caplog.records) == int(degrades)  # who raises need not log as well


def test_the_tables_of_a_server_share_what_they_say(
    host: FailingTier, caplog: pytest.LogCaptureFixture
) -> None:
    log = FailureLog(logging.getLogger(__name__))
    host.open_table(OTHER)
    host.fail("fetch")
    for spec in (SPEC, OTHER):
        table = Hierarchy(
            spec,
            [host],
            backfills=None,
            on_failure=FailureMode.DEGRADE,
            write_rows=64,
            failures=log,
        )
        table.ask_local(Chunk(KEYS, np.zeros((40, 4), np.float32), KEYS < 0))
    assert len(caplog.records) == 1
