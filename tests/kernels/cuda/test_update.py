from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import Outcome, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.hashes import stamp_of
from tests.kernels.cuda.sequences import (
    EXTREME,
    RAGGED,
    bits_for,
    fill,
    keys_in_set,
    rows_for,
)

SMALL = TableLayout(n_sets=8, n_stamps=64)


def _filled(rows: RowLayout | None = None, **options: object) -> CheckedCache:
    """Return a cache that has the even keys below 200."""
    cache = CheckedCache(rows or RowLayout(4), [SMALL], **options)
    fill(cache, np.arange(0, 200, 2), bits_for(cache, 100, seed=1))
    return cache


@pytest.mark.parametrize("n", RAGGED)
def test_keys_that_are_there_get_new_rows(n: int) -> None:
    cache = _filled(preempt=0.01)
    keys = np.random.default_rng(n).permutation(1200)[:n]
    outcomes = cache.update(keys, rows_for(cache, n, seed=n))
    there = (keys % 2 == 0) & (keys < 200)
    assert [outcome == Outcome.REPLACED for outcome in outcomes] == there.tolist()
    assert cache.cpu.total("updated") == there.sum()
    assert cache.cpu.total("size") == 100


@pytest.mark.parametrize(
    "rows", [RowLayout(3, "float16"), RowLayout(1000)], ids=lambda rows: rows.name
)
def test_rows_are_replaced_bit_for_bit(rows: RowLayout) -> None:
    cache = _filled(rows)
    for seed in range(3):
        keys = np.random.default_rng(seed).permutation(200)[:60]
        cache.update(keys, bits_for(cache, 60, seed=seed))


def test_keys_of_one_set_and_digest_are_told_apart() -> None:
    keys = keys_in_set(20, digest=1)
    cache = CheckedCache(RowLayout(4), [TableLayout(n_sets=1)])
    fill(cache, keys[::2], rows_for(cache, 10, seed=1))
    outcomes = cache.update(keys, rows_for(cache, 20, seed=2))
    assert outcomes == [Outcome.REPLACED, Outcome.ABSENT] * 10


def test_every_int64_can_be_updated() -> None:
    keys = np.array(EXTREME)
    cache = CheckedCache(RowLayout(4), [SMALL])
    assert cache.update(keys, rows_for(cache, len(keys), seed=1)) == [7] * len(keys)
    fill(cache, keys, rows_for(cache, len(keys), seed=2))
    assert cache.update(keys, rows_for(cache, len(keys), seed=3)) == [1] * len(keys)


def test_every_key_is_stamped_with_the_last_epoch() -> None:
    cache = _filled()
    rows = rows_for(cache, 10, seed=1)
    cache.update(np.arange(10), rows, epoch=2**40)
    cache.update(np.arange(5), rows[:5], epoch=3)
    stamps = cache.oracle.tables[0].stamps  # which the cache's memory has, too
    assert {stamps[stamp_of(key, 64)] for key in range(5)} == {3}
    assert stamps.count(2**40) > 0


def test_scores_are_left_alone() -> None:
    cache = _filled()
    cache.set_clock(0, 1 << 20)
    before = cache.cpu.scores().copy()
    cache.update(np.arange(200), rows_for(cache, 200, seed=1))
    assert (cache.cpu.scores() == before).all()


def test_one_table_is_updated_and_no_other() -> None:
    cache = CheckedCache(RowLayout(4), [SMALL, SMALL])
    for table in range(2):
        fill(cache, np.arange(50), rows_for(cache, 50, seed=table), table=table)
    cache.update(np.arange(50), rows_for(cache, 50, seed=2), table=1)
    assert cache.cpu.total("updated", 0) == 0
    assert cache.cpu.total("updated", 1) == 50


def test_nobody_need_ask_for_outcomes() -> None:
    cache = _filled()
    values = rows_for(cache, 2, seed=1)
    cpu = cache.cpu
    keys, rows = cpu.put(np.array([4, 5]))[1], cpu.put(values)[1]
    cpu.cache.update(0, 2, keys=keys, values=rows, epoch=1, outcomes=0)
    assert cpu.contents()[4] == values[0].tobytes()
    assert 5 not in cpu.contents()


def test_a_set_that_stays_odd_keeps_its_row() -> None:
    cache = _filled()
    key = cache.oracle.tables[0].sets[0].keys[0]
    row = cache.cpu.contents()[key]
    cache.cpu.meta()[0, :4].view(np.uint32)[0] = 3
    outcomes = cache.cpu.update(np.array([key]), rows_for(cache, 1, seed=1), epoch=9)
    assert outcomes.tolist() == [Outcome.BUSY]
    assert cache.cpu.contents()[key] == row
    stamps = cache.cpu.part("stamps", 0, 64 * 8).view(np.uint64)
    assert not stamps.any()
    assert cache.cpu.total("updated") == 0
