"""How many sets the tables of a model get, and what they take."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps_numba.config import InferenceParams
from hps_numba.errors import ConfigError
from hps_numba.kernels.cuda.layout import WAYS, CacheLayout, Policy, TableLayout
from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.hashing import hash_key
from hps_numba.runtime.gpu.sizing import CachePlan, plan_cache, sets_for_all


def model(*dims: int, **changes: Any) -> InferenceParams:
    """Return a model with a table for each dim."""
    given: dict[str, Any] = {
        "embedding_table_names": [f"t{i}" for i in range(len(dims))],
        "embedding_vecsize_per_table": list(dims),
        "maxnum_catfeature_query_per_table_per_sample": [2] * len(dims),
        "max_batchsize": 100,
    }
    return InferenceParams("m", **{**given, **changes})


@njit(nogil=True)
def fullest_set(keys: Any, n_sets: Any) -> Any:
    """Return the most keys that any set is asked to hold."""
    counts = np.zeros(n_sets, np.int64)
    for key in keys:
        hashed = hash_key(key)
        high = hashed >> np.uint64(32)
        low = hashed & np.uint64(0xFFFFFFFF)
        n = np.uint64(n_sets)
        counts[(high * n + ((low * n) >> np.uint64(32))) >> np.uint64(32)] += 1
    return counts.max()


def test_tables_whose_rows_are_alike_share_a_cache() -> None:
    params = model(
        16, 1, 16, 16, row_dtype_per_table=["float32", "float32", "float16", "float32"]
    )
    plan = plan_cache(params, [1000, 1000, 1000, 3000])
    assert [[spec.name for spec in group.specs] for group in plan.groups] == [
        ["t0", "t3"],
        ["t1"],
        ["t2"],
    ]
    assert [(g.layout.rows.dim, g.layout.rows.stored) for g in plan.groups] == [
        (16, "float32"),
        (1, "float32"),
        (16, "float16"),
    ]
    assert {g.layout.rows.out for g in plan.groups} == {"float32"}
    assert [g.file_rows for g in plan.groups] == [(1000, 3000), (1000,), (1000,)]


@pytest.mark.parametrize(
    ("share", "rows", "n_slots"),
    [
        (0.2, 1000, 8 * WAYS),
        (0.2, 140, WAYS),
        (0.2, 1, WAYS),
        (0.0, 10**6, WAYS),
        (0.5, 10**6, 17858 * WAYS),
    ],
)
def test_a_share_of_the_rows_is_rounded_up_to_whole_sets(
    share: float, rows: int, n_slots: int
) -> None:
    plan = plan_cache(model(8, cache_size_percentage=share), [rows])
    assert plan.n_slots("hps_et.m.t0") == n_slots
    assert plan.n_rows("hps_et.m.t0") == min(rows, n_slots)
    assert plan.groups[0].policy is Policy.LRU


def test_the_policy_of_a_dynamic_cache_is_configured() -> None:
    lfu = model(8, gpu_cache_policy="lfu")
    assert plan_cache(lfu, [100]).groups[0].policy is Policy.LFU
    static = lfu.replace(embedding_cache_type="static")
    assert plan_cache(static, [100]).groups[0].policy is Policy.STATIC


def test_a_table_without_files_has_room_for_one_lookup() -> None:
    plan = plan_cache(model(8, 8), [0, 10_000])
    assert plan.n_slots("hps_et.m.t0") == 8 * WAYS  # 100 samples of 2 keys
    assert plan.n_rows("hps_et.m.t0") == 8 * WAYS
    assert plan.n_slots("hps_et.m.t1") == 72 * WAYS


def test_the_bytes_of_a_plan_are_those_of_its_caches() -> None:
    plan = plan_cache(model(16, 7, 16, 32768), [5000, 100, 10**6, 300])
    layouts = [group.layout for group in plan.groups]
    assert [len(layout.tables) for layout in layouts] == [2, 1, 1]
    assert plan.n_bytes == sum(
        CacheLayout(layout.rows, layout.tables).n_bytes for layout in layouts
    )
    parts = [plan.table_bytes(f"hps_et.m.t{i}") for i in range(4)]
    assert sum(parts) == plan.n_bytes
    assert parts[2] > 10**6 // 5 * (64 + 8)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_all_rows_of_a_whole_table_have_a_place(kind: str) -> None:
    rows = [1, 28, 29, 5000, 200_000]
    params = model(1, 1, 1, 1, 1, cache_size_percentage=1.0, embedding_cache_type=kind)
    plan = plan_cache(params, rows)
    rng = np.random.default_rng(5)
    for i, n in enumerate(rows):
        n_sets = plan.n_slots(f"hps_et.m.t{i}") // WAYS
        for first in (0, int(rng.integers(1 << 62))):
            assert fullest_set(np.arange(first, first + n), n_sets) <= WAYS
        assert fullest_set(rng.integers(-(1 << 63), 1 << 63, n), n_sets) <= WAYS
        assert plan.n_rows(f"hps_et.m.t{i}") == n
    assert plan.groups[0].policy is (Policy.STATIC if kind == "static" else Policy.LRU)


def test_a_static_cache_ignores_the_share() -> None:
    whole = model(4, embedding_cache_type="static", cache_size_percentage=0.1)
    assert plan_cache(whole, [5000]).n_slots("hps_et.m.t0") == WAYS * sets_for_all(5000)


TABLES = st.lists(
    st.tuples(
        st.sampled_from([1, 7, 16, 128]),
        st.sampled_from(["float32", "float16"]),
        st.sampled_from([0, 0, 1, 29, 1000, 50_000, 10**6]),
    ),
    min_size=1,
    max_size=5,
)


def slots(tables: list[tuple[int, str, int]], budget: int) -> list[int]:
    """Return what a budget gives each table, after holding the plan to it."""
    plan = budgeted(tables, budget)
    assert plan.n_bytes <= budget
    return [plan.n_slots(f"hps_et.m.t{i}") for i in range(len(tables))]


def budgeted(tables: list[tuple[int, str, int]], budget: int) -> CachePlan:
    dims, dtypes, rows = zip(*tables, strict=True)
    params = model(*dims, row_dtype_per_table=dtypes, gpu_cache_bytes=budget)
    return plan_cache(params, rows)


def least_bytes(tables: list[tuple[int, str, int]]) -> int:
    """Return the least budget, as the refusal of a smaller one tells it."""
    with pytest.raises(ConfigError, match="model 'm': gpu_cache_bytes is 1") as caught:
        budgeted(tables, 1)
    return int(str(caught.value).rsplit(" ", 1)[1].replace(",", ""))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables=TABLES, above=st.integers(0, 1 << 28), more=st.integers(0, 1 << 22))
def test_a_budget_is_kept_and_a_larger_one_takes_no_slot_away(
    tables: list[tuple[int, str, int]], above: int, more: int
) -> None:
    least = least_bytes(tables)
    assert slots(tables, least) >= [WAYS] * len(tables)
    with pytest.raises(ConfigError, match="with a set for every table"):
        budgeted(tables, least - 1)
    few, many = slots(tables, least + above), slots(tables, least + above + more)
    for (_, _, rows), before, after in zip(tables, few, many, strict=True):
        assert WAYS <= before <= after
        assert not rows or after <= sets_for_all(rows) * WAYS


def test_a_budget_gives_all_tables_the_same_share_of_their_rows() -> None:
    tables = [(16, "float32", 10**6), (128, "float16", 10**5), (1, "float32", 10**6)]
    got = slots(tables, 1 << 26)
    whole = [sets_for_all(rows) * WAYS for _, _, rows in tables]
    assert got[0] == got[2]
    assert [n * 1000 // all_ for n, all_ in zip(got, whole, strict=True)] == [152] * 3


def test_a_set_more_for_every_table_is_beyond_the_budget() -> None:
    tables = [(16, "float32", 10**6), (128, "float16", 10**5)]
    for budget in (10**6, 20_000_000, 99_999_999):
        plan = budgeted(tables, budget)
        larger = [
            CacheLayout(layout.rows, (TableLayout.for_rows(table.n_slots + 1),))
            for layout in (group.layout for group in plan.groups)
            for table in layout.tables
        ]
        assert plan.n_bytes <= budget < sum(layout.n_bytes for layout in larger)


def test_what_every_row_needs_is_all_that_a_budget_is_used_for() -> None:
    tables = [(16, "float32", 10**4), (128, "float16", 500)]
    whole = [sets_for_all(10**4) * WAYS, sets_for_all(500) * WAYS]
    assert slots(tables, 1 << 40) == whole
    taken = budgeted(tables, 1 << 40).n_bytes
    assert slots(tables, taken) == whole
    assert slots(tables, taken - 1) < whole


def test_a_table_without_files_gets_as_much_as_the_average_then_what_is_left() -> None:
    tables = [(16, "float32", 10**5), (16, "float32", 0)]
    first, second = slots(tables, 1 << 22)
    assert first == second
    first, second = slots(tables, 1 << 28)
    assert first == sets_for_all(10**5) * WAYS < second
    assert budgeted(tables, 1 << 28).n_bytes > (1 << 28) - 2 * WAYS * 72 - 256


def test_tables_without_files_share_a_budget_by_the_keys_of_their_lookups() -> None:
    params = model(
        16,
        16,
        maxnum_catfeature_query_per_table_per_sample=[10, 30],
        gpu_cache_bytes=1 << 26,
    )
    plan = plan_cache(params, [0, 0])
    few, many = plan.n_slots("hps_et.m.t0"), plan.n_slots("hps_et.m.t1")
    assert 2.9 < many / few < 3.1
    assert plan.n_rows("hps_et.m.t1") == many > 600_000


def test_a_static_cache_that_its_budget_cannot_hold_is_refused() -> None:
    whole = model(16, 16, embedding_cache_type="static")
    needed = plan_cache(whole, [5000, 70]).n_bytes
    fits = plan_cache(whole.replace(gpu_cache_bytes=needed), [5000, 70])
    assert fits.n_bytes == needed
    with pytest.raises(ConfigError, match=f"every row takes at least {needed:,}$"):
        plan_cache(whole.replace(gpu_cache_bytes=needed - 1), [5000, 70])


def exact_tail(mean: Fraction) -> float:
    """Return the chance of more than 28, in rational numbers but for e."""
    below = sum(mean**k / math.factorial(k) for k in range(WAYS + 1))
    whole = sum(mean**k / math.factorial(k) for k in range(200))
    return float(1 - below / whole)


@pytest.mark.parametrize("n_rows", [29, 57, 1000, 10**4, 10**6, 10**8])
def test_the_fewest_sets_are_found_in_which_all_rows_find_a_place(n_rows: int) -> None:
    n_sets = sets_for_all(n_rows)
    assert n_sets * exact_tail(Fraction(n_rows, n_sets)) < 1e-3
    assert (n_sets - 1) * exact_tail(Fraction(n_rows, n_sets - 1)) >= 1e-3


def test_a_place_for_every_row_costs_this_many_slots_a_row() -> None:
    slots = {n: sets_for_all(n) * WAYS / n for n in (10**4, 10**6, 10**8)}
    assert {n: round(each, 2) for n, each in slots.items()} == {
        10**4: 2.76,
        10**6: 3.5,
        10**8: 4.35,
    }


def test_what_cannot_be_planned_names_the_table() -> None:
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t1: rows of 32769 values"):
        plan_cache(model(4, 32769), [10, 10])
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t1: a static cache holds"):
        plan_cache(model(4, 4, embedding_cache_type="static"), [10, 0])
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t0: a GPU cache of 5,000,000,0"):
        plan_cache(model(1, cache_size_percentage=0.5), [10**10])
