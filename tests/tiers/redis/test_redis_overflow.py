"""Partitions in Redis give up rows above their margin, in both layouts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
import redis

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis import evicting, table
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import OverflowPolicy, RowBlock, TableSpec
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.stored import partition_of

SPEC = TableSpec("model", "table", dim=4)
TAG = SPEC.tag
LAYOUTS = list(RedisLayout)
POLICIES = list(OverflowPolicy)
LEAST_USED = OverflowPolicy.EVICT_LEAST_USED
OLDEST = OverflowPolicy.EVICT_OLDEST
RANDOM = OverflowPolicy.EVICT_RANDOM
NO_KEYS: set[int] = set()


@contextmanager
def one_table(
    where: RedisServer | RedisCluster,
    layout: RedisLayout,
    overflow: Overflow,
    *,
    num_partitions: int = 1,
) -> Iterator[RedisTier]:
    options = RedisOptions(where.address, timeout_s=5.0)
    tier = RedisTier(
        options, num_partitions=num_partitions, layout=layout, overflow=overflow
    )
    with closing(tier):
        tier.open_table(SPEC)
        yield tier


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that is noted of rows, in its only element."""
    value = [1_000_000.0]
    monkeypatch.setattr(table, "time", lambda: value[0])
    monkeypatch.setattr(evicting, "time", lambda: value[0])
    return value


def rows_of(keys) -> np.ndarray:
    return np.add.outer(np.asarray(keys), [0, 0.25, 0.5, 0.75]).astype(np.float32)


def insert(tier: RedisTier, keys) -> None:
    keys = np.asarray(keys, np.int64)
    tier.insert(TAG, keys, rows_of(keys))


def use(tier: RedisTier, keys, times: int = 1) -> None:
    """Look keys up, all of which are there."""
    keys = np.asarray(keys, np.int64)
    for _ in range(times):
        out, found = np.empty((keys.size, 4), np.float32), np.zeros(keys.size, np.bool_)
        assert tier.fetch(TAG, keys, out, found) == keys.size
        np.testing.assert_array_equal(out, rows_of(keys))
    tier.drain()


def keys_in(tier: RedisTier) -> set[int]:
    """Return the keys; their rows are right."""
    found: list[int] = []
    for block in tier.iterate(TAG):
        np.testing.assert_array_equal(block.rows, rows_of(block.keys))
        found += block.keys.tolist()
    assert len(found) == len(set(found))
    return set(found)


def sizes(tier: RedisTier, num_partitions: int) -> list[int]:
    counts = Counter(partition_of(key, num_partitions) for key in keys_in(tier))
    return [counts[p] for p in range(num_partitions)]


def raw(key: int) -> bytes:
    return key.to_bytes(8, "little", signed=True)


def prefix(partition: int = 0) -> bytes:
    return b"hps_et{%s/p%d}" % (TAG.encode(), partition)


def uses_in(client: redis.Redis, partition: int = 0) -> dict[int, bytes]:
    """Return what is noted of each key."""
    noted = client.hgetall(prefix(partition) + b"t")
    return {int.from_bytes(k, "little", signed=True): v for k, v in noted.items()}


