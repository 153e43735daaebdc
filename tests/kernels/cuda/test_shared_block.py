"""One block of memory, several caches over it; and rows that come before any lookup."""

from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.layout import (
    WAYS,
    CacheLayout,
    Outcome,
    Policy,
    RowLayout,
    TableLayout,
)
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.comparisons import same_bits
from tests.kernels.cuda.harness import CpuCache
from tests.kernels.cuda.oracle import Array, handed_out
from tests.kernels.cuda.sequences import bits_for, keys_of_set, rows_for

TICK = 16  # keys
ONE_SET = TableLayout(n_sets=1, n_stamps=64, tick_shift=4, n_door=64)
USED = [Policy.LRU, Policy.LFU]


# -- rows as float32 and as they are stored -------------------------------------------


@pytest.mark.parametrize("dim", [1, 7, 32, 1000])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_what_queries_give_out_moves_nothing_in_the_block(
    stored: str, dim: int
) -> None:
    tables = (TableLayout(3, n_stamps=64), TableLayout(10, n_door=128))
    wide, narrow = (
        CacheLayout(RowLayout(dim, stored, out), tables) for out in ("float32", stored)
    )
    assert wide.n_bytes == narrow.n_bytes
    assert wide.n_zero_bytes == narrow.n_zero_bytes
    assert wide.header(0x1000).tobytes() == narrow.header(0x1000).tobytes()
    for table in range(2):
        assert wide.default_row(table) == narrow.default_row(table)
        for part in ("meta", "stamps", "door", "keys", "rows"):
            assert wide.offset(part, table) == narrow.offset(part, table)


@pytest.mark.parametrize("dim", [7, 32])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_two_caches_over_a_block_give_rows_out_as_each_of_them_does(
    stored: str, dim: int
) -> None:
    one = CheckedCache(RowLayout(dim, stored), [TableLayout(4, n_stamps=64)])
    rows = bits_for(one, 60, seed=dim)
    one.insert(np.arange(60), rows)
    other = _beside(one.cpu, RowLayout(dim, stored, stored))
    keys = np.arange(59, -30, -1)
    wide = one.cpu.query(keys)
    narrow = other.query(keys)
    assert wide.results() == narrow.results() == [29, 29, 60, 0]
    found = rows[keys[:60]]
    as_float32 = handed_out(found, one.rows)
    assert same_bits(wide.out[:60], as_float32, one.rows)
    assert same_bits(narrow.out[:60], found, other.layout.rows)
    # Both count in the same words.
    assert one.cpu.total("hits") == other.total("hits") == 120


def test_what_one_cache_inserts_the_other_updates_and_evicts() -> None:
    one = CpuCache(RowLayout(8, "float16"), [TableLayout(4, n_stamps=64)])
    other = _beside(one, RowLayout(8, "float16", "float16"))
    rows = np.arange(80, dtype=np.float16).reshape(10, 8)
    one.insert(np.arange(10), rows)
    assert other.update(np.arange(5), -rows[:5]).tolist() == [Outcome.REPLACED] * 5
    assert one.evict(np.arange(8, 12), epoch=2).tolist() == [
        *[Outcome.EVICTED] * 2,
        *[Outcome.ABSENT] * 2,
    ]
    answer = other.query(np.arange(10))
    assert answer.results() == [2, 2, 8, 0]
    assert (answer.out[:8] == np.concatenate([-rows[:5], rows[5:8]])).all()


def _beside(given: CpuCache, rows: RowLayout) -> CpuCache:
    """Return another cache over the block of one."""
    other = CpuCache(
        rows, given.layout.tables, memory=given.memory, launcher=given.launcher
    )
    other.block = given.block
    other.cache = Cache(
        other.layout,
        given.cache.policy,
        base=given.cache.base,
        launcher=given.launcher,
    )
    return other


# -- rows that come first -------------------------------------------------------------


def _warm(policy: Policy, n: int, **options: object) -> CheckedCache:
    """Return a cache of one set, warmed up with the keys from 0 to ``n`` - 1."""
    cache = CheckedCache(RowLayout(4), [ONE_SET], policy, **options)
    _warm_up(cache, np.arange(n))
    return cache


def _warm_up(cache: CheckedCache, keys: Array) -> list[Outcome]:
    rows = rows_for(cache, len(keys), seed=len(keys))
    return cache.insert(keys, rows, make_room=False)


def _insert(cache: CheckedCache, *keys: int) -> list[Outcome]:
    return [
        cache.insert(np.array([key]), rows_for(cache, 1, seed=key % 1000))[0]
        for key in keys
    ]


def _use(cache: CheckedCache, keys: Array, n_ticks: int = 1) -> None:
    """Let keys hit, ``n_ticks`` ticks long."""
    for _ in range(n_ticks):
        cache.query(np.resize(keys, TICK))


