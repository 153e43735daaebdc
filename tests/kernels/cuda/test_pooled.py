from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.checked_pooling import Part, pooled_query, pooled_scatter
from tests.kernels.cuda.comparisons import CANARY
from tests.kernels.cuda.oracle import handed_out
from tests.kernels.cuda.sequences import fill, rows_for

SMALL = TableLayout(n_sets=16, n_stamps=64, tick_shift=5)
# From one lane a row to several tiles of 32, rows of 1 to 4 values a unit.
SHAPES = [
    RowLayout(1),
    RowLayout(2, "bfloat16"),
    RowLayout(3),
    RowLayout(8, "float16"),
    RowLayout(20),
    RowLayout(33, "float16"),
    RowLayout(64, "bfloat16"),
    RowLayout(100),
    RowLayout(132),
    RowLayout(1000, "float16"),
]
LENGTHS = (0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 63, 64, 65, 96, 100, 0)


def _filled(
    rows: RowLayout | None = None,
    policy: Policy = Policy.LRU,
    n_tables: int = 1,
    **options: object,
) -> CheckedCache:
    """Return a cache whose tables have the even keys below 400."""
    rows = rows or RowLayout(4)
    cache = CheckedCache(rows, [SMALL] * n_tables, policy, **options)
    for table in range(n_tables):
        fill(cache, np.arange(0, 400, 2), rows_for(cache, 200, seed=table), table=table)
        cache.set_default(table, rows_for(cache, 1, seed=50 + table)[0])
    return cache


