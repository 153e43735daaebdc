from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest

from hps_numba.errors import ConfigError
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.tiers.host import HostTier
from hps_numba.types import OverflowPolicy, TableSpec

SPEC = TableSpec("model", "table", dim=3)
POLICIES = list(OverflowPolicy)


@contextmanager
def one_table(**options) -> Iterator[HostTier]:
    with closing(HostTier(**options)) as tier:
        tier.open_table(SPEC)
        yield tier


def rows_of(keys) -> np.ndarray:
    return np.add.outer(np.asarray(keys), [0, 0.25, 0.5]).astype(np.float32)


def insert(tier: HostTier, keys) -> None:
    keys = np.asarray(keys, np.int64)
    tier.insert(SPEC.tag, keys, rows_of(keys))


def use(tier: HostTier, keys) -> int:
    keys = np.asarray(keys, np.int64)
    out = np.empty((keys.size, 3), np.float32)
    found = np.zeros(keys.size, np.bool_)
    hits = tier.fetch(SPEC.tag, keys, out, found)
    np.testing.assert_array_equal(out[found], rows_of(keys)[found])
    return hits


def keys_in(tier: HostTier) -> set[int]:
    return {key for block in tier.iterate(SPEC.tag) for key in block.keys.tolist()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("margin", "target", "goal"),
    [(100, 0.8, 80), (100, 0.55, 55), (7, 0.9, 6), (10, 1.0, 9), (1, 0.8, 0)],
)
def test_a_full_partition_falls_to_margin_times_target(policy, margin, target, goal):
    with one_table(
        num_partitions=1,
        overflow_margin=margin,
        overflow_policy=policy,
        overflow_resolution_target=target,
    ) as tier:
        expected = 0
        for key in range(4 * margin):
            insert(tier, [key])
            expected = goal + 1 if expected == margin else expected + 1
            assert tier.size(SPEC.tag) == expected
            assert key in keys_in(tier)
        assert tier.stats(SPEC.tag).evictions == 4 * margin - expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_partitions", [1, 3, 4])
def test_the_margin_holds_for_each_partition(policy, n_partitions):
    rng = np.random.default_rng(n_partitions)
    with one_table(
        num_partitions=n_partitions, overflow_margin=50, overflow_policy=policy
    ) as tier:
        for _ in range(40):
            insert(tier, rng.permutation(1_000)[:60])
            use(tier, rng.permutation(1_000)[:60])
            keys = np.array(sorted(keys_in(tier)))
            _, bounds = group_by_partition(keys, n_partitions)
            assert np.diff(bounds).max() <= 50
        assert np.diff(bounds).min() > 39  # the partitions are in use


@pytest.mark.parametrize("policy", POLICIES)
def test_updates_of_a_full_partition_evict_nothing(policy):
    with one_table(
        num_partitions=1, overflow_margin=50, overflow_policy=policy
    ) as tier:
        insert(tier, range(50))
        for _ in range(5):
            insert(tier, range(50))
        assert keys_in(tier) == set(range(50))
        assert tier.stats(SPEC.tag).evictions == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_larger_than_the_margin_leaves_its_end(policy):
    with one_table(
        num_partitions=1, overflow_margin=64, overflow_policy=policy
    ) as tier:
        insert(tier, range(1_000))
        left = keys_in(tier)
        assert 999 in left
        assert len(left) == tier.size(SPEC.tag) <= 64
        assert use(tier, range(1_000)) == len(left)


def test_random_eviction_prefers_neither_old_nor_new_rows():
    with one_table(num_partitions=1, overflow_margin=1_000) as tier:
        insert(tier, range(1_000))
        insert(tier, [1_000])
        victims = np.array(sorted(set(range(1_000)) - keys_in(tier)))
    assert victims.size == 200
    # The mean of 200 of the numbers below 1000 has a standard deviation of 18.
    assert abs(victims.mean() - 500) < 4 * 18


