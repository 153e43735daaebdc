from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from hps_numba.errors import TierUnavailableError, UpdateError
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.inflight import _REGISTER
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, Keys, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier
from tests.support.gates import StopPoints
from tests.support.wrappers import CountingTier, FailingTier, GatedTier, WrappedTier

SPEC = TableSpec("model", "table", 4, default_value=-1.0)
N_KEYS = 100
ALL = np.arange(N_KEYS, dtype=np.int64)


class Fixture:
    """A host tier that begins empty over a tier with rows of version 1."""

    def __init__(self, mode: FailureMode = FailureMode.RAISE) -> None:
        self.stops = StopPoints()
        self.host, self.lower = HostTier(), LowerTier()
        for tier in (self.host, self.lower):
            tier.open_table(SPEC)
        self.lower.insert(SPEC.tag, ALL, versioned_rows(ALL, 1, SPEC.dim))
        self.failing_host = FailingTier(self.host)
        self.failing = FailingTier(self.lower)
        self.counting = CountingTier(GatedTier(self.failing, self.stops))
        self.queue = BackfillQueue(1 << 20)
        self.table = Hierarchy(
            SPEC,
            [self.failing_host, self.counting],
            backfills=self.queue,
            on_failure=mode,
            write_rows=8,
        )

    def lookup(self, keys: Keys) -> Chunk:
        chunk = Chunk(
            keys,
            np.zeros((keys.size, SPEC.dim), np.float32),
            np.zeros(keys.size, np.bool_),
        )
        self.table.ask_local(chunk)
        self.table.ask_remote(chunk)
        return chunk

    def versions(self, keys: Keys) -> list[int]:
        chunk = self.lookup(keys)
        versions = versions_in(keys, chunk.out)
        return np.where(chunk.found, versions, 0).tolist()

    def in_host(self) -> list[int]:
        return sorted(
            key for block in self.host.iterate(SPEC.tag) for key in block.keys.tolist()
        )


@pytest.fixture
def world() -> Iterator[Fixture]:
    made = Fixture()
    yield made
    assert made.table._in_flight is not None
    assert made.table._in_flight._flights == {}
    assert made.table._in_flight._register.size(_REGISTER.tag) == 0
    made.queue.close()


@pytest.fixture
def degrading() -> Iterator[Fixture]:
    made = Fixture(FailureMode.DEGRADE)
    yield made
    made.queue.close()


def keys_of(*values: int) -> Keys:
    return np.array(values, np.int64)


def test_repeated_keys_are_fetched_once(world: Fixture) -> None:
    keys = keys_of(3, 5, 3, 3, 5)
    assert world.versions(keys) == [1] * 5
    assert world.counting.fetched == {3: 1, 5: 1}
    host, lower = world.table.stats().tiers
    assert (host.asked, host.hits) == (5, 0)  # per occurrence
    assert (lower.asked, lower.hits) == (2, 2)  # per unique key


def test_what_was_fetched_is_backfilled(world: Fixture) -> None:
    world.versions(keys_of(3, 5, 200))
    world.queue.drain()
    assert world.in_host() == [3, 5]
    assert world.versions(keys_of(5, 3)) == [1, 1]
    assert world.counting.calls["fetch"] == 1


def test_keys_of_no_tier_are_not_found_and_not_stored(world: Fixture) -> None:
    chunk = world.lookup(keys_of(1, 1000, -1, 1000))
    assert chunk.found.tolist() == [True, False, False, False]
    assert chunk.resolved == 1
    world.queue.drain()
    assert world.in_host() == [1]


def test_a_key_in_flight_is_waited_for(world: Fixture) -> None:
    world.stops.arm("lower.fetch")
    seen: dict[str, Chunk] = {}

    def look_up(name: str, keys: Keys) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: seen.update({name: world.lookup(keys)})
        )
        thread.start()
        return thread

    first = look_up("first", keys_of(1, 2, 3))
    world.stops.wait_held("lower.fetch")
    second = look_up("second", keys_of(9, 3, 2, 3))
    world.stops.wait_held("lower.fetch", 2)
    world.stops.release("lower.fetch")
    first.join()
    second.join()
    assert world.counting.fetched == {1: 1, 2: 1, 3: 1, 9: 1}
    assert versions_in(keys_of(9, 3, 2, 3), seen["second"].out).tolist() == [1] * 4
    assert seen["first"].joined == 0
    assert seen["second"].joined == 2  # unique keys that it waited for


