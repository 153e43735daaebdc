"""Random operations of every kernel on every type of row, each one compared."""

from __future__ import annotations

from collections import Counter

import pytest

from hps_numba.kernels.cuda.layout import Policy, RowLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.sequences import TABLES, RandomOperations

N_KEYS = 10_000
KERNELS = {"query", "scatter", "insert", "update", "evict", "dump"}
POOLED = {"pooled query", "pooled scatter"}
ROWS = [
    RowLayout(4, "float32"),
    RowLayout(7, "float16"),
    RowLayout(20, "float16", "float16"),
    RowLayout(3, "bfloat16"),
    RowLayout(16, "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: rows.name)
def test_ten_thousand_keys_a_kernel_are_as_the_oracle_has_them(rows: RowLayout) -> None:
    cache = CheckedCache(rows, TABLES)
    RandomOperations(cache, seed=rows.dim + 2).run(N_KEYS)
    wanted = KERNELS | POOLED if rows.out == "float32" else KERNELS
    assert {kernel for kernel, n in cache.keys.items() if n >= N_KEYS} >= wanted
    totals = sum((table.totals for table in cache.oracle.tables), Counter())
    assert totals.keys() >= {"hits", "misses", "inserted", "evicted", "refused"}


@pytest.mark.parametrize("policy", [Policy.LFU, Policy.STATIC])
def test_other_policies_are_as_the_oracle_has_them(policy: Policy) -> None:
    cache = CheckedCache(RowLayout(4), TABLES, policy)
    RandomOperations(cache, seed=7).run(2000)


@pytest.mark.parametrize("schedule", ["uniform", "priority"])
def test_warps_of_a_launch_may_come_in_any_order(schedule: str) -> None:
    cache = CheckedCache(RowLayout(4), TABLES, schedule=schedule, preempt=0.02)
    RandomOperations(cache, seed=8).run(1000)
