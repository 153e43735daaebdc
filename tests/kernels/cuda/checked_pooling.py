"""Pooled queries of a checked cache, and what is added to their bags later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.operands import Bags, Batch
from tests.kernels.cuda import oracle as model
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.comparisons import check_pooled_misses, check_sums
from tests.kernels.cuda.harness import Answer
from tests.kernels.cuda.oracle import Array, Pooled

Part = list[list[int]]  # the bags of one table


@dataclass
class PooledRun:
    """One pooled query and what it was given."""

    parts: Sequence[Part]
    weights: list[list[list[float]]] | None  # of the same shape
    mean: bool
    answer: tuple[Answer, Batch, Bags]
    found: list[Pooled]

    def bags(self, table: int) -> slice:
        start = sum(map(len, self.parts[:table]))
        return slice(start, start + len(self.parts[table]))

    def weights_of(self, table: int) -> list[list[float]] | None:
        return None if self.weights is None else self.weights[table]


def pooled_query(
    cache: CheckedCache,
    *parts: Part,
    weights: Array | None = None,
    mean: bool = False,
    fill: bool = False,
    first_table: int = 0,
    **options: Any,
) -> PooledRun:
    """Pool the bags of each table, from the first one on, and compare.

    ``weights`` are those of all keys, one after the other.
    """
    bags = [bag for part in parts for bag in part]
    keys = np.array([key for bag in bags for key in bag], np.int64)
    tables = None
    if len(parts) > 1:
        tables = np.cumsum([0, *map(len, parts)]).tolist()
    answer = cache.cpu.pooled_query(
        keys,
        np.cumsum([0, *map(len, bags)]),
        weights=weights,
        mean=mean,
        tables=tables,
        fill=fill,
        first_table=first_table,
        **options,
    )
    cache.count("pooled query", len(keys))
    split = _like(parts, weights)
    run = PooledRun(parts, split, mean, answer, [])
    changed = {}
    for i, part in enumerate(parts):
        table = first_table + i
        before = cache.scores(table)
        found = cache.oracle.pooled_query(
            table, part, weights=run.weights_of(i), mean=mean, fill=fill
        )
        run.found.append(found)
        check_sums(answer[0].out[run.bags(i)], found)
        n_keys, n_hits = len(found.looked.places), sum(found.looked.touched.values())
        results = [n_keys - n_hits, len(found.looked.unique_missing), n_hits]
        assert answer[0].results(i) == [*results, len(found.missed)]
        cache.adopt_counts(table, found.looked, before)
        changed[table] = {n_set for n_set, _ in found.looked.touched}
    cache.check(changed)
    check_pooled_misses(answer[0], keys, run.found)
    return run


def _like(parts: Sequence[Part], flat: Array | None) -> list[list[list[float]]] | None:
    if flat is None:
        return None
    left = iter(flat.tolist())
    return [[[next(left) for _ in bag] for bag in part] for part in parts]


def pooled_scatter(
    cache: CheckedCache, run: PooledRun, table: int, values: Array, first: int = 0
) -> None:
    """Add rows of unique missing keys from ``first`` on to their bags, and compare."""
    answer = run.answer[0]
    unique = answer.unique(table).tolist()[first : first + len(values)]
    rows = model.handed_out(values, cache.rows)
    fetched = dict(zip(unique, rows, strict=False))
    others = np.ones(len(answer.out), bool)
    others[run.bags(table)] = False
    before = answer.out.copy()
    cache.cpu.pooled_scatter(run.answer, table, values, first)
    cache.count("pooled scatter", answer.results(table)[0])
    run.found[table] = model.pooled_scatter(
        run.found[table],
        run.parts[table],
        fetched,
        weights=run.weights_of(table),
        mean=run.mean,
    )
    check_sums(answer.out[run.bags(table)], run.found[table])
    assert before[others].tobytes() == answer.out[others].tobytes()
    cache.check({table: ()})