def test_those_who_wait_for_a_failed_flight_fetch_themselves(world: Fixture) -> None:
    seen, raised = fly_together(world)
    assert [exc.tier for exc in raised] == ["lower"]
    assert [versions_in(chunk.keys, chunk.out).tolist() for chunk in seen] == [[1, 1]]
    assert seen[0].joined == 0


def test_an_update_is_seen_at_once_in_all_tiers(world: Fixture) -> None:
    world.versions(ALL)
    world.queue.drain()
    keys = keys_of(1, 50, 300)
    world.table.update(keys, versioned_rows(keys, 2, SPEC.dim))
    assert world.versions(keys_of(1, 2, 50, 300)) == [2, 1, 2, 2]
    for tier in (world.host, world.lower):
        out, found = np.zeros((3, 4), np.float32), np.zeros(3, np.bool_)
        tier.fetch(SPEC.tag, keys, out, found)
        assert versions_in(keys, out).tolist() == [2, 2, 2]


def test_a_deleted_key_is_gone_from_all_tiers(world: Fixture) -> None:
    world.versions(ALL)
    world.queue.drain()
    world.table.delete(keys_of(1, 99, 300))
    assert world.versions(keys_of(0, 1, 99)) == [1, 0, 0]
    assert world.host.size(SPEC.tag) == world.lower.size(SPEC.tag) == N_KEYS - 2


def test_an_update_of_many_rows_goes_in_parts(world: Fixture) -> None:
    world.table.update(ALL[:20], versioned_rows(ALL[:20], 2, SPEC.dim))
    assert world.counting.calls["insert"] == 3  # of eight rows
    assert world.versions(ALL[:24]) == [2] * 20 + [1] * 4


def test_an_update_that_fails_tells_how_far_it_came(world: Fixture) -> None:
    class FailsThird(WrappedTier):
        calls = 0

        def before(self, operation: str) -> None:
            if operation == "insert":
                self.calls += 1
                if self.calls == 3:
                    raise TierUnavailableError("planted", tier=self.name)

    table = Hierarchy(
        SPEC,
        [world.host, FailsThird(world.lower)],
        backfills=world.queue,
        on_failure=FailureMode.RAISE,
        write_rows=8,
    )
    with pytest.raises(UpdateError, match=r"16 of 30 keys") as caught:
        table.update(ALL[:30], versioned_rows(ALL[:30], 2, SPEC.dim))
    assert SPEC.tag in str(caught.value)
    assert isinstance(caught.value.__cause__, TierUnavailableError)
    assert world.versions(ALL[:30]) == [2] * 16 + [1] * 14
    assert table.stats().updated_rows == 0
    # It can be sent again.
    table.update(ALL[:30], versioned_rows(ALL[:30], 3, SPEC.dim))
    assert world.versions(ALL[:30]) == [3] * 30


def test_rows_that_are_not_finite_are_stored_and_counted(world: Fixture) -> None:
    rows = np.ones((3, SPEC.dim), np.float32)
    rows[1, 2], rows[2, 0] = np.nan, np.inf
    world.table.update(keys_of(1, 2, 3), rows)
    assert np.array_equal(world.lookup(keys_of(1, 2, 3)).out, rows, equal_nan=True)
    stats = world.table.stats()
    assert (stats.updated_rows, stats.non_finite_rows) == (3, 2)


def test_a_failing_tier_fails_the_lookup(world: Fixture) -> None:
    world.versions(keys_of(1))
    world.queue.drain()
    world.failing.fail("fetch")
    assert world.versions(keys_of(1)) == [1]  # host memory has it
    with pytest.raises(TierUnavailableError, match="lower") as caught:
        world.lookup(keys_of(1, 2))
    assert caught.value.tier == "lower"
    world.failing.heal()
    assert world.versions(keys_of(1, 2)) == [1, 1]


def test_a_failing_first_tier_fails_the_lookup(world: Fixture) -> None:
    world.failing_host.fail("fetch", times=1)
    with pytest.raises(TierUnavailableError, match="host"):
        world.lookup(keys_of(1))
    assert world.versions(keys_of(1)) == [1]


