"""Every operation on a large table of each row type, compared with the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import Policy, RowLayout
from tests.gpu.bigtable import BigTable
from tests.gpu.mirrored import MirroredMemory
from tests.gpu.vectors import finite_rows
from tests.kernels.cuda.comparisons import check_pooled_misses
from tests.kernels.cuda.oracle import Array, handed_out

CASES = (
    (RowLayout(32), Policy.LRU),
    (RowLayout(128), Policy.LRU),
    (RowLayout(64, "float16"), Policy.LRU),
    (RowLayout(32, "float16", "float16"), Policy.LFU),
    (RowLayout(3), Policy.STATIC),
    (RowLayout(7, "bfloat16", "bfloat16"), Policy.LRU),
    (RowLayout(24, "bfloat16"), Policy.LFU),
    (RowLayout(1, "float16"), Policy.LRU),
)
N_LARGEST = 2  # cases that have all the keys
POOLED = (
    (RowLayout(32), Policy.LRU),
    (RowLayout(64, "float16"), Policy.LRU),
    (RowLayout(3), Policy.STATIC),
)


def check_operations(
    gpu: Gpu, n_keys: int, n_cases: int = 8
) -> Iterator[tuple[str, int]]:
    """Run every operation on ``n_keys`` keys; yield how many were compared.

    All but the first cases have a quarter of the keys.
    """
    for seed, (rows, policy) in enumerate(CASES[:n_cases]):
        memory = MirroredMemory(gpu)
        try:
            n = n_keys if seed < N_LARGEST else n_keys // 4
            table = BigTable(memory, rows, policy, n_keys=2 * n, seed=seed)
            _run(table, memory)
        finally:
            memory.close()
        yield f"{rows.name}, {policy.value}", table.compared


def _run(table: BigTable, memory: MirroredMemory) -> None:
    n, rng = len(table.keys) // 2, table.rng
    order = rng.permutation(2 * n)
    # The extreme keys are looked for, written and removed with the others.
    order = np.concatenate([np.arange(7), order[order >= 7]])
    some, others = order[:n], order[n:]
    with memory.scratch():
        table.insert_new(some[: 4 * n // 5], epoch=0)
        table.insert_new(some[4 * n // 5 :], epoch=0)
        mixed = _mixed(table, n)
        answer = table.query(mixed)
        table.scatter(answer, mixed, len(answer.unique()) // 3 + 1)
    with memory.scratch():
        table.query(_mixed(table, n), fill=True)
        table.query(_mixed(table, n), count_unique=True)
        table.update(_part(rng, order, n // 3), epoch=1)
        # What was read before the update is refused.
        table.insert_new(_part(rng, np.flatnonzero(~table.inside), n // 3), epoch=0)
        table.insert_new(_part(rng, np.flatnonzero(~table.inside), n // 2), epoch=1)
        table.query(_mixed(table, n))
    with memory.scratch():
        table.replace(_part(rng, np.flatnonzero(table.inside), n // 3), epoch=1)
        table.evict(_part(rng, order, n // 3), epoch=2)
        table.dump()
        table.query(others)
        table.clear(epoch=3)
        table.insert_new(others[: n // 2], epoch=3)
        table.query(_mixed(table, n), fill=True)


def _part(rng: np.random.Generator, numbers: Array, n: int) -> Array:
    """Return some numbers, each once; the extreme keys' if they are there."""
    first = numbers[numbers < 7]
    rest = rng.permutation(numbers[numbers >= 7])
    return np.concatenate([first, rest])[:n]


