"""Slots that move from server to server while they are read and written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import (
    TierCorruptionError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, Mask, RowBlock, Rows
from tests.support.redis_cluster import RedisCluster, SlotMove
from tests.support.redis_servers import RedisServer, wait_for
from tests.tiers.redis.stored import partition_of
from tests.tiers.redis.versions import SPEC, Ledger, rows_at, versions_of

pytestmark = pytest.mark.service

TAG = SPEC.tag
N_PARTITIONS = 6
STRINGS, HASHES = RedisLayout.STRINGS, RedisLayout.HASHES
KEYS = np.arange(1200, dtype=np.int64) * 77 - 9000
PARTITIONS = np.array([partition_of(key, N_PARTITIONS) for key in KEYS.tolist()])
MOVING = 3  # the partition that is moved
MINE = KEYS[PARTITIONS == MOVING]
PREFIX = f"hps_et{{{TAG}/p{MOVING}}}".encode()


@contextmanager
def opened(
    cluster: RedisCluster, layout: RedisLayout, options: RedisOptions | None = None
) -> Iterator[RedisTier]:
    options = options or RedisOptions(cluster.address, timeout_s=5.0)
    tier = RedisTier(options, num_partitions=N_PARTITIONS, layout=layout)
    try:
        tier.open_table(SPEC)
        yield tier
    finally:
        tier.close()


@pytest.fixture(params=list(RedisLayout))
def layout(request: pytest.FixtureRequest) -> RedisLayout:
    found: RedisLayout = request.param
    return found


@pytest.fixture
def tier(cluster: RedisCluster, layout: RedisLayout) -> Iterator[RedisTier]:
    with opened(cluster, layout) as found:
        found.insert(TAG, KEYS, rows_at(KEYS, 1))
        yield found


@pytest.fixture
def other(
    cluster: RedisCluster, layout: RedisLayout, tier: RedisTier
) -> Iterator[RedisTier]:
    """Another process, which has seen nothing of what ``tier`` writes."""
    with opened(cluster, layout) as found:
        yield found


@pytest.fixture
def move(cluster: RedisCluster, tier: RedisTier) -> SlotMove:
    """The slot of `MINE`, on its way; nothing of it has moved yet."""
    slot = tier._tables[TAG].slots[MOVING]
    return cluster.begin_move(slot, elsewhere(cluster, cluster.owner(slot)))


def elsewhere(cluster: RedisCluster, node: RedisServer) -> RedisServer:
    return next(other for other in cluster.masters if other is not node)


def finish(move: SlotMove) -> None:
    while move.migrate_keys(100):
        pass
    move.end()


def fetch(tier: RedisTier, keys: Keys = KEYS) -> tuple[Rows, Mask]:
    rows = np.empty((keys.size, SPEC.dim), np.float32)
    found = np.zeros(keys.size, np.bool_)
    tier.fetch(TAG, keys, rows, found)
    return rows, found


def assert_version(tier: RedisTier, version: int, keys: Keys = KEYS) -> None:
    rows, found = fetch(tier, keys)
    assert found.all()
    assert (versions_of(keys, rows) == version).all()


def assert_none(tier: RedisTier, keys: Keys) -> None:
    assert not fetch(tier, keys)[1].any()


def half_move(move: SlotMove, layout: RedisLayout, parts: str) -> None:
    """Move the stamps (``s``) and all or half of the rows (``v``), or one of them."""
    if "s" in parts:
        move.migrate(PREFIX + b"s")
    if "v" in parts and layout is HASHES:
        move.migrate(PREFIX + b"v")
    elif "v" in parts:
        move.migrate(*(PREFIX + key.tobytes() for key in MINE[::2]))


def let_lease_pass(cluster: RedisCluster) -> None:
    """Let backfills be stored again, as if the lease of a move had come to its end."""
    with cluster.client() as client:
        client.hdel((PREFIX + b"s").decode(), "moving")


STAGES = pytest.mark.parametrize("parts", ["", "s", "v", "sv"])


@STAGES
def test_rows_of_a_slot_that_moves_are_all_found(
    tier: RedisTier, move: SlotMove, layout: RedisLayout, parts: str
) -> None:
    half_move(move, layout, parts)
    absent = MINE + 1
    for _ in range(3):
        assert_version(tier, 1)
        assert_none(tier, absent)
    move.migrate_keys(20)
    assert_version(tier, 1)
    finish(move)
    assert_version(tier, 1)
    assert_none(tier, absent)
    assert tier._health.failures == 0


@STAGES
def test_rows_that_are_written_to_a_slot_that_moves_arrive(
    tier: RedisTier, other: RedisTier, move: SlotMove, layout: RedisLayout, parts: str
) -> None:
    half_move(move, layout, parts)
    new = MINE + 1
    for version in (2, 3):
        tier.insert(TAG, KEYS, rows_at(KEYS, version))
        tier.insert(TAG, new, rows_at(new, version))
        for reader in (tier, other):
            assert_version(reader, version)
            assert_version(reader, version, new)
    finish(move)
    for reader in (tier, other):
        assert_version(reader, 3)
        assert_version(reader, 3, new)
    other.insert(TAG, KEYS, rows_at(KEYS, 4))
    assert_version(tier, 4)


@STAGES
def test_keys_that_are_deleted_from_a_slot_that_moves_stay_away(
    tier: RedisTier, other: RedisTier, move: SlotMove, layout: RedisLayout, parts: str
) -> None:
    epoch = other.epoch(TAG)
    half_move(move, layout, parts)
    gone, rest = MINE[:100], MINE[100:]
    assert tier.delete(TAG, gone) == gone.size
    assert tier.delete(TAG, gone) == 0
    for reader in (tier, other):
        assert_none(reader, gone)
        assert_version(reader, 1, rest)
    assert other.backfill(TAG, gone, rows_at(gone, 1), epoch) == 0
    finish(move)
    assert other.backfill(TAG, gone, rows_at(gone, 1), epoch) == 0
    assert_none(other, gone)
    assert_version(other, 1, rest)


@STAGES
def test_evicted_rows_of_a_slot_that_moves_are_gone_until_they_are_backfilled(
    cluster: RedisCluster,
    tier: RedisTier,
    move: SlotMove,
    layout: RedisLayout,
    parts: str,
) -> None:
    half_move(move, layout, parts)
    assert tier.evict(TAG, MINE) == MINE.size
    assert_none(tier, MINE)
    finish(move)
    assert_none(tier, MINE)
    rows = rows_at(MINE, 1)
    let_lease_pass(cluster)
    tier.backfill(TAG, MINE, rows, tier.epoch(TAG))  # if refused, it learns why
    assert tier.backfill(TAG, MINE, rows, tier.epoch(TAG)) == MINE.size
    assert_version(tier, 1)


@STAGES
def test_a_backfill_never_undoes_what_another_process_wrote_to_a_slot_that_moves(
    cluster: RedisCluster,
    tier: RedisTier,
    other: RedisTier,
    move: SlotMove,
    layout: RedisLayout,
    parts: str,
) -> None:
    epoch = other.epoch(TAG)  # before a lower tier is read, and before the update
    half_move(move, layout, parts)
    tier.insert(TAG, MINE, rows_at(MINE, 2))
    tier.evict(TAG, MINE[:50])
    assert other.backfill(TAG, MINE, rows_at(MINE, 1), epoch) == 0
    assert_none(other, MINE[:50])
    assert_version(other, 2, MINE[50:])
    finish(move)
    assert other.backfill(TAG, MINE, rows_at(MINE, 1), epoch) == 0
    assert_none(other, MINE[:50])
    assert_version(other, 2, MINE[50:])
    let_lease_pass(cluster)
    assert other.backfill(TAG, MINE, rows_at(MINE, 1), epoch) == 0
    rows = rows_at(MINE, 2)
    other.insert(TAG, MINE[:1], rows[:1])  # whose reply has the newest number
    assert other.backfill(TAG, MINE, rows, other.epoch(TAG)) == MINE.size
    assert_version(other, 2, MINE)


def test_an_update_during_a_move_refuses_backfills_read_before_it_ended(
    tier: RedisTier, move: SlotMove, layout: RedisLayout
) -> None:
    """Also by the process that writes, and even those whose rows have not moved."""
    epoch = tier.epoch(TAG)
    half_move(move, layout, "s")
    tier.insert(TAG, MINE, rows_at(MINE, 2))
    assert tier.backfill(TAG, MINE, rows_at(MINE, 1), epoch) == 0
    finish(move)
    assert tier.backfill(TAG, MINE, rows_at(MINE, 1), epoch) == 0
    assert_version(tier, 2, MINE)


def test_a_value_of_another_width_in_a_slot_that_moves_is_reported(
    cluster: RedisCluster, tier: RedisTier, move: SlotMove, layout: RedisLayout
) -> None:
    half_move(move, layout, "v")
    broken = MINE[0].tobytes()
    with cluster.client() as client:
        if layout is HASHES:
            client.hset((PREFIX + b"v").decode(), broken, b"short")
        else:
            client.set(PREFIX + broken, b"short")
    found = np.zeros(KEYS.size, np.bool_)
    rows = np.empty((KEYS.size, SPEC.dim), np.float32)
    with pytest.raises(TierCorruptionError, match=f"key {MINE[0]} has 5 bytes"):
        tier.fetch(TAG, KEYS, rows, found)
    np.testing.assert_array_equal(found, ~np.isin(KEYS, MINE[:1]))
    assert (versions_of(KEYS[found], rows[found]) == 1).all()
    finish(move)


def test_a_load_while_its_slots_move_replaces_all_rows(
    cluster: RedisCluster, tier: RedisTier, move: SlotMove, layout: RedisLayout
) -> None:
    half_move(move, layout, "v")
    keep = KEYS[::2].copy()

    def blocks() -> Iterator[RowBlock]:
        yield RowBlock(keep[:300], rows_at(keep[:300], 5))
        finish(move)
        yield RowBlock(keep[300:], rows_at(keep[300:], 5))

    assert tier.load(TAG, blocks()) == keep.size
    assert_version(tier, 5, keep)
    assert_none(tier, np.setdiff1d(KEYS, keep))


class Database:
    """What lies below Redis: the newest version of each key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions = np.zeros(KEYS.size, np.int64)

    def write(self, which: NDArray[np.int64], version: int) -> None:
        with self._lock:
            self._versions[which] = version

    def read(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        with self._lock:
            return self._versions[which].copy()


class Stress:
    """A writer, an evictor and readers that backfill, each a process of its own."""

    def __init__(self, tiers: list[RedisTier], delete_every: int) -> None:
        self.ledger = Ledger(KEYS, delete_every)
        self._writer, self._evictor, *self.readers = tiers
        self._database = Database()
        self._stop = threading.Event()
        self.n_backfilled = 0

    def write(self) -> None:
        generator = np.random.default_rng(11)
        version = 1
        while not self._stop.is_set():
            version += 1
            which = generator.choice(KEYS.size, 150, replace=False)
            keys = KEYS[which]
            self.ledger.begin(which, version)
            with self._writer.hold(TAG, keys):
                self._database.write(which, version)
                if self.ledger.deletes(version):
                    self._writer.delete(TAG, keys)
                else:
                    self._writer.insert(TAG, keys, rows_at(keys, version))
            self.ledger.acknowledge(which, version)

    def evict(self) -> None:
        generator = np.random.default_rng(12)
        while not self._stop.is_set():
            self._evictor.evict(TAG, generator.choice(KEYS, 100, replace=False))

    def read(self, number: int) -> None:
        generator = np.random.default_rng(number)
        tier = self.readers[number]
        while not self._stop.is_set():
            which = generator.permutation(KEYS.size)[:600]
            keys, floor = KEYS[which], self.ledger.floor(which)
            epoch = tier.epoch(TAG)
            rows, found = fetch(tier, keys)
            missing = np.flatnonzero(~found)
            versions = self._database.read(which[missing])
            known = ~self.ledger.deletes(versions)
            rows[missing] = rows_at(keys[missing], versions)
            found[missing] = known
            self.ledger.check(which, floor, rows, found)
            given = missing[known]
            self.n_backfilled += tier.backfill(TAG, keys[given], rows[given], epoch)
            if generator.random() < 0.2:  # as a process that writes a little, too
                tier.evict(TAG, keys[:1])

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(2 + len(self.readers)) as pool:
            jobs = [pool.submit(self.write), pool.submit(self.evict)]
            jobs += [pool.submit(self.read, i) for i in range(len(self.readers))]
            try:
                yield
            finally:
                self._stop.set()
            for job in jobs:
                job.result()


@pytest.mark.fault
def test_slots_that_move_back_and_forth_under_load_lose_nothing(
    cluster: RedisCluster, tier: RedisTier, layout: RedisLayout
) -> None:
    """No lookup returns a row older than one that was acknowledged before it began."""
    with (
        opened(cluster, layout) as evictor,
        opened(cluster, layout) as first,
        opened(cluster, layout) as second,
    ):
        stress = Stress([tier, evictor, first, second], delete_every=5)
        every = np.arange(KEYS.size)
        stress.ledger.begin(every, 1)
        stress._database.write(every, 1)
        stress.ledger.acknowledge(every, 1)
        generator = np.random.default_rng(3)
        slots = sorted(set(tier._tables[TAG].slots))
        with stress.running():
            wait_for(lambda: stress.ledger.n_checked > 2000)
            for _ in range(4):
                some = generator.choice(slots, 3, replace=False).tolist()
                moves = [
                    cluster.begin_move(slot, elsewhere(cluster, cluster.owner(slot)))
                    for slot in some
                ]
                left: Any = True
                while left:
                    left = sum(move.migrate_keys(25) for move in moves)
                for move in moves:
                    checked = stress.ledger.n_checked
                    wait_for(lambda n=checked: stress.ledger.n_checked > n + 600)
                    move.end()
            wait_for(lambda: stress.n_backfilled > 1000)
        for reader in (tier, evictor, first, second):
            assert reader._health.failures == 0
    cluster.wait_until_stable()


@pytest.mark.fault
def test_a_paused_server_that_a_slot_moves_to_costs_one_time_out(
    cluster: RedisCluster, tier: RedisTier, move: SlotMove, layout: RedisLayout
) -> None:
    half_move(move, layout, "v")
    theirs = np.isin(PARTITIONS, of_server(cluster, tier, move.to))
    options = RedisOptions(cluster.address, timeout_s=0.3)
    with opened(cluster, layout, options) as brief:
        errors = []
        move.to.pause()
        try:
            for _ in range(20):
                rows = np.empty((KEYS.size, SPEC.dim), np.float32)
                found = np.zeros(KEYS.size, np.bool_)
                with pytest.raises(TierError) as caught:
                    brief.fetch(TAG, KEYS, rows, found)
                errors.append(caught.value)
                np.testing.assert_array_equal(found, ~theirs & (PARTITIONS != MOVING))
                assert (versions_of(KEYS[found], rows[found]) == 1).all()
        finally:
            move.to.resume()
        assert isinstance(errors[0], TierTimeoutError)
        assert all(isinstance(error, TierUnavailableError) for error in errors[1:])
        assert brief._health.failures == 1
        wait_for(lambda: not brief.down())
        assert_version(brief, 1)
    finish(move)
    cluster.wait_until_stable()


def of_server(cluster: RedisCluster, tier: RedisTier, node: RedisServer) -> list[int]:
    """Return the partitions that a server has."""
    slots = set(cluster.slots(node))
    return [p for p, slot in enumerate(tier._tables[TAG].slots) if slot in slots]


@pytest.fixture
def newcomer(cluster: RedisCluster) -> Iterator[RedisServer]:
    """A master without slots, which no list of slots names."""
    with cluster.joined() as server:
        yield server


def test_a_slot_moves_to_a_server_that_nobody_knew(
    cluster: RedisCluster,
    tier: RedisTier,
    other: RedisTier,
    newcomer: RedisServer,
    layout: RedisLayout,
) -> None:
    slot = tier._tables[TAG].slots[MOVING]
    source = cluster.owner(slot)
    move = cluster.begin_move(slot, newcomer)
    new = MINE + 1
    for version, parts in enumerate(["", "s", "v"], start=1):
        half_move(move, layout, parts)
        assert_version(tier, version)
        assert_none(tier, new)
        other.insert(TAG, KEYS, rows_at(KEYS, version + 1))
        tier.insert(TAG, new, rows_at(new, version + 1))
        for reader in (tier, other):
            assert_version(reader, version + 1)
            assert_version(reader, version + 1, new)
        assert tier.delete(TAG, new) == new.size
    finish(move)
    for reader in (tier, other):
        assert_version(reader, 4)
        assert_none(reader, new)
    cluster.move_slot(slot, source)
    for reader in (tier, other):
        assert_version(reader, 4)
    assert tier._health.failures == 0
