"""Static tables on the CPU, against the oracle: which of its two sets a key takes."""

from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.checked_pooling import pooled_query
from tests.kernels.cuda.hashes import second_set_of, set_of
from tests.kernels.cuda.oracle import HOME_ROOM, Array
from tests.kernels.cuda.sequences import EXTREME, keys_of_set, rows_for

N_SETS = 3


def pair_keys(n: int, home: int, second: int, *, skip: int = 0) -> Array:
    """Return keys of one home set and one second set."""
    found: list[int] = []
    key = 0
    while len(found) < n + skip:
        if set_of(key, N_SETS) == home and second_set_of(key, N_SETS) == second:
            found.append(key)
        key += 1
    return np.array(found[skip:], np.int64)


def static_cache(n_sets: int = N_SETS, dim: int = 4) -> CheckedCache:
    table = TableLayout(n_sets, n_stamps=64)
    return CheckedCache(RowLayout(dim), [table], Policy.STATIC)


def put(cache: CheckedCache, keys: Array, *, seed: int = 0) -> list[Outcome]:
    """Insert keys one launch after the other, so that they come in this order."""
    rows = rows_for(cache, len(keys), seed=seed)
    return [cache.insert(keys[i : i + 1], rows[i : i + 1])[0] for i in range(len(keys))]


def sizes(cache: CheckedCache) -> list[int]:
    return [len(keys_of_set(cache, n_set)) for n_set in range(N_SETS)]


def test_a_key_goes_home_while_there_is_room_then_to_the_emptier_set() -> None:
    cache = static_cache()
    keys = pair_keys(2 * WAYS + 1, 0, 1)
    first = WAYS - HOME_ROOM + 1
    assert set(put(cache, keys[:first])) == {Outcome.INSERTED}
    assert sizes(cache) == [first, 0, 0]
    put(cache, keys[first : 2 * first])
    assert sizes(cache) == [first, first, 0]
    # With as much room in both the home set has it, and both fill up by turns.
    put(cache, keys[2 * first : 2 * first + 1])
    assert sizes(cache) == [first + 1, first, 0]
    assert set(put(cache, keys[2 * first + 1 : -1])) == {Outcome.INSERTED}
    assert sizes(cache) == [WAYS, WAYS, 0]
    assert put(cache, keys[-1:]) == [Outcome.FULL]


def test_keys_are_found_updated_and_evicted_in_either_set() -> None:
    cache = static_cache()
    keys = pair_keys(2 * WAYS, 2, 0)
    put(cache, keys)
    assert sizes(cache) == [WAYS, 0, WAYS]
    answer, _ = cache.query(keys)
    assert answer.results()[0] == 0
    outcomes = cache.update(keys, rows_for(cache, len(keys), seed=2), epoch=1)
    assert set(outcomes) == {Outcome.REPLACED}
    cache.query(keys)
    assert set(cache.evict(keys[::2], epoch=2)) == {Outcome.EVICTED}
    answer, _ = cache.query(keys)
    assert answer.results()[0] == WAYS
    absent = cache.update(keys[::2], rows_for(cache, WAYS, seed=3), epoch=3)
    assert set(absent) == {Outcome.ABSENT}
    assert set(cache.evict(keys[::2], epoch=4)) == {Outcome.ABSENT}


def test_a_key_that_is_in_its_second_set_stays_there_when_home_has_room_again() -> None:
    cache = static_cache()
    keys = pair_keys(2 * WAYS, 0, 1)
    put(cache, keys)
    in_second = keys_of_set(cache, 1)
    cache.evict(np.array(sorted(keys_of_set(cache, 0))), epoch=1)
    again = np.array(sorted(in_second))
    outcomes = cache.insert(again, rows_for(cache, len(again), seed=4), epoch=1)
    assert set(outcomes) == {Outcome.REPLACED}
    assert keys_of_set(cache, 1) == in_second
    assert sizes(cache) == [0, WAYS, 0]


def test_stale_rows_are_refused_wherever_the_key_would_go() -> None:
    cache = static_cache()
    keys = pair_keys(2 * WAYS, 1, 2)
    put(cache, keys[:WAYS])
    rows = rows_for(cache, WAYS, seed=5)
    assert set(cache.evict(keys[WAYS:], epoch=7)) == {Outcome.ABSENT}
    assert set(cache.insert(keys[WAYS:], rows, epoch=6)) == {Outcome.STALE}
    assert set(cache.insert(keys[WAYS:], rows, epoch=7)) == {Outcome.INSERTED}
    cache.clear(epoch=8)
    assert set(cache.insert(keys[WAYS:], rows, epoch=7)) == {Outcome.STALE}
    assert sizes(cache) == [0, 0, 0]


def test_rows_of_a_nearly_full_table_are_all_found() -> None:
    cache = static_cache(40)
    keys = np.random.default_rng(3).integers(-(2**63), 2**63, 24 * 40, np.int64)
    outcomes = cache.insert(keys, rows_for(cache, len(keys), seed=6))
    assert set(outcomes) == {Outcome.INSERTED}
    answer, _ = cache.query(keys, count_unique=True)
    assert answer.results() == [0, 0, len(keys), len(keys)]
    bags = [keys[i : i + 48].tolist() for i in range(0, len(keys), 48)]
    pooled_query(cache, bags, mean=True)
    assert sorted(cache.dump().tolist()) == sorted(keys.tolist())


def test_every_int64_can_be_in_a_second_set() -> None:
    for key in EXTREME:
        home = set_of(key, N_SETS)
        cache = static_cache()
        taken = WAYS - HOME_ROOM + 1
        cache.oracle.tables[0].sets[home].digests[:taken] = [1] * taken
        cache.restore(0, [home])
        assert put(cache, np.array([key])) == [Outcome.INSERTED]
        assert key in keys_of_set(cache, second_set_of(key, N_SETS))
        cache.query(np.array([key, key]))


@pytest.mark.parametrize("n_sets", [1, 2])
def test_a_table_of_one_set_or_two_is_filled_to_the_last_way(n_sets: int) -> None:
    cache = static_cache(n_sets)
    keys = np.arange(n_sets * WAYS + 3)
    outcomes = cache.insert(keys, rows_for(cache, len(keys), seed=7))
    assert outcomes.count(Outcome.INSERTED) == n_sets * WAYS
    assert outcomes.count(Outcome.FULL) == 3
    answer, _ = cache.query(keys)
    assert answer.results()[0] == 3
