"""How many sets the tables of a model get, and what they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hps_numba.config import InferenceParams
from hps_numba.errors import ConfigError
from hps_numba.kernels.cuda.layout import WAYS, CacheLayout, Policy, TableLayout
from hps_numba.kernels.cuda.pairs import HOME_ROOM
from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.hashing import hash_key
from hps_numba.runtime.gpu.sizing import (
    MAX_SETS,
    ROWS_A_SET,
    CachePlan,
    plan_cache,
    sets_for_all,
)

Array = NDArray[np.float64]


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
def scaled(word: Any, n: Any) -> Any:
    """Return the upper 64 bits of ``word * n``; ``n`` has 32 bits at most."""
    high, low = word >> np.uint64(32), word & np.uint64(0xFFFFFFFF)
    return (high * n + ((low * n) >> np.uint64(32))) >> np.uint64(32)


@njit(nogil=True)
def without_place(keys: Any, n_sets: Any) -> Any:
    """Return how many keys find both of their sets full, and how many are at home."""
    counts = np.zeros(n_sets, np.int64)
    n_out, n_home = 0, 0
    for key in keys:
        hashed = hash_key(key)
        home = scaled(hashed, np.uint64(n_sets))
        second = home + np.uint64(1)
        second += scaled(hashed << np.uint64(24), np.uint64(n_sets - 1))
        if second >= np.uint64(n_sets):
            second -= np.uint64(n_sets)
        room, spare = WAYS - counts[home], WAYS - counts[second]
        if room > 0 and (room >= HOME_ROOM or room >= spare):
            counts[home] += 1
            n_home += 1
        elif spare > 0:
            counts[second] += 1
        else:
            n_out += 1
    return n_out, n_home


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
            assert without_place(np.arange(first, first + n), n_sets)[0] == 0
        assert without_place(rng.integers(-(1 << 63), 1 << 63, n), n_sets)[0] == 0
        assert plan.n_rows(f"hps_et.m.t{i}") == n
    assert [group.policy for group in plan.groups] == [Policy.STATIC]


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
    assert [n * 1000 // all_ for n, all_ in zip(got, whole, strict=True)] == [447] * 3


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


def inflow(shares: Array) -> Array:
    """Return how fast sets of each size get keys, where one key a set has come.

    ``shares`` are those of the sets with 0 to 28 keys. A key goes home if home has 8
    ways free or as many as its other set, else to the other one.
    """
    rates = np.zeros(WAYS + 1)
    at_least = np.cumsum(shares[::-1])[::-1]
    for size in range(WAYS):
        crowded = WAYS - size < HOME_ROOM
        rates[size] = shares[size] * (at_least[size] if crowded else 1.0)
        rates[size] += shares[size] * at_least[max(size, WAYS - HOME_ROOM) + 1]
    return rates


def growth(shares: Array) -> Array:
    rates = inflow(shares)
    return np.append(0.0, rates[:-1]) - rates


def test_not_even_the_largest_table_is_expected_to_lack_a_place() -> None:
    # In a large table the shares of sets of each size follow a differential equation.
    shares, out, step = np.eye(1, WAYS + 1)[0], 0.0, 1 / 200
    for _ in range(round(ROWS_A_SET / step)):
        first = growth(shares)
        second = growth(shares + step / 2 * first)
        third = growth(shares + step / 2 * second)
        last = growth(shares + step * third)
        before = shares[WAYS] ** 2
        shares = shares + step / 6 * (first + 2 * second + 2 * third + last)
        out += step / 2 * (before + shares[WAYS] ** 2)
    assert shares.sum() == pytest.approx(1)
    assert np.arange(WAYS + 1) @ shares == pytest.approx(ROWS_A_SET)
    # Expected keys without a place, over the sets of the largest table.
    assert 0 < out * MAX_SETS < 1e-4


@pytest.mark.parametrize(
    ("n_rows", "n_tables"),
    [(57, 10_000), (500, 10_000), (10**4, 1000), (10**6, 10), (10**7, 1)],
)
def test_every_row_of_every_table_finds_a_place(n_rows: int, n_tables: int) -> None:
    n_sets, n_home = sets_for_all(n_rows), 0
    for i in range(n_tables):
        keys = np.arange(n_rows) + (i << 40)
        n_out, at_home = without_place(keys, n_sets)
        assert n_out == 0
        n_home += at_home
    assert n_home / (n_rows * n_tables) > 0.85


def test_with_a_tenth_of_the_sets_less_rows_lack_a_place() -> None:
    n_out, _ = without_place(np.arange(10**6), sets_for_all(10**6) * 9 // 10)
    assert n_out > 100


def test_a_place_for_every_row_costs_this_many_slots_a_row() -> None:
    slots = {n: sets_for_all(n) * WAYS / n for n in (1000, 10**4, 10**6, 10**8)}
    assert {n: round(each, 3) for n, each in slots.items()} == {
        1000: 1.176,
        10**4: 1.168,
        10**6: 1.167,
        10**8: 1.167,
    }
    assert [sets_for_all(n) for n in (1, 28, 29, 48, 49)] == [1, 1, 2, 2, 3]


def test_rows_that_all_have_a_place_need_not_yield() -> None:
    whole = model(4, 4, cache_size_percentage=1.0, gpu_cache_policy="lfu")
    plan = plan_cache(whole, [5000, 0])
    policies = {group.specs[0].name: group.policy for group in plan.groups}
    assert policies == {"t0": Policy.STATIC, "t1": Policy.LFU}
    nearly = plan_cache(whole.replace(cache_size_percentage=0.99), [5000, 20])
    assert [group.policy for group in nearly.groups] == [Policy.LFU]


def test_a_budget_for_all_rows_of_all_tables_makes_nobody_yield() -> None:
    tables = [(16, "float32", 10**4), (16, "float32", 20), (16, "float32", 0)]
    plenty = budgeted(tables, 1 << 28)
    assert [[spec.name for spec in group.specs] for group in plenty.groups] == [
        ["t0", "t1"],
        ["t2"],
    ]
    assert [group.policy for group in plenty.groups] == [Policy.STATIC, Policy.LRU]
    scarce = budgeted(tables, 1 << 20)
    assert [group.policy for group in scarce.groups] == [Policy.LRU]


def test_what_cannot_be_planned_names_the_table() -> None:
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t1: rows of 32769 values"):
        plan_cache(model(4, 32769), [10, 10])
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t1: a static cache holds"):
        plan_cache(model(4, 4, embedding_cache_type="static"), [10, 0])
    with pytest.raises(ConfigError, match=r"hps_et\.m\.t0: a GPU cache of 5,000,000,0"):
        plan_cache(model(1, cache_size_percentage=0.5), [10**10])
