from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, Outcome, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.sequences import (
    EXTREME,
    RAGGED,
    fill,
    keys_in_set,
    rows_for,
)

SMALL = TableLayout(n_sets=8, n_stamps=64)


def _filled(**options: object) -> CheckedCache:
    """Return a cache that has the even keys below 200."""
    cache = CheckedCache(RowLayout(4), [SMALL], **options)
    fill(cache, np.arange(0, 200, 2), rows_for(cache, 100, seed=1))
    return cache


@pytest.mark.parametrize("n", RAGGED)
def test_keys_that_are_there_are_gone_afterwards(n: int) -> None:
    cache = _filled(preempt=0.01)
    keys = np.random.default_rng(n).permutation(1200)[:n]
    cache.evict(keys)
    left = set(range(0, 200, 2)) - set(keys.tolist())
    assert set(cache.cpu.contents()) == left
    assert cache.cpu.total("size") == len(left)


def test_every_int64_can_be_evicted() -> None:
    keys = np.array(EXTREME)
    cache = CheckedCache(RowLayout(4), [SMALL])
    assert cache.evict(keys) == [Outcome.ABSENT] * len(keys)
    fill(cache, keys, rows_for(cache, len(keys), seed=1))
    assert cache.evict(keys) == [Outcome.EVICTED] * len(keys)
    assert cache.cpu.total("size") == 0


def test_keys_of_one_digest_are_told_apart() -> None:
    keys = keys_in_set(WAYS, digest=255)
    cache = CheckedCache(RowLayout(4), [TableLayout(n_sets=1)])
    fill(cache, keys[::2], rows_for(cache, WAYS // 2, seed=1))
    assert cache.evict(keys) == [Outcome.EVICTED, Outcome.ABSENT] * (WAYS // 2)


def test_a_freed_way_is_the_first_to_be_taken_again() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(n_sets=1)])
    fill(cache, np.arange(WAYS), rows_for(cache, WAYS, seed=1))
    cache.evict(np.array([20, 6, 13]))
    cache.insert(np.array([100]), rows_for(cache, 1, seed=2), epoch=1)
    assert cache.cpu.stored_keys()[0, 6] == 100


def test_an_evicted_key_is_refused_from_before() -> None:
    cache = _filled()
    row = rows_for(cache, 1, seed=1)
    cache.evict(np.array([4]), epoch=3)
    assert cache.insert(np.array([4]), row, epoch=2) == [Outcome.STALE]
    assert cache.insert(np.array([4]), row, epoch=3) == [Outcome.INSERTED]


def test_nobody_need_ask_for_outcomes() -> None:
    cpu = _filled().cpu
    cpu.cache.evict(0, 2, keys=cpu.put(np.array([4, 5]))[1], epoch=1, outcomes=0)
    cpu.cache.clear(0, epoch=0, busy=0)
    assert cpu.total("size") == 0


def test_a_set_that_stays_odd_keeps_its_keys() -> None:
    cache = _filled()
    key = cache.oracle.tables[0].sets[0].keys[0]
    cache.cpu.meta()[0, :4].view(np.uint32)[0] = 3
    assert cache.cpu.evict(np.array([key])).tolist() == [Outcome.BUSY]
    assert key in cache.cpu.contents()
    assert not cache.cpu.part("stamps", 0, 64 * 8).any()


# -- clear ----------------------------------------------------------------------------


def test_ten_thousand_keys_are_cleared() -> None:
    tables = [TableLayout(64), TableLayout(3)]
    cache = CheckedCache(RowLayout(4), tables, preempt=0.01)
    keys = np.arange(2500)
    for epoch in range(7):
        with cache.memory.scratch():
            cache.insert(keys, rows_for(cache, 2500, seed=epoch), epoch=epoch)
            cache.insert(keys[:40], rows_for(cache, 40, seed=1), table=1, epoch=0)
            cache.clear(epoch=epoch)
            assert cache.cpu.contents() == {}
            assert len(cache.cpu.contents(1)) == 40
    assert cache.keys["clear"] > 10_000


def test_a_floor_does_not_sink() -> None:
    cache = _filled()
    cache.clear(epoch=9)
    cache.clear(epoch=4)
    assert cache.cpu.total("floor") == 9


def test_clearing_says_which_sets_were_not_to_be_had() -> None:
    cache = _filled()
    held = [1, 6]
    for n_set in held:
        cache.cpu.meta()[n_set, :4].view(np.uint32)[0] |= 1
    busy = cache.cpu.clear(epoch=1)
    assert np.flatnonzero(busy).tolist() == held
    table = cache.oracle.tables[0]
    left = {key for key in range(0, 200, 2) if table.set_of(key) in held}
    assert set(cache.cpu.contents()) == left
    assert cache.cpu.total("size") == len(left)
