"""Partitions in Redis give up rows above their margin, in both layouts."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import RowBlock
from tests.tiers.redis.limited import (
    LAYOUTS,
    LEAST_USED,
    POLICIES,
    TAG,
    insert,
    keys_in,
    one_table,
    prefix,
    rows_of,
    sizes,
    use,
    write_beneath,
)


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