def test_a_lookup_may_be_served_from_what_is_left(degrading: Fixture) -> None:
    degrading.versions(keys_of(1, 2))
    degrading.queue.drain()
    degrading.failing.fail("fetch")
    chunk = degrading.lookup(keys_of(1, 2, 3))
    assert chunk.found.tolist() == [True, True, False]
    assert chunk.degraded
    degrading.failing.heal()
    chunk = degrading.lookup(keys_of(1, 2, 3))
    assert chunk.found.all()
    assert not chunk.degraded


def test_a_failing_first_tier_leaves_the_others(degrading: Fixture) -> None:
    degrading.versions(keys_of(1, 2))
    degrading.queue.drain()
    degrading.failing_host.fail("fetch")
    chunk = degrading.lookup(keys_of(1, 2, 3))
    assert chunk.found.all()
    assert chunk.resolved == 3
    assert chunk.degraded


def test_those_who_wait_for_a_degraded_flight_are_degraded(degrading: Fixture) -> None:
    seen, raised = fly_together(degrading)
    assert raised == []
    by_first_key = {int(chunk.keys[0]): chunk for chunk in seen}
    assert by_first_key[1].found.tolist() == [False, False]
    assert by_first_key[2].found.tolist() == [False, True]
    assert [chunk.degraded for chunk in seen] == [True, True]


def fly_together(world: Fixture) -> tuple[list[Chunk], list[TierUnavailableError]]:
    """Look up 1 and 2, which fails, and meanwhile 2 and 7."""
    world.failing.fail("fetch", times=1)
    world.stops.arm("lower.fetch")
    seen: list[Chunk] = []
    raised: list[TierUnavailableError] = []

    def look_up(*keys: int) -> None:
        try:
            seen.append(world.lookup(keys_of(*keys)))
        except TierUnavailableError as exc:
            raised.append(exc)

    first = threading.Thread(target=look_up, args=(1, 2))
    second = threading.Thread(target=look_up, args=(2, 7))
    first.start()
    world.stops.wait_held("lower.fetch")
    second.start()
    world.stops.wait_held("lower.fetch", 2)
    world.stops.release_first("lower.fetch")
    world.failing.wait_failed("fetch")
    world.stops.release("lower.fetch")
    first.join()
    second.join()
    return seen, raised


def test_refresh_reads_what_changed_beneath(world: Fixture) -> None:
    world.versions(ALL)
    world.queue.drain()
    world.lower.insert(SPEC.tag, ALL[:10], versioned_rows(ALL[:10], 2, SPEC.dim))
    assert world.versions(ALL[:12]) == [1] * 12
    assert world.table.refresh(block_rows=7) == N_KEYS
    assert world.versions(ALL[:12]) == [2] * 10 + [1] * 2


def test_refresh_forgets_what_is_gone_beneath(world: Fixture) -> None:
    world.versions(ALL)
    world.queue.drain()
    world.lower.delete(SPEC.tag, ALL[:10])
    assert world.table.refresh(block_rows=7) == N_KEYS - 10
    assert world.versions(ALL[:12]) == [0] * 10 + [1] * 2


def test_refresh_adds_nothing_to_upper_tiers(world: Fixture) -> None:
    world.versions(keys_of(4, 8))
    world.queue.drain()
    assert world.table.refresh(block_rows=7) == 2
    assert world.in_host() == [4, 8]


def test_keys_are_located_in_the_first_tier_that_has_them(world: Fixture) -> None:
    world.versions(keys_of(4, 8))
    world.queue.drain()
    assert world.table.locate(keys_of(8, 5, 4, 1000)) == [
        "host",
        "lower",
        "host",
        "default",
    ]


def test_replacing_all_rows_refuses_what_was_read_before(world: Fixture) -> None:
    world.stops.arm("lower.fetch.done")
    looking = threading.Thread(target=world.lookup, args=(keys_of(1),))
    looking.start()
    world.stops.wait_held("lower.fetch.done")
    with world.table.replacing():
        world.lower.insert(SPEC.tag, ALL, versioned_rows(ALL, 2, SPEC.dim))
        world.table.forget_flights()
    world.stops.release("lower.fetch.done")
    looking.join()
    world.queue.drain()
    assert world.in_host() == []
    assert world.queue.stats().refused_rows == 1
    assert world.versions(keys_of(1)) == [2]