def _bags(rng: np.random.Generator, *, hits: bool = False) -> Part:
    lengths = rng.permutation(LENGTHS).tolist()
    keys = [rng.integers(0, 400, n) for n in lengths]
    return [(k // 2 * 2 if hits else k).tolist() for k in keys]


def _values(cache: CheckedCache, *rows: float) -> np.ndarray:
    """Return rows that have one value each, of float32."""
    return np.repeat(np.array(rows, np.float32)[:, None], cache.rows.dim, 1)


# -- sums ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", SHAPES, ids=lambda rows: rows.name)
def test_bags_are_summed_whatever_the_row(rows: RowLayout) -> None:
    cache = _filled(rows)
    rng = np.random.default_rng(rows.dim)
    for mean in (False, True):
        bags = _bags(rng)
        weights = rng.standard_normal(sum(LENGTHS)).astype(np.float32)
        run = pooled_query(cache, bags, mean=mean, weights=weights if mean else None)
        pooled_scatter(cache, run, 0, rows_for(cache, 7, seed=5))
        pooled_scatter(cache, run, 0, rows_for(cache, 400, seed=6), 7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("fill_misses", [False, True])
def test_sums_are_weighted_averaged_and_filled(
    weighted: bool, mean: bool, fill_misses: bool
) -> None:
    cache = _filled(preempt=0.01)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(sum(LENGTHS)) * 10.0 ** rng.integers(-3, 3)
    pooled_query(
        cache,
        _bags(rng),
        weights=weights.astype(np.float32) if weighted else None,
        mean=mean,
        fill=fill_misses,
    )


def test_a_bag_of_one_key_is_its_row() -> None:
    cache = _filled()
    run = pooled_query(cache, [[key] for key in range(0, 400, 2)])
    contents = cache.cpu.contents()
    wanted = [contents[key] for key in range(0, 400, 2)]
    assert [row.tobytes() for row in run.answer[0].out] == wanted


def test_keys_count_as_often_as_they_are_in_a_bag() -> None:
    cache = _filled()
    fill(cache, np.array([2, 4]), _values(cache, 3.0, 0.25))
    run = pooled_query(cache, [[2] * 40 + [4] * 30, [4, 2, 4]])
    assert run.answer[0].out.tolist() == [[127.5] * 4, [3.5] * 4]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 33])
def test_empty_bags_are_zeros(n: int) -> None:
    cache = _filled()
    run = pooled_query(cache, [[] for _ in range(n)], mean=True)
    assert run.answer[0].out.tobytes() == bytes(16 * n)
    assert run.answer[0].results() == [0, 0, 0, 0]
    assert cache.oracle.tables[0].clock == 0


def test_sums_do_not_depend_on_the_order_of_threads() -> None:
    bags = _bags(np.random.default_rng(3))
    seen = set()
    for schedule in ("ordered", "uniform", "priority"):
        cache = _filled(RowLayout(3), schedule=schedule, preempt=0.05)
        seen.add(pooled_query(cache, bags).answer[0].out.tobytes())
    assert len(seen) == 1


# -- values that spread ---------------------------------------------------------------


def test_rows_that_are_not_wanted_leak_nothing() -> None:
    cache = _filled()
    nan = _values(cache, np.nan)[0]
    cache.set_default(0, nan)
    # The first row of memory, and one in every set beside it.
    cache.oracle.tables[0].sets[0].rows[0] = nan.tobytes()
    cache.restore(0, [0])
    first = cache.oracle.tables[0].sets[0].keys[0]
    keys = [key for key in range(0, 400, 2) if key != first]
    bags = [[*keys[:3], 1], [401, 403], [5, *keys[3:50]], keys[50:131]]
    run = pooled_query(cache, bags)
    assert np.isfinite(run.answer[0].out).all()
    fetched = rows_for(cache, 4, seed=1)
    unwanted = run.answer[0].unique().tolist().index(5)
    fetched[unwanted] = np.nan
    pooled_scatter(cache, run, 0, fetched)
    assert np.isnan(run.answer[0].out).all(1).tolist() == [False, False, True, False]


def test_infinities_and_nans_spread_in_their_own_bag_only() -> None:
    cache = _filled()
    fill(cache, np.array([0, 2, 4]), _values(cache, np.inf, -np.inf, np.nan))
    others = list(range(6, 80, 2))
    bags = [[0, *others], [2, *others], [*others, 0, 2], [4], others, [0, 0]]
    out = pooled_query(cache, bags).answer[0].out[:, 0]
    assert out[[0, 1, 5]].tolist() == [np.inf, -np.inf, np.inf]
    assert np.isnan(out[[2, 3]]).all()
    assert np.isfinite(out[4])


def test_denormals_and_minus_zero_are_numbers() -> None:
    cache = _filled()
    small = float(np.float32(2.0**-149))
    fill(cache, np.array([0, 2, 4]), _values(cache, small, -0.0, -small))
    bags = [[0] * 33, [0, 4], [2, 2], [4, 2]]
    out = pooled_query(cache, bags).answer[0].out[:, 0]
    assert out.tolist() == [33 * small, 0.0, 0.0, -small]


# -- misses ---------------------------------------------------------------------------


def test_fetched_rows_are_added_where_they_missed() -> None:
    cache = _filled()
    fill(cache, np.array([2]), _values(cache, 10.0))
    run = pooled_query(cache, [[1, 2], [2], [3, 1, 3]])
    assert run.answer[0].results() == [4, 2, 2, 2]
    unique = run.answer[0].unique().tolist()
    pooled_scatter(cache, run, 0, _values(cache, *map(float, unique)))
    assert run.answer[0].out[:, 0].tolist() == [11.0, 10.0, 7.0]


@pytest.mark.parametrize("window", [1, 16, 33])
def test_fetched_rows_come_in_windows(window: int) -> None:
    cache = _filled()
    rng = np.random.default_rng(window)
    weights = rng.standard_normal(sum(LENGTHS)).astype(np.float32)
    run = pooled_query(cache, _bags(rng), weights=weights, mean=True)
    for first in range(0, run.answer[0].results()[1], window):
        with cache.memory.scratch():
            rows = rows_for(cache, window, seed=first)
            pooled_scatter(cache, run, 0, rows, first)


def test_every_bag_may_miss_one_key_everywhere() -> None:
    cache = _filled(preempt=0.05)
    run = pooled_query(cache, [[7] * n for n in (1, 70, 33, 5)])
    assert run.answer[0].results() == [109, 1, 0, 4]
    pooled_scatter(cache, run, 0, _values(cache, 0.5))
    assert run.answer[0].out[:, 0].tolist() == [0.5, 35.0, 16.5, 2.5]


def test_a_set_under_a_writer_misses() -> None:
    cache = _filled()
    fill(cache, np.arange(0, 400, 2), _values(cache, *[1.0] * 200))
    cache.cpu.meta()[3, :4].view(np.uint32)[0] |= 1
    table = cache.oracle.tables[0]
    keys = np.arange(0, 400, 2)
    held = [key for key in keys.tolist() if table.set_of(key) == 3]
    answer, _, _ = cache.cpu.pooled_query(keys, np.array([0, 100, 200]))
    assert sorted(answer.unique().tolist()) == held
    assert answer.results()[0] == len(held)
    assert answer.out[:, 0].sum() == 200 - len(held)


# -- tables, memory, scores -----------------------------------------------------------


def test_tables_of_a_launch_keep_to_themselves() -> None:
    cache = _filled(n_tables=3)
    rng = np.random.default_rng(4)
    work = cache.cpu.workspace(2000, 3)
    empty: Part = []
    for parts in [
        (_bags(rng), empty, _bags(rng)),
        (empty, empty, empty),
        ([[]], _bags(rng), [[], [1]]),
    ]:
        run = pooled_query(cache, *parts, work=work)
        for table in range(3):
            pooled_scatter(cache, run, table, rows_for(cache, 400, seed=table))


def test_a_launch_may_begin_at_any_table() -> None:
    cache = _filled(n_tables=3)
    rng = np.random.default_rng(7)
    for first, n in [(2, 1), (1, 2)]:
        parts = [_bags(rng) for _ in range(n)]
        run = pooled_query(cache, *parts, first_table=first)
        for i in range(n):
            pooled_scatter(cache, run, i, rows_for(cache, 400, seed=i))


def test_bags_end_where_the_keys_of_the_launch_do() -> None:
    cache = _filled()
    keys = np.arange(0, 400, 2)
    contents = cache.cpu.contents()
    rows = np.array([np.frombuffer(contents[key], np.float32) for key in keys.tolist()])
    begins = np.array([0, 150, 100, 190, 10**6, 2**64 - 1], np.uint64)
    answer, _, _ = cache.cpu.pooled_query(keys, begins)
    spans = [(0, 150), (150, 150), (100, 190), (190, 200), (200, 200)]
    for out, (begin, stop) in zip(answer.out, spans, strict=True):
        wanted = rows[begin:stop].astype(np.float64).sum(0)
        assert np.abs(out - wanted).max() < 1e-4


@pytest.mark.parametrize("offset", [4, 8, 16])
def test_an_output_may_begin_at_any_float32(offset: int) -> None:
    cache = _filled()
    bags = _bags(np.random.default_rng(5))
    n_bytes = 16 * len(bags)
    block = cache.memory.array(n_bytes + 64, np.uint8, fill=CANARY)
    out = block[offset : offset + n_bytes].view(np.float32).reshape(-1, 4)
    run = pooled_query(cache, bags, out=out)
    pooled_scatter(cache, run, 0, rows_for(cache, 400, seed=1))
    outside = np.delete(block, np.r_[offset : offset + n_bytes])
    assert (outside == CANARY).all()


def test_a_workspace_serves_queries_of_both_kinds() -> None:
    cache = _filled()
    rng = np.random.default_rng(6)
    work = cache.cpu.workspace(sum(LENGTHS))
    for seed in range(10):
        with cache.memory.scratch():
            run = pooled_query(cache, _bags(rng), work=work)
            pooled_scatter(cache, run, 0, rows_for(cache, 400, seed=seed))
            answer, found = cache.query(rng.integers(0, 400, 300), work=work)
            cache.scatter(answer, found, 0, rows_for(cache, 400, seed=seed))


@pytest.mark.parametrize("policy", [Policy.LFU, Policy.STATIC])
def test_pooled_hits_count_as_uses(policy: Policy) -> None:
    cache = _filled(policy=policy, preempt=0.05)
    before = cache.cpu.scores().astype(int).sum()
    for seed in range(5):
        pooled_query(cache, _bags(np.random.default_rng(seed), hits=True))
    counted = cache.cpu.scores().astype(int).sum() - before
    assert (counted > 0) == (policy == Policy.LFU)


def test_halves_are_widened_before_they_are_summed() -> None:
    cache = _filled(RowLayout(8, "float16"))
    row = np.full((1, 8), 65504, np.float16)
    fill(cache, np.array([0]), row)
    run = pooled_query(cache, [[0] * 100])
    wanted = handed_out(row, cache.rows)[0, 0] * 100
    assert run.answer[0].out.tolist() == [[wanted] * 8]