def _mixed(table: BigTable, n: int) -> Array:
    """Return numbers of keys, some of them often, the extreme ones among them."""
    rng, n_all = table.rng, len(table.keys)
    drawn = rng.integers(0, n_all, n)
    drawn[: n // 4] = rng.integers(0, max(1, n // 64), n // 4)
    drawn[:7] = np.arange(7)
    return rng.permutation(drawn)


# -- sums -----------------------------------------------------------------------------


def check_pooled(gpu: Gpu, n_keys: int, n_cases: int = 3) -> Iterator[tuple[str, int]]:
    """Pool ``n_keys`` keys in bags of any length, with and without weights."""
    for seed, (rows, policy) in enumerate(POOLED[:n_cases]):
        memory = MirroredMemory(gpu)
        try:
            table = BigTable(
                memory, rows, policy, n_keys=n_keys, seed=seed, rows_of=finite_rows
            )
            with memory.scratch():
                table.insert_new(np.arange(n_keys // 2), epoch=0)
            for mean in (False, True):
                with memory.scratch():
                    _pool(table, n_keys, mean=mean, weighted=not mean, fill=False)
                    _pool(table, n_keys, mean=mean, weighted=mean, fill=True)
        finally:
            memory.close()
        yield f"pooled, {rows.name}, {policy.value}", table.compared


def _pool(table: BigTable, n: int, *, mean: bool, weighted: bool, fill: bool) -> None:
    numbers, begins = _mixed(table, n), _begins(table.rng, n)
    keys, hit = table.keys[numbers], table.inside[numbers]
    weights = None
    if weighted:
        weights = table.rng.standard_normal(n).astype(np.float32)
    run = table.cpu.pooled_query(keys, begins, weights=weights, mean=mean, fill=fill)
    answer = run[0]
    rows = handed_out(table.rows_now(numbers), table.rows).astype(np.float64)
    rows[~hit] = handed_out(table.default, table.rows)
    factors = np.ones(n) if weights is None else weights.astype(np.float64)
    if mean:
        lengths = np.diff(begins)
        factors /= np.repeat(lengths, lengths)
    sums, slack = _sums(rows, np.where(hit | fill, factors, 0), begins)
    _check_sums(answer.out, sums, slack)
    missed = _bags_with(~hit, begins)
    found = SimpleNamespace(
        looked=SimpleNamespace(hit=hit, unique_missing=np.unique(keys[~hit]).tolist()),
        missed=missed.tolist(),
        sums=sums,
    )
    check_pooled_misses(answer, keys, [found])  # type: ignore[list-item] # as much of it
    unique = table.numbers_of(answer.unique().copy())
    fetched = table.rows_now(unique)
    table.cpu.pooled_scatter(run, 0, fetched)
    rows = handed_out(table.rows_now(numbers), table.rows).astype(np.float64)
    more, more_slack = _sums(rows, np.where(hit, 0, factors), begins)
    more_slack += slack + 2.0**-23 * np.abs(sums)
    _check_sums(answer.out, sums + more, more_slack)
    table.compared += n


def _begins(rng: np.random.Generator, n: int) -> Array:
    """Return where bags begin: empty ones, single keys, long ones."""
    lengths = rng.choice([0, 1, 2, 7, 31, 32, 33, 65, 400], n)
    ends = np.cumsum(lengths)
    return np.concatenate([[0], ends[ends < n], [n]]).astype(np.int64)


def _sums(rows: Array, factors: Array, begins: Array) -> tuple[Array, Array]:
    """Return each bag's sum, and how far off float32 may be; see ``oracle.pool``."""
    lengths = np.diff(begins)
    sums = np.zeros((len(lengths), rows.shape[1]))
    slack = np.zeros_like(sums)
    full = lengths > 0
    parts = rows * factors[:, None]
    sums[full] = np.add.reduceat(parts, begins[:-1][full])
    total = np.add.reduceat(np.abs(parts), begins[:-1][full])
    rounded = (lengths[full] + 6)[:, None]
    slack[full] = rounded * (2.0**-24 * total + 2.0**-149)
    return sums, slack


def _bags_with(some: Array, begins: Array) -> Array:
    lengths = np.diff(begins)
    bags = np.repeat(np.arange(len(lengths)), lengths)
    return np.unique(bags[some])


def _check_sums(got: Array, sums: Array, slack: Array) -> None:
    wrong = np.flatnonzero((np.abs(got - sums) > slack).any(1))
    assert not len(wrong), f"{len(wrong)} sums are wrong, that of bag {wrong[:3]}"
