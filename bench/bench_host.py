"""The host memory tier: against plain tables, by batch size, threads and policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np

from bench import defaults
from bench.baselines import DenseTable, DictTable
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Param, Result, counted
from bench.setups import (
    backfilling,
    callers,
    evicting,
    fetching,
    fill,
    reading,
    spec,
    together,
    updating,
)
from bench.workloads import SAMPLERS, table_rows, uniform, unique
from hps_numba.tiers.host import HostTier
from hps_numba.types import OverflowPolicy, RowDtype, TableSpec

BY_DICT = "dict + np.take"
BY_NUMBER = "np.take by row number"


def host_fetch(run: Run) -> Iterator[Result]:
    """Compare a fetch with a dict, with a gather by row number, with two threads."""
    n_rows, batch = run.sizes.n_rows, run.sizes.host_batch
    for dim in run.sizes.dims:
        table, rows = spec(dim), table_rows(np.arange(n_rows), dim)
        mapped, dense = DictTable(np.arange(n_rows), rows), DenseTable(rows)
        with closing(HostTier()) as one, closing(HostTier(num_threads=2)) as two:
            fill(one, table, n_rows)
            fill(two, table, n_rows)
            for keys in ("uniform", "zipf"):
                sampler = SAMPLERS[keys](n_rows, SEED)
                setups = {
                    "host": fetching(one, table, sampler, batch),
                    "host, 2 threads": fetching(two, table, sampler, batch),
                    BY_DICT: reading(mapped.fetch, table, sampler, batch),
                    BY_NUMBER: reading(dense.fetch, table, sampler, batch),
                }
                yield from compare(
                    run,
                    "host_fetch",
                    [Variant(name, s, batch) for name, s in setups.items()],
                    params=_params(run, dim, batch=batch, keys=keys),
                    claims=_fetch_claims(dim, promised=keys == "uniform"),
                )


def host_batches(run: Run) -> Iterator[Result]:
    """Time a fetch by batch size."""
    for dim in run.sizes.dims:
        table = spec(dim)
        sampler = uniform(run.sizes.n_rows, seed=SEED)
        with closing(HostTier()) as tier:
            fill(tier, table, run.sizes.n_rows)
            variants = [
                Variant(f"batch {n}", fetching(tier, table, sampler, n), n)
                for n in run.sizes.batches
            ]
            params = _params(run, dim, keys="uniform")
            yield from compare(run, "host_batches", variants, params=params)


def host_threads(run: Run) -> Iterator[Result]:
    """Time fetches from several caller's threads at once."""
    batch = run.sizes.host_batch
    for dim in run.sizes.dims:
        table = spec(dim)
        sampler = uniform(run.sizes.n_rows, seed=SEED)
        with ExitStack() as stack:
            tier = stack.enter_context(closing(HostTier()))
            fill(tier, table, run.sizes.n_rows)
            variants = [
                Variant(
                    callers(n),
                    together(
                        stack.enter_context(ThreadPoolExecutor(n)),
                        [fetching(tier, table, sampler, batch) for _ in range(n)],
                    ),
                    n * batch,
                )
                for n in run.sizes.threads
            ]
            one = callers(run.sizes.threads[0])
            yield from compare(
                run,
                "host_threads",
                variants,
                params=_params(run, dim, batch=batch, keys="uniform"),
                claims=[Claim(v.name, one) for v in variants[1:]],
            )


def host_writes(run: Run) -> Iterator[Result]:
    """Time inserts of new rows, updates, backfills and evictions."""
    n = run.sizes.write_rows
    for dim in run.sizes.dims:
        table, sampler = spec(dim), uniform(run.sizes.n_rows, seed=SEED)
        with closing(HostTier()) as tier:
            fill(tier, table, run.sizes.n_rows)
            setups = {
                "insert into an empty table": _filling(table, n),
                "update": updating(tier, table, sampler, n),
                "backfill": backfilling(tier, table, sampler, n),
                "evict": evicting(tier, table, sampler, n),
            }
            yield from compare(
                run,
                "host_writes",
                [Variant(name, s, n) for name, s in setups.items()],
                params=_params(run, dim, batch=n),
            )


