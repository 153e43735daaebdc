from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.comparisons import CANARY
from tests.kernels.cuda.sequences import RAGGED, bits_for, fill, rows_for

SMALL = TableLayout(n_sets=8, n_stamps=64)


def _filled(rows: RowLayout | None = None, n_tables: int = 1) -> CheckedCache:
    """Return a cache whose tables have the even keys below 100."""
    cache = CheckedCache(rows or RowLayout(4), [SMALL] * n_tables, preempt=0.01)
    for table in range(n_tables):
        rows_of_table = rows_for(cache, 50, seed=table)
        fill(cache, np.arange(0, 100, 2), rows_of_table, table=table)
    return cache


@pytest.mark.parametrize("n", RAGGED)
def test_every_position_of_a_missing_key_gets_its_row(n: int) -> None:
    cache = _filled()
    keys = np.random.default_rng(n).integers(0, 200, n)
    answer, found = cache.query(keys)
    cache.scatter(answer, found, 0, bits_for(cache, 200, seed=n))
    if n:
        assert not (answer.out.view(np.uint8) == CANARY).all(1).any()


@pytest.mark.parametrize("window", [1, 7, 32, 33])
def test_rows_come_in_windows(window: int) -> None:
    cache = _filled()
    answer, found = cache.query(np.arange(300) % 130)
    n_missing = answer.results()[1]
    for first in range(0, n_missing, window):
        cache.scatter(answer, found, 0, rows_for(cache, window, seed=first), first)
    assert not (answer.out.view(np.uint8) == CANARY).all(1).any()


def test_windows_may_come_in_any_order_and_again() -> None:
    cache = _filled()
    answer, found = cache.query(np.arange(300) % 130)
    for first in (60, 20, 40, 20, 0):
        cache.scatter(answer, found, 0, rows_for(cache, 20, seed=first), first)


@pytest.mark.parametrize(("first", "n"), [(0, 0), (80, 5), (2**31, 3), (79, 10)])
def test_rows_of_nobody_go_nowhere(first: int, n: int) -> None:
    cache = _filled()
    answer, found = cache.query(np.arange(130))
    assert answer.results()[1] == 80
    before = answer.out.copy()
    cache.scatter(answer, found, 0, rows_for(cache, n, seed=1), first)
    assert (before != answer.out).any(1).sum() == (1 if first == 79 else 0)


def test_nothing_is_scattered_where_nothing_missed() -> None:
    cache = _filled()
    answer, found = cache.query(np.arange(0, 100, 2))
    cache.scatter(answer, found, 0, rows_for(cache, 50, seed=1))


def test_one_key_may_have_missed_everywhere() -> None:
    cache = _filled()
    answer, found = cache.query(np.full(1000, 77))
    cache.scatter(answer, found, 0, rows_for(cache, 1, seed=1))
    assert (answer.out == answer.out[0]).all()


def test_each_table_gets_its_own_rows() -> None:
    cache = _filled(n_tables=3)
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 200, n) for n in (100, 0, 333)]
    answer, found = cache.query(*parts)
    for table in (2, 0, 1):
        cache.scatter(answer, found, table, rows_for(cache, 200, seed=table))


def test_what_happens_to_the_cache_meanwhile_does_not_matter() -> None:
    cache = _filled()
    keys = np.arange(130)
    answer, found = cache.query(keys)
    cache.insert(np.arange(100, 130), rows_for(cache, 30, seed=1))
    cache.evict(np.arange(0, 50))
    cache.scatter(answer, found, 0, rows_for(cache, 80, seed=2))


@pytest.mark.parametrize(
    "rows",
    [RowLayout(3, "float16", "float16"), RowLayout(5, "bfloat16"), RowLayout(1000)],
    ids=lambda rows: rows.name,
)
def test_fetched_rows_lie_without_gaps(rows: RowLayout) -> None:
    cache = _filled(rows)
    answer, found = cache.query(np.arange(130))
    cache.scatter(answer, found, 0, bits_for(cache, 33, seed=1))
    cache.scatter(answer, found, 0, bits_for(cache, 47, seed=2), 33)