def test_least_used_rows_go_first_and_the_uses_of_the_others_halve():
    rng = np.random.default_rng(5)
    margin, goal = 100, 70
    with one_table(
        num_partitions=1,
        overflow_margin=margin,
        overflow_policy=OverflowPolicy.EVICT_LEAST_USED,
        overflow_resolution_target=0.7,
    ) as tier:
        uses: dict[int, int] = {}
        for key in range(600):
            if len(uses) == margin:
                before, uses = uses, {}
                insert(tier, [key])
                left = keys_in(tier) - {key}
                victims = before.keys() - left
                assert len(left) == goal
                assert max(before[k] for k in victims) <= min(before[k] for k in left)
                uses = {k: before[k] // 2 for k in left}
            else:
                insert(tier, [key])
            uses[key] = 0
            some = rng.choice(list(uses), rng.integers(1, 20))  # keys may repeat
            use(tier, some)
            for used in some.tolist():
                uses[used] += 1


def test_an_update_keeps_the_uses_of_a_row():
    with one_table(
        num_partitions=1,
        overflow_margin=20,
        overflow_policy=OverflowPolicy.EVICT_LEAST_USED,
        overflow_resolution_target=0.1,
    ) as tier:
        insert(tier, range(20))
        use(tier, [3, 3, 3, 8, 8])
        insert(tier, [3])
        insert(tier, [100])
        assert keys_in(tier) == {3, 8, 100}


def test_rows_used_longest_ago_go_first():
    rng = np.random.default_rng(6)
    margin, goal = 100, 60
    with one_table(
        num_partitions=1,
        overflow_margin=margin,
        overflow_policy=OverflowPolicy.EVICT_OLDEST,
        overflow_resolution_target=0.6,
    ) as tier:
        last_use: dict[int, int] = {}
        for now, key in enumerate(range(500)):
            if len(last_use) == margin:
                newest = sorted(last_use, key=last_use.__getitem__)[-goal:]
                last_use = {k: last_use[k] for k in newest}
            insert(tier, [key])
            last_use[key] = 10 * now
            assert keys_in(tier) == last_use.keys()
            for i, used in enumerate(rng.choice(list(last_use), 3).tolist()):
                use(tier, [used])
                last_use[used] = 10 * now + 1 + i


def test_rows_stored_longest_ago_go_first_if_none_is_used():
    with one_table(
        num_partitions=1,
        overflow_margin=90,
        overflow_policy=OverflowPolicy.EVICT_OLDEST,
        overflow_resolution_target=0.34,
    ) as tier:
        for batch in (range(30), range(100, 130), range(200, 230)):
            insert(tier, batch)
        insert(tier, [300])
        assert keys_in(tier) == {*range(200, 230), 300}


def test_reading_rows_without_using_them_does_not_count():
    with one_table(
        num_partitions=1,
        overflow_margin=40,
        overflow_policy=OverflowPolicy.EVICT_OLDEST,
        overflow_resolution_target=0.5,
    ) as tier:
        insert(tier, range(20))
        insert(tier, range(20, 40))
        for block in tier.iterate(SPEC.tag, block_rows=7):
            assert block.keys.size <= 7
        insert(tier, [99])
        assert keys_in(tier) == {*range(20, 40), 99}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evicted_row_may_come_back(policy):
    with one_table(
        num_partitions=1, overflow_margin=10, overflow_policy=policy
    ) as tier:
        insert(tier, range(11))
        (evicted, *_) = set(range(11)) - keys_in(tier)
        epoch = tier.epoch(SPEC.tag)
        keys = np.array([evicted])
        rows = rows_of(keys)
        assert tier.backfill(SPEC.tag, keys, rows, epoch) == 1
        assert use(tier, keys) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"overflow_margin": 0},
        {"overflow_margin": -5},
        {"num_partitions": 0},
        {"num_threads": 0},
        {"overflow_resolution_target": 1.5},
        {"overflow_resolution_target": -0.1},
    ],
)
def test_limits_that_leave_no_room_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        HostTier(**options)
