"""Tables to measure on, and the set-ups that return a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from bench.defaults import SEED
from bench.harness import Call, Setup
from bench.workloads import Sampler, table_rows, unique
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, RowBlock, RowDtype, Rows, TableSpec

Fetch = Callable[[Keys, Rows], object]

BLOCK_ROWS = 65_536


def spec(
    dim: int, *, name: str = "table", dtype: RowDtype = RowDtype.FLOAT32
) -> TableSpec:
    """Return the table that a benchmark fills."""
    return TableSpec("bench", name, dim, dtype)


def shuffled_keys(n_rows: int) -> Keys:
    """Return the keys ``0 .. n_rows - 1`` in the order in which tables are filled."""
    return np.random.default_rng(SEED).permutation(n_rows).astype(np.int64)


def blocks_of(keys: Keys) -> Iterator[Keys]:
    """Yield the keys in blocks."""
    for start in range(0, len(keys), BLOCK_ROWS):
        yield keys[start : start + BLOCK_ROWS]


def blocks(keys: Keys, table: TableSpec) -> Iterator[RowBlock]:
    """Yield the rows of keys in blocks."""
    for part in blocks_of(keys):
        yield RowBlock(part, table_rows(part, table.dim, table.dtype.value))


def warm(tier: Tier, table: TableSpec, n_rows: int) -> None:
    """Fetch every row once, so that the tier's cache holds it."""
    for keys in blocks_of(np.arange(n_rows, dtype=np.int64)):
        rows = np.empty((keys.size, table.dim), table.numpy_dtype)
        found = np.zeros(keys.size, np.bool_)
        assert tier.fetch(table.tag, keys, rows, found) == keys.size, "rows were lost"


def fill(tier: Tier, table: TableSpec, n_rows: int) -> None:
    """Open the table in the tier and load the keys ``0 .. n_rows - 1``."""
    tier.open_table(table)
    tier.load(table.tag, blocks(shuffled_keys(n_rows), table))


def fetching(tier: Tier, table: TableSpec, sampler: Sampler, batch: int) -> Setup:
    """Time ``tier.fetch`` of fresh keys; its answers are checked once, here."""
    found = np.zeros(batch, np.bool_)

    def fetch(keys: Keys, out: Rows) -> None:
        tier.fetch(table.tag, keys, out, found)

    timed = reading(fetch, table, sampler, batch)

    def setup() -> Call:
        found.fill(False)
        return timed()

    return setup


def reading(fetch: Fetch, table: TableSpec, sampler: Sampler, batch: int) -> Setup:
    """Time a function that fills ``out``; its answers are checked once, here.

    Raises
    ------
    AssertionError
        If it returns wrong rows: its speed would mean nothing.
    """
    out = np.empty((batch, table.dim), table.numpy_dtype)
    keys = sampler(batch)
    fetch(keys, out)
    np.testing.assert_array_equal(out, table_rows(keys, table.dim, table.dtype.value))

    def setup() -> Call:
        keys = sampler(batch)

        def call() -> None:
            fetch(keys, out)

        return call

    return setup


def callers(n: int) -> str:
    """Return how results call a number of calling threads."""
    return f"{n} callers" if n > 1 else "1 caller"


def together(pool: Executor, setups: Sequence[Setup]) -> Setup:
    """Time calls that run at once, one in each thread of the pool."""

    def setup() -> Call:
        calls = [make() for make in setups]

        def call() -> None:
            for done in [pool.submit(one) for one in calls]:
                done.result()

        return call

    return setup


def updating(tier: Tier, table: TableSpec, sampler: Sampler, n: int) -> Setup:
    """Time new rows for ``n`` keys that the tier holds."""
    rows = table_rows(np.arange(n), table.dim, table.dtype.value)

    def setup() -> Call:
        keys = unique(sampler, n)
        return lambda: tier.insert(table.tag, keys, rows)

    return setup


def backfilling(tier: Tier, table: TableSpec, sampler: Sampler, n: int) -> Setup:
    """Time backfills of ``n`` keys that the tier has just forgotten."""
    rows = table_rows(np.arange(n), table.dim, table.dtype.value)

    def setup() -> Call:
        keys = unique(sampler, n)
        tier.evict(table.tag, keys)
        epoch = tier.epoch(table.tag)

        def call() -> None:
            stored = tier.backfill(table.tag, keys, rows, epoch)
            assert stored == n, f"{n - stored} of {n} backfills were refused"

        return call

    return setup


def evicting(tier: Tier, table: TableSpec, sampler: Sampler, n: int) -> Setup:
    """Time evictions of ``n`` keys that the tier holds."""
    return _removing(tier.evict, tier, table, sampler, n)


def deleting(tier: Tier, table: TableSpec, sampler: Sampler, n: int) -> Setup:
    """Time deletions of ``n`` keys that the tier holds."""
    return _removing(tier.delete, tier, table, sampler, n)


def _removing(
    remove: Callable[[str, Keys], int],
    tier: Tier,
    table: TableSpec,
    sampler: Sampler,
    n: int,
) -> Setup:
    rows = table_rows(np.arange(n), table.dim, table.dtype.value)

    def setup() -> Call:
        keys = unique(sampler, n)
        tier.insert(table.tag, keys, rows)

        def call() -> None:
            removed = remove(table.tag, keys)
            assert removed == n, f"{n - removed} of {n} keys were not there"

        return call

    return setup
