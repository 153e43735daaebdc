from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from hps_numba.errors import ClosedError
from hps_numba.runtime.backfill import Backfill, BackfillQueue
from hps_numba.runtime.stats import BackfillStats
from hps_numba.tiers.base import Epoch, Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import Keys, Rows, TableSpec
from tests.oracle import versioned_rows
from tests.support.gates import StopPoints
from tests.support.wrappers import FailingTier, GatedTier

SPEC = TableSpec("model", "table", 4)
BYTES_PER_ROW = 8 + SPEC.row_bytes


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier()
    tier.open_table(SPEC)
    yield tier
    tier.close()


@pytest.fixture
def stops() -> StopPoints:
    return StopPoints()


@pytest.fixture
def gated(host: HostTier, stops: StopPoints) -> GatedTier:
    return GatedTier(host, stops)


def item(
    tier: Tier, first: int, n_rows: int, *, epoch: Epoch | None = None
) -> Backfill:
    keys = np.arange(first, first + n_rows, dtype=np.int64)
    seen = tier.epoch(SPEC.tag) if epoch is None else epoch
    return Backfill(tier, SPEC.tag, keys, versioned_rows(keys, 1, SPEC.dim), seen)


def rows_of(tier: Tier, n_keys: int) -> tuple[Rows, list[int]]:
    keys = np.arange(n_keys, dtype=np.int64)
    out, found = np.zeros((n_keys, SPEC.dim), np.float32), np.zeros(n_keys, np.bool_)
    tier.fetch(SPEC.tag, keys, out, found)
    return out, np.flatnonzero(found).tolist()


def test_rows_reach_the_tier(host: HostTier) -> None:
    queue = BackfillQueue(1 << 20)
    assert queue.put(item(host, 0, 5))
    assert queue.put(item(host, 5, 3))
    queue.drain()
    out, found = rows_of(host, 10)
    assert found == list(range(8))
    assert np.array_equal(out[:8], versioned_rows(np.arange(8), 1, SPEC.dim))
    assert queue.stats() == BackfillStats(0, 8, 0, 0)
    queue.close()


def test_the_queue_is_bounded_in_bytes(
    host: HostTier, gated: GatedTier, stops: StopPoints
) -> None:
    queue = BackfillQueue(10 * BYTES_PER_ROW)
    stops.arm("host.backfill")
    queue.put(item(gated, 0, 1))
    stops.wait_held("host.backfill")  # this one waits no more
    assert queue.put(item(gated, 1, 6))
    assert queue.put(item(gated, 7, 4))
    assert not queue.put(item(gated, 11, 1))
    assert queue.stats() == BackfillStats(10, 0, 0, 1)
    stops.release("host.backfill")
    queue.drain()
    assert queue.put(item(gated, 12, 10))
    queue.drain()
    assert rows_of(host, 30)[1] == [*range(11), *range(12, 22)]
    assert queue.stats() == BackfillStats(0, 21, 0, 1)
    queue.close()


def test_a_block_larger_than_the_queue_is_dropped(host: HostTier) -> None:
    queue = BackfillQueue(10 * BYTES_PER_ROW)
    assert not queue.put(item(host, 0, 11))
    queue.drain()
    assert queue.stats() == BackfillStats(0, 0, 0, 11)
    queue.close()


def test_rows_updated_meanwhile_are_refused(host: HostTier) -> None:
    queue = BackfillQueue(1 << 20)
    seen = host.epoch(SPEC.tag)
    host.insert(
        SPEC.tag, np.array([2], np.int64), np.full((1, SPEC.dim), 9, np.float32)
    )
    queue.put(item(host, 0, 4, epoch=seen))
    queue.drain()
    out, found = rows_of(host, 4)
    assert found == [0, 1, 2, 3]
    assert out[2].tolist() == [9.0] * 4
    assert queue.stats() == BackfillStats(0, 3, 1, 0)
    queue.close()


def test_drain_waits_for_the_rows_being_stored(
    host: HostTier, gated: GatedTier, stops: StopPoints
) -> None:
    queue = BackfillQueue(1 << 20)
    stops.arm("host.backfill.done")
    queue.put(item(gated, 0, 1))
    stops.wait_held("host.backfill.done")
    drained = threading.Thread(target=queue.drain)
    drained.start()
    assert drained.is_alive()
    assert queue.stats().stored_rows == 0
    stops.release("host.backfill.done")
    drained.join()
    assert queue.stats().stored_rows == 1
    queue.close()