@pytest.mark.parametrize("policy", list(Policy))
def test_rows_for_which_nobody_yields_fill_free_ways_only(policy: Policy) -> None:
    cache = _warm(policy, 20, preempt=0.1)
    outcomes = _warm_up(cache, np.arange(10, 60))
    assert outcomes.count(Outcome.REPLACED) == 10
    assert outcomes.count(Outcome.INSERTED) == 8
    assert outcomes.count(Outcome.FULL) == 32
    assert keys_of_set(cache) >= set(range(20))
    assert cache.cpu.total("evicted") == 0
    assert cache.cpu.total("size") == cache.cpu.total("inserted") == WAYS


@pytest.mark.parametrize("policy", USED)
def test_rows_that_come_first_are_scored_as_others_are(policy: Policy) -> None:
    cache = _warm(policy, 14)
    cache.insert(np.arange(100, 114), rows_for(cache, 14, seed=1))
    assert len(set(cache.cpu.scores()[0].tolist())) == 1


@pytest.mark.parametrize("policy", USED)
def test_what_was_in_a_way_before_does_not_score_rows_that_come_first(
    policy: Policy,
) -> None:
    cache = _warm(policy, 0)
    one = cache.oracle.tables[0].sets[0]
    one.scores = np.random.default_rng(1).permutation(256)[:WAYS].tolist()
    cache.set_clock(0, 100 * TICK)
    cache.restore(0, [0])
    _warm_up(cache, np.arange(WAYS))
    assert set(cache.cpu.scores()[0].tolist()) == {98 if policy == Policy.LRU else 1}


@pytest.mark.parametrize("policy", USED)
def test_rows_that_came_first_and_were_used_stay_beside_new_ones(
    policy: Policy,
) -> None:
    cache = _warm(policy, WAYS)
    used = np.arange(0, WAYS, 2)
    _use(cache, used, 2)
    assert set(_insert(cache, *range(100, 140))) == {Outcome.EVICTED}
    left = keys_of_set(cache)
    assert left >= set(used.tolist())
    assert left - set(used.tolist()) <= set(range(100, 140))


@pytest.mark.parametrize("policy", USED)
def test_rows_that_came_first_and_were_not_used_yield_in_turn(policy: Policy) -> None:
    cache = _warm(policy, WAYS - 4)
    _insert(cache, *range(100, 104))
    for _ in range(3):
        # Whoever came first, each of the 28 keys yields once.
        before = keys_of_set(cache)
        fresh = range(max(before) + 1, max(before) + 1 + WAYS)
        assert set(_insert(cache, *fresh)) == {Outcome.EVICTED}
        assert keys_of_set(cache) == set(fresh)


def test_rows_that_came_first_age_as_others_do() -> None:
    cache = _warm(Policy.LRU, WAYS - 4)
    _use(cache, np.arange(4), 3)
    _insert(cache, *range(100, 104))  # into free ways, three ticks later
    _insert(cache, *range(200, 220))
    # First went the 20 that came first and were not used.
    assert keys_of_set(cache) == {*range(4), *range(100, 104), *range(200, 220)}


def test_a_cleared_table_is_warmed_up_like_a_new_one() -> None:
    cache = _warm(Policy.LFU, WAYS)
    _use(cache, np.arange(WAYS), 40)
    cache.clear(epoch=0)
    _warm_up(cache, np.arange(100, 114))
    assert set(cache.cpu.scores()[0][:14].tolist()) == {1}
    _insert(cache, *range(200, 214))
    _use(cache, np.arange(200, 214), 3)
    _insert(cache, *range(300, 314))
    # The old counts are gone with their keys: none of the first rows is immortal.
    assert keys_of_set(cache) == {*range(200, 214), *range(300, 314)}


def test_a_full_set_that_takes_nobody_asks_no_doorkeeper() -> None:
    cache = _warm(Policy.LRU, WAYS)
    key, rows = np.array([100]), rows_for(cache, 1, seed=1)
    for _ in range(2):
        outcomes = cache.insert(key, rows, admit=True, make_room=False)
        assert outcomes == [Outcome.FULL]
    assert cache.insert(key, rows, admit=True) == [Outcome.TURNED_AWAY]


@pytest.mark.parametrize("policy", USED)
def test_rows_that_come_first_are_refused_if_they_are_old(policy: Policy) -> None:
    cache = _warm(policy, 4)
    cache.update(np.array([2, 9]), rows_for(cache, 2, seed=3), epoch=5)
    rows = rows_for(cache, 2, seed=4)
    old = cache.insert(np.array([2, 9]), rows, epoch=4, make_room=False)
    assert old == [Outcome.STALE] * 2