def write_beneath(
    client: redis.Redis,
    layout: RedisLayout,
    keys: range | np.ndarray,
    uses: list[bytes] | None,
) -> None:
    """Write rows of partition 0, and what is noted of them, as another program does."""
    pipe = client.pipeline(transaction=False)
    for i, key in enumerate(np.asarray(keys).tolist()):
        if layout is RedisLayout.HASHES:
            pipe.hset(prefix() + b"v", raw(key), rows_of([key]).tobytes())
        else:
            pipe.set(prefix() + raw(key), rows_of([key]).tobytes())
        if uses is not None:
            pipe.hset(prefix() + b"t", raw(key), uses[i])
    pipe.execute()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_insert_leaves_a_partition_above_its_margin(server, layout, policy):
    rng = np.random.default_rng(1)
    overflow = Overflow(policy, margin=50, target=0.8)
    with one_table(server, layout, overflow, num_partitions=3) as tier:
        inserted = 0
        for _ in range(15):
            insert(tier, inserted + rng.permutation(60))
            inserted += 60
            some = rng.permutation(sorted(keys_in(tier)))[:40]
            out, found = np.empty((some.size, 4), np.float32), np.zeros(some.size, "?")
            tier.fetch(TAG, some, out, found)
            assert max(sizes(tier, 3)) <= 50
        tier.drain()
        left = keys_in(tier)
        assert min(sizes(tier, 3)) >= 40
        assert tier.stats(TAG).evictions == inserted - len(left)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("margin", "target", "goal"),
    [(100, 0.55, 55), (7, 0.9, 6), (10, 1.0, 10), (1, 0.8, 1)],
)
def test_a_partition_above_its_margin_falls_to_the_target(
    server, layout, policy, margin, target, goal
):
    with one_table(server, layout, Overflow(policy, margin, target)) as tier:
        insert(tier, range(margin))
        tier.drain()
        assert tier.size(TAG) == margin
        insert(tier, range(-3, 0))
        tier.drain()
        assert len(keys_in(tier)) == goal
        assert tier.stats(TAG).evictions == margin + 3 - goal


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_not_used_for_longest_go(server, layout, now_s):
    with one_table(server, layout, Overflow(OLDEST, 100, 0.5)) as tier:
        for low in (0, 25, 50, 75):
            insert(tier, range(low, low + 25))
            now_s[0] += 1
        use(tier, range(25))
        now_s[0] += 1
        insert(tier, range(25, 30))  # written again: as good as used
        now_s[0] += 1
        insert(tier, [200])
        tier.drain()
        # All that came before 75, but what was used since, and one that came with it.
        left = keys_in(tier)
        assert left >= {*range(25), *range(25, 30), 200}
        assert left <= {*range(25), *range(25, 30), *range(75, 100), 200}
        assert len(left) == 50


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_used_least_go(server, layout):
    with one_table(server, layout, Overflow(LEAST_USED, 100, 0.5)) as tier:
        insert(tier, range(100))
        use(tier, range(20), times=3)
        use(tier, range(20, 45), times=2)
        use(tier, range(45, 60))
        insert(tier, [200])
        tier.drain()
        left = keys_in(tier)
        assert left >= set(range(45))
        assert left <= set(range(60))
        assert len(left) == 50


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_rows_go_whatever_their_age_and_use(server, layout):
    with one_table(server, layout, Overflow(RANDOM, 1_000, 0.5)) as tier:
        insert(tier, range(500))
        insert(tier, range(500, 1_000))
        use(tier, range(0, 1_000, 2), times=3)
        insert(tier, [5_000])
        tier.drain()
        left = np.array(sorted(keys_in(tier)))
        assert left.size == 500
        for share in (np.mean(left < 500), np.mean(left % 2 == 0)):
            assert 0.4 < share < 0.6  # 0.5 with a deviation of 0.016


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", [LEAST_USED, OLDEST])
def test_of_a_large_partition_most_of_the_right_rows_stay(server, layout, policy):
    n = 10_000
    ranks = np.random.default_rng(2).permutation(n)
    if policy is LEAST_USED:
        uses = [b"%d" % (rank + 1) for rank in ranks]
    else:
        uses = [raw(1_700_000_000 + int(rank)) for rank in ranks]
    with (
        server.client() as client,
        one_table(server, layout, Overflow(policy, n - 1, 0.5)) as tier,
    ):
        write_beneath(client, layout, range(n), uses)
        insert(tier, [0])
        tier.drain()
        left = np.array(sorted(keys_in(tier)))
        assert left.size == (n - 1) // 2
        best = np.flatnonzero(ranks >= n // 2)
        # Victims are the worst eighth of each sample: 0.984 to 0.997 were measured.
        assert np.isin(best, left).mean() >= 0.97
        # Samples reach every row more than once.
        assert np.isin(np.flatnonzero(ranks < n // 5), left).mean() <= 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_written_again_keeps_the_number_of_its_uses(server, layout):
    overflow = Overflow(LEAST_USED, 1_000, 0.8)
    with server.client() as client, one_table(server, layout, overflow) as tier:
        insert(tier, range(3))
        use(tier, [0, 1], times=4)
        use(tier, [1])
        insert(tier, range(4))
        keys = np.array([1, 5])
        assert tier.backfill(TAG, keys, rows_of(keys), tier.epoch(TAG)) == 2
        assert uses_in(client) == {0: b"4", 1: b"5", 2: b"0", 3: b"0", 5: b"0"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_old_fame_fades_by_half_with_each_eviction(server, layout):
    overflow = Overflow(LEAST_USED, 2_000, 0.9)
    with server.client() as client, one_table(server, layout, overflow) as tier:
        write_beneath(client, layout, range(2_000), [b"%d" % k for k in range(2_000)])
        insert(tier, [-1])
        tier.drain()
        noted = uses_in(client)
        assert set(noted) == keys_in(tier) == set(range(200, 2_000))
        assert noted == {key: b"%d" % (key // 2) for key in range(200, 2_000)}


def test_uses_of_one_batch_are_counted_one_by_one(server):
    overflow = Overflow(LEAST_USED, 10_000, 0.9)
    with (
        server.client() as client,
        one_table(server, RedisLayout.HASHES, overflow, num_partitions=2) as tier,
    ):
        insert(tier, range(3_000))
        for low in (0, 1_000, 2_000):
            use(tier, range(low, 3_000))
        noted = uses_in(client, 0) | uses_in(client, 1)
        assert noted == {key: b"%d" % (key // 1_000 + 1) for key in range(3_000)}


@pytest.mark.parametrize("policy", POLICIES)
def test_fields_that_hugectr_noted_nothing_of_go_first(server, policy):
    overflow = Overflow(policy, 100, 0.8)
    with (
        server.client() as client,
        one_table(server, RedisLayout.HASHES, overflow) as tier,
    ):
        insert(tier, range(60))
        write_beneath(client, RedisLayout.HASHES, range(100, 400), None)
        insert(tier, [0])
        tier.drain()
        left = keys_in(tier)
        assert len(left) == 80
        if policy is not RANDOM:
            assert left >= set(range(60))
            assert set(uses_in(client)) == set(range(60))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_hash_without_notes_falls_to_the_target(server, policy):
    overflow = Overflow(policy, 4_000, 0.25)
    with (
        server.client() as client,
        one_table(server, RedisLayout.HASHES, overflow) as tier,
    ):
        write_beneath(client, RedisLayout.HASHES, range(100, 6_100), None)
        insert(tier, range(50))
        tier.drain()
        left = keys_in(tier)
        assert len(left) == 1_000
        if policy is not RANDOM:
            assert left >= set(range(50))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", [LEAST_USED, OLDEST])
def test_a_row_that_nothing_is_noted_of_is_noted_once_it_is_used(
    server, layout, policy, now_s
):
    overflow = Overflow(policy, 100, 0.8)
    with server.client() as client, one_table(server, layout, overflow) as tier:
        write_beneath(client, layout, range(5), None)
        use(tier, [1, 3])
        noted = b"1" if policy is LEAST_USED else raw(1_000_000)
        assert uses_in(client) == {1: noted, 3: noted}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_gone_is_not_noted_as_used(server, layout):
    overflow = Overflow(LEAST_USED, 100, 0.8)
    with server.client() as client, one_table(server, layout, overflow) as tier:
        insert(tier, range(5))
        evictor = tier._overflowing._evictor  # as late as the background may be
        tier.evict(TAG, np.array([2]))
        keys = np.arange(5)
        assert evictor.note(tier._table(TAG), keys, np.ones(5, np.int64)) == 0
        assert set(uses_in(client)) == {0, 1, 3, 4}


def test_what_is_noted_of_rows_that_are_gone_is_removed(server):
    overflow = Overflow(LEAST_USED, 100, 0.8)
    with (
        server.client() as client,
        one_table(server, RedisLayout.HASHES, overflow) as tier,
    ):
        insert(tier, range(100))
        client.hset(prefix() + b"t", mapping={raw(k): b"9" for k in range(500, 650)})
        insert(tier, [200])
        tier.drain()
        assert set(uses_in(client)) == keys_in(tier)
        assert len(keys_in(tier)) == 80


@pytest.mark.parametrize("layout", LAYOUTS)
def test_notes_of_another_policy_count_as_none(server, layout, now_s):
    with one_table(server, layout, Overflow(OLDEST, 100, 0.8)) as tier:
        insert(tier, range(40))
    with (
        server.client() as client,
        one_table(server, layout, Overflow(LEAST_USED, 100, 0.5)) as tier,
    ):
        insert(tier, range(40, 80))
        use(tier, range(40, 80), times=2)
        use(tier, range(10))
        assert {uses_in(client)[key] for key in range(10)} == {b"1"}
        insert(tier, range(80, 101))
        tier.drain()
        assert keys_in(tier) == {*range(10), *range(40, 80)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_load_larger_than_the_margin_leaves_what_has_room(server, layout, policy):
    overflow = Overflow(policy, 300, 0.8)
    with one_table(server, layout, overflow, num_partitions=2) as tier:
        insert(tier, range(-50, 0))
        blocks = [
            RowBlock(keys, rows_of(keys)) for keys in np.arange(6_000).reshape(4, 1_500)
        ]
        assert tier.load(TAG, blocks) == 6_000
        assert max(sizes(tier, 2)) <= 300
        tier.drain()
        # The rows of before took room until the end.
        assert min(sizes(tier, 2)) >= 240 - 50
        assert not keys_in(tier) & set(range(-50, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_backfills_are_checked_like_inserts(server, layout, policy):
    with one_table(server, layout, Overflow(policy, 100, 0.8)) as tier:
        token = tier.epoch(TAG)
        for low in range(0, 400, 50):
            keys = np.arange(low, low + 50)
            assert tier.backfill(TAG, keys, rows_of(keys), token) == 50
            assert len(keys_in(tier)) <= 100
        tier.drain()
        assert 80 <= len(keys_in(tier)) <= 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evicted_row_is_not_brought_back_older_than_its_update(server, layout):
    overflow = Overflow(LEAST_USED, 10, 0.1)
    with ExitStack() as stack:
        ours, other = (
            stack.enter_context(one_table(server, layout, overflow)) for _ in range(2)
        )
        insert(ours, [0])
        token = ours.epoch(TAG)  # a lookup begins, and reads the row below
        insert(other, range(11))
        other.drain()
        left = keys_in(ours)
        assert len(left) == 1
        keys = np.arange(11)
        assert ours.backfill(TAG, keys, rows_of(keys) - 1, token) == 0
        assert keys_in(ours) == left
        assert ours.backfill(TAG, keys, rows_of(keys), ours.epoch(TAG)) == 11


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_stays_noted_of_rows_that_were_deleted(server, layout, policy):
    overflow = Overflow(policy, 100, 0.8)
    with server.client() as client, one_table(server, layout, overflow) as tier:
        insert(tier, range(30))
        noted = set(uses_in(client))
        assert noted == (set(range(30)) if tier._table(TAG).use() else NO_KEYS)
        assert tier.delete(TAG, np.arange(10)) == 10
        assert tier.evict(TAG, np.arange(10, 20)) == 10
        assert set(uses_in(client)) == noted - set(range(20))
        tier.evict(TAG)
        assert not client.exists(prefix() + b"t")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_margin_nothing_is_noted_and_nothing_asked(server, layout):
    with server.client() as client, one_table(server, layout, Overflow()) as tier:
        client.config_resetstat()
        insert(tier, range(5_000))
        use(tier, range(5_000))
        assert not client.exists(prefix() + b"t")
        asked = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        assert not {"hlen", "hscan", "hrandfield", "hsetnx"} & asked
        assert "hps-redis-overflow" not in {t.name for t in threading.enumerate()}
        assert tier.stats(TAG).evictions == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_partitions_of_a_cluster_keep_to_their_margins(cluster, layout, policy):
    rng = np.random.default_rng(3)
    overflow = Overflow(policy, margin=40, target=0.75)
    with one_table(cluster, layout, overflow, num_partitions=6) as tier:
        for low in range(0, 1_000, 250):
            insert(tier, low + rng.permutation(250))
            use(tier, sorted(keys_in(tier)))
            assert max(sizes(tier, 6)) <= 40
        tier.drain()
        assert min(sizes(tier, 6)) >= 30
        assert tier.stats(TAG).evictions == 1_000 - len(keys_in(tier))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_four_threads_of_two_servers_insert_at_once(cluster, layout, policy):
    overflow = Overflow(policy, margin=200, target=0.8)
    failures: list[BaseException] = []

    def work(tier: RedisTier, first: int) -> None:
        try:
            for low in range(first, first + 2_000, 200):
                insert(tier, range(low, low + 200))
                keys = np.arange(low, low + 200)
                out, found = np.empty((200, 4), np.float32), np.zeros(200, np.bool_)
                tier.fetch(TAG, keys, out, found)
                np.testing.assert_array_equal(out[found], rows_of(keys)[found])
        except BaseException as exc:
            failures.append(exc)

    with ExitStack() as stack:
        tiers = [
            stack.enter_context(one_table(cluster, layout, overflow, num_partitions=3))
            for _ in range(2)
        ]
        threads = [
            threading.Thread(target=work, args=(tiers[i % 2], 10_000 * i))
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for tier in tiers:
            tier.drain()
        assert max(sizes(tiers[0], 3)) <= 200
        assert min(sizes(tiers[0], 3)) >= 160
        evicted = sum(tier.stats(TAG).evictions for tier in tiers)
        assert evicted == 8_000 - len(keys_in(tiers[0]))


def test_a_partition_that_is_being_moved_is_relieved_later(cluster):
    layout, overflow = RedisLayout.STRINGS, Overflow(LEAST_USED, 100, 0.8)
    with cluster.client() as client, one_table(cluster, layout, overflow) as tier:
        write_beneath(client, layout, range(150), [b"%d" % k for k in range(150)])
        slot = client.keyslot(prefix())
        target = next(m for m in cluster.masters if m is not cluster.owner(slot))
        move = cluster.begin_move(slot, target)
        insert(tier, [0])  # is there still, so that this is one transaction
        assert tier.overflow_stats().queued_partitions == 1
        assert tier.stats(TAG).evictions == 0
        while move.migrate_keys(100):
            pass
        move.end()
        tier.drain()
        assert keys_in(tier) == set(range(70, 150))
        assert tier.overflow_stats().dropped_partitions == 0