def test_a_failing_tier_costs_the_rows_and_no_more(host: HostTier) -> None:
    failing = FailingTier(host)
    failing.fail("backfill", times=1)
    queue = BackfillQueue(1 << 20)
    queue.put(item(failing, 0, 3))
    queue.put(item(failing, 3, 2))
    queue.drain()
    assert rows_of(host, 5)[1] == [3, 4]
    assert queue.stats() == BackfillStats(0, 2, 0, 0, failed_rows=3)
    queue.close()


def test_a_table_that_was_dropped_is_no_failure(host: HostTier) -> None:
    queue = BackfillQueue(1 << 20)
    waiting = item(host, 0, 3)
    host.drop_table(SPEC.tag)
    queue.put(waiting)
    queue.drain()
    assert queue.stats().stored_rows == 0
    queue.close()


def test_forgetting_a_table_drops_what_waits_for_it(
    host: HostTier, gated: GatedTier, stops: StopPoints
) -> None:
    other = TableSpec("model", "other", 4)
    host.open_table(other)
    queue = BackfillQueue(10 * BYTES_PER_ROW)
    stops.arm("host.backfill")
    queue.put(replace(item(gated, 0, 1), tag=other.tag))
    stops.wait_held("host.backfill")
    queue.put(item(gated, 0, 4))
    queue.put(replace(item(gated, 0, 5), tag=other.tag))
    queue.forget(SPEC.tag)  # waits for no other table
    assert queue.stats() == BackfillStats(5, 0, 0, 4)
    assert queue.put(item(gated, 7, 5))  # there is room again
    stops.release("host.backfill")
    queue.drain()
    assert rows_of(host, 20)[1] == list(range(7, 12))
    assert host.size(other.tag) == 5
    queue.close()


def test_forgetting_a_table_waits_for_what_is_being_stored(
    host: HostTier, gated: GatedTier, stops: StopPoints
) -> None:
    queue = BackfillQueue(1 << 20)
    stops.arm("host.backfill")
    queue.put(item(gated, 0, 3))
    stops.wait_held("host.backfill")
    sizes: list[int] = []

    def forget() -> None:
        queue.forget(SPEC.tag)
        sizes.append(host.size(SPEC.tag))

    forgetting = threading.Thread(target=forget)
    forgetting.start()
    assert sizes == []
    stops.release("host.backfill")
    forgetting.join()
    assert sizes == [3]
    queue.close()


class KilledError(BaseException):
    """Something that ends a thread."""


class BrokenTier(HostTier):
    failure: BaseException = KilledError("planted")

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        raise self.failure


def test_a_tier_without_memory_costs_its_rows_only() -> None:
    broken, host = BrokenTier(), HostTier()
    broken.failure = MemoryError("planted")
    for tier in (broken, host):
        tier.open_table(SPEC)
    queue = BackfillQueue(1 << 20)
    queue.put(item(broken, 0, 2))
    queue.put(item(host, 5, 3))
    queue.drain()
    assert host.size(SPEC.tag) == 3
    assert (queue.stats().stored_rows, queue.stats().failed_rows) == (3, 2)
    queue.close()


def test_what_killed_the_thread_is_raised_by_the_next_call() -> None:
    broken = BrokenTier()
    broken.open_table(SPEC)
    queue = BackfillQueue(1 << 20)
    queue.put(item(broken, 0, 1))
    queue.drain()  # returns, although nothing will be stored any more
    with pytest.raises(RuntimeError, match="backfill thread died") as caught:
        queue.put(item(broken, 1, 1))
    assert isinstance(caught.value.__cause__, KilledError)
    queue.close()


def test_closing_drops_what_waits_and_ends_the_thread(
    host: HostTier, gated: GatedTier, stops: StopPoints
) -> None:
    queue = BackfillQueue(1 << 20)
    stops.arm("host.backfill")
    queue.put(item(gated, 0, 1))
    stops.wait_held("host.backfill")
    queue.put(item(gated, 1, 5))
    closing = threading.Thread(target=queue.close)
    closing.start()
    stops.release("host.backfill")
    closing.join()
    assert queue.stats() == BackfillStats(0, 1, 0, 5)
    assert not queue.put(item(gated, 6, 1))
    assert queue.stats().dropped_rows == 6
    queue.close()
    queue.drain()


def test_a_closed_tier_does_not_kill_the_thread(host: HostTier) -> None:
    queue = BackfillQueue(1 << 20)
    waiting = item(host, 0, 1)
    host.close()
    with pytest.raises(ClosedError):
        host.epoch(SPEC.tag)
    queue.put(waiting)
    queue.drain()
    assert queue.put(waiting)
    queue.close()
