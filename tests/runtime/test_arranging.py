"""Keys go to a tier in the order in which it answers them fastest."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, Keys, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier, UpperTier
from tests.support.gates import StopPoints
from tests.support.wrappers import GatedTier, WrappedTier

SPEC = TableSpec("model", "table", 4)
N_PARTITIONS = 5

Order = Callable[[Keys], NDArray[np.int64] | None]


def by_partition(keys: Keys) -> NDArray[np.int64]:
    return np.argsort(keys % N_PARTITIONS, kind="stable")


class ArrangingTier(WrappedTier):
    """Answers in an order of its own, and keeps the batches that it was asked for."""

    def __init__(self, tier: Tier, order: Order) -> None:
        super().__init__(tier)
        self._order = order
        self.asked: list[Keys] = []

    def arrange(self, tag: str, keys: Keys) -> NDArray[np.int64] | None:
        return self._order(keys)

    def fetch(self, tag, keys, out, found, **options) -> int:  # type: ignore[no-untyped-def]
        self.asked.append(keys[~found])
        return super().fetch(tag, keys, out, found, **options)


def tier_with(make: Callable[[], Tier], keys: Keys, version: int) -> Tier:
    tier = make()
    tier.open_table(SPEC)
    tier.insert(SPEC.tag, keys, versioned_rows(keys, version, SPEC.dim))
    return tier


def hierarchy(*tiers: Tier) -> Hierarchy:
    return Hierarchy(
        SPEC,
        tiers,
        backfills=None,
        on_failure=FailureMode.RAISE,
        write_rows=64,
    )


def look_up(table: Hierarchy, keys: Keys) -> Chunk:
    out = np.full((keys.size, SPEC.dim), np.nan, np.float32)
    chunk = Chunk(keys, out, np.zeros(keys.size, np.bool_))
    table.ask_local(chunk)
    table.ask_remote(chunk)
    return chunk


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "order",
    [by_partition, lambda keys: np.arange(keys.size)[::-1].copy(), lambda keys: None],
    ids=["by partition", "backwards", "none"],
)
def test_the_order_changes_no_result(order: Order, seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = np.arange(-300, 300, dtype=np.int64)
    known = [rng.choice(every, 200, replace=False) for _ in range(3)]
    versions = dict.fromkeys(every.tolist(), 0)
    for version, keys in zip((3, 2, 1), reversed(known), strict=True):
        versions.update(dict.fromkeys(keys.tolist(), version))
    host = tier_with(HostTier, known[0], 1)
    upper = ArrangingTier(tier_with(UpperTier, known[1], 2), order)
    lower = ArrangingTier(tier_with(LowerTier, known[2], 3), by_partition)
    keys = rng.choice(every, 700)
    chunk = look_up(hierarchy(host, upper, lower), keys)
    expected = np.array([versions[key] for key in keys.tolist()])
    np.testing.assert_array_equal(chunk.found, expected > 0)
    assert chunk.resolved == np.count_nonzero(expected)
    seen = versions_in(keys[chunk.found], chunk.out[chunk.found])
    np.testing.assert_array_equal(seen, expected[expected > 0])
    assert np.isnan(chunk.out[~chunk.found]).all()


def test_a_tier_is_asked_in_its_order_for_each_key_once() -> None:
    upper = ArrangingTier(tier_with(UpperTier, np.arange(10), 1), by_partition)
    keys = np.array([7, 3, 11, 3, 5, 0, 11, 12, 7], np.int64)
    look_up(hierarchy(upper), keys)
    (asked,) = upper.asked
    assert asked.tolist() == [0, 5, 11, 7, 12, 3]


def test_what_is_left_stays_in_the_order_of_the_first_tier() -> None:
    """The tiers below sort for themselves if they need to."""
    upper = ArrangingTier(tier_with(UpperTier, np.arange(5), 1), by_partition)
    lower = ArrangingTier(
        tier_with(LowerTier, np.arange(20), 1), lambda keys: np.argsort(-keys)
    )
    look_up(hierarchy(upper, lower), np.arange(12, dtype=np.int64))
    (asked,) = lower.asked
    assert asked.tolist() == [5, 10, 6, 11, 7, 8, 9]


def test_a_tier_below_the_first_is_not_asked_for_an_order() -> None:
    def never(keys: Keys) -> None:
        raise AssertionError("asked for an order")

    upper = tier_with(UpperTier, np.arange(3), 1)
    lower = ArrangingTier(tier_with(LowerTier, np.arange(9), 2), never)
    chunk = look_up(hierarchy(upper, lower), np.arange(9)[::-1].copy())
    assert versions_in(chunk.keys, chunk.out).tolist() == [2] * 6 + [1] * 3


def test_lookups_that_wait_for_each_other_get_their_rows() -> None:
    """The second one boards keys between those that the first one is fetching."""
    stops = StopPoints()
    lower = tier_with(LowerTier, np.arange(40), 1)
    table = hierarchy(ArrangingTier(GatedTier(lower, stops), by_partition))
    asked = {
        "first": np.array([12, 3, 8, 21, 3], np.int64),
        "second": np.array([21, 5, 3, 16, 12, 50, 4], np.int64),
    }
    seen: dict[str, Chunk] = {}

    def start(name: str) -> threading.Thread:
        def run() -> None:
            seen[name] = look_up(table, asked[name])

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    stops.arm("lower.fetch")
    first = start("first")
    stops.wait_held("lower.fetch")
    second = start("second")
    stops.wait_held("lower.fetch", 2)
    stops.release("lower.fetch")
    first.join()
    second.join()
    assert seen["second"].joined == 3
    for chunk in seen.values():
        np.testing.assert_array_equal(chunk.found, chunk.keys < 40)
        known = chunk.found
        assert (versions_in(chunk.keys[known], chunk.out[known]) == 1).all()