def host_policies(run: Run) -> Iterator[Result]:
    """Compare the eviction policies, on fetches and on inserts into a full table."""
    n_rows, batch, dim = run.sizes.n_rows, run.sizes.host_batch, run.sizes.dims[0]
    table, sampler = spec(dim), uniform(n_rows, seed=SEED)
    fetches, inserts = [], []
    with ExitStack() as stack:
        for policy in OverflowPolicy:
            roomy = stack.enter_context(closing(HostTier(overflow_policy=policy)))
            fill(roomy, table, n_rows)
            read = fetching(roomy, table, sampler, batch)
            fetches.append(Variant(policy.value, read, batch))
            full = HostTier(overflow_policy=policy, overflow_margin=n_rows // 2)
            stack.enter_context(closing(full))
            fill(full, table, n_rows)
            inserts.append(
                Variant(policy.value, _overflowing(full, table, n_rows, batch), batch)
            )
        params = _params(run, dim, batch=batch)
        claims = [
            Claim(policy.value, OverflowPolicy.EVICT_RANDOM.value)
            for policy in OverflowPolicy
            if policy is not OverflowPolicy.EVICT_RANDOM
        ]
        for name, variants in (
            ("host_policies_fetch", fetches),
            ("host_policies_insert", inserts),
        ):
            yield from compare(run, name, variants, params=params, claims=claims)


def host_dtypes(run: Run) -> Iterator[Result]:
    """Compare rows stored as float16 with float32."""
    batch = run.sizes.host_batch
    for dim in run.sizes.dims:
        sampler = uniform(run.sizes.n_rows, seed=SEED)
        with ExitStack() as stack:
            variants = []
            for dtype in RowDtype:
                table = spec(dim, dtype=dtype)
                tier = stack.enter_context(closing(HostTier()))
                fill(tier, table, run.sizes.n_rows)
                read = fetching(tier, table, sampler, batch)
                variants.append(Variant(dtype.value, read, batch))
            yield from compare(
                run,
                "host_dtypes",
                variants,
                params=_params(run, dim, batch=batch, keys="uniform"),
                claims=[Claim(RowDtype.FLOAT16.value, RowDtype.FLOAT32.value)],
            )


def host_memory(run: Run) -> Iterator[Result]:
    """Count the bytes that a row takes, its part of the index included."""
    for dim in run.sizes.dims:
        for dtype in RowDtype:
            table = spec(dim, dtype=dtype)
            with closing(HostTier()) as tier:
                fill(tier, table, run.sizes.n_rows)
                stats = tier.stats(table.tag)
            yield counted(
                "host_memory",
                dtype.value,
                stats.bytes / stats.rows,
                unit="bytes/row",
                params={**_params(run, dim), "row_bytes": table.row_bytes},
                where=run.where,
            )


def _params(run: Run, dim: int, **more: Param) -> dict[str, Param]:
    return {"dim": dim, "n_rows": run.sizes.n_rows, **more}


def _fetch_claims(dim: int, *, promised: bool) -> list[Claim]:
    floors = (
        defaults.HOST_AGAINST_DICT.get(dim),
        defaults.HOST_AGAINST_DENSE.get(dim),
        defaults.HOST_TWO_THREADS,
    )
    by_dict, by_number, two = floors if promised else (None, None, None)
    return [
        Claim("host", BY_DICT, by_dict),
        Claim("host", BY_NUMBER, by_number),
        Claim("host, 2 threads", "host", two),
    ]


def _filling(table: TableSpec, n: int) -> Setup:
    keys = unique(uniform(4 * n, seed=SEED), n)
    rows = table_rows(keys, table.dim)

    def setup() -> Call:
        tier = HostTier()
        tier.open_table(table)
        return lambda: tier.insert(table.tag, keys, rows)

    return setup


def _overflowing(tier: HostTier, table: TableSpec, n_rows: int, n: int) -> Setup:
    first, rows = n_rows, table_rows(np.arange(n), table.dim)

    def setup() -> Call:
        nonlocal first
        keys = np.arange(first, first + n)
        first += n
        return lambda: tier.insert(table.tag, keys, rows)

    return setup


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (
    host_fetch,
    host_batches,
    host_threads,
    host_writes,
    host_policies,
    host_dtypes,
    host_memory,
)
