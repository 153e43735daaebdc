from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.sequences import keys_of_set, rows_for

ONE_SET = TableLayout(n_sets=1, n_stamps=64, tick_shift=4)


def _full(policy: Policy, **options: object) -> CheckedCache:
    """Return a cache of one set that is full of the keys 0 to 27."""
    cache = CheckedCache(RowLayout(4), [ONE_SET], policy, **options)
    cache.insert(np.arange(WAYS), rows_for(cache, WAYS, seed=1))
    return cache


@pytest.mark.parametrize("policy", [Policy.LRU, Policy.LFU])
@pytest.mark.parametrize("turn", range(WAYS))
def test_the_victim_is_the_way_of_least_worth_after_the_turn(
    policy: Policy, turn: int
) -> None:
    rng = np.random.default_rng(turn)
    cache = _full(policy)
    one = cache.oracle.tables[0].sets[0]
    one.seq = 2 * (turn + WAYS * int(rng.integers(1000)))
    one.scores = rng.choice([0, 1, 2, 37, 254, 255], WAYS).tolist()
    cache.set_clock(0, 16 * 257)
    cache.restore(0, [0])
    outcomes = cache.insert(np.array([1000]), rows_for(cache, 1, seed=2))
    assert outcomes == [Outcome.EVICTED]


def test_the_least_recently_used_key_makes_room() -> None:
    cache = _full(Policy.LRU)
    cache.query(np.arange(20))
    cache.query(np.arange(1, 20))
    for i in range(8):
        cache.insert(np.array([100 + i]), rows_for(cache, 1, seed=i))
    assert keys_of_set(cache) == {*range(20), *range(100, 108)}


def test_a_static_table_takes_nothing_more_when_its_set_is_full() -> None:
    cache = _full(Policy.STATIC)
    outcomes = cache.insert(np.arange(25, 31), rows_for(cache, 6, seed=3))
    assert outcomes == [Outcome.REPLACED] * 3 + [Outcome.FULL] * 3
    cache.evict(np.array([7]), epoch=0)
    outcomes = cache.insert(np.array([100]), rows_for(cache, 1, seed=4))
    assert outcomes == [Outcome.INSERTED]


def test_a_batch_into_one_full_set_evicts_its_own_keys_too() -> None:
    cache = _full(Policy.LRU)
    keys = np.arange(100, 100 + 3 * WAYS)
    outcomes = cache.insert(keys, rows_for(cache, len(keys), seed=5))
    assert outcomes == [Outcome.EVICTED] * len(keys)
    assert keys_of_set(cache) <= set(keys.tolist())
