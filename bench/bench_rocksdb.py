"""The RocksDB tier: against plain use of the same database and against db_bench."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np

from bench import defaults
from bench.baselines import DbBench, RocksdictTable
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Param, Result
from bench.setups import (
    blocks,
    blocks_of,
    deleting,
    fetching,
    fill,
    reading,
    shuffled_keys,
    spec,
    updating,
    warm,
)
from bench.workloads import table_rows, uniform
from hps_numba.tiers.model_files import open_model_directory, write_model_directory
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import RowBlock, TableSpec

TIER = "rocksdb"
TIER_ONE_THREAD = "rocksdb, 1 thread"
PER_KEY = "rocksdict, key by key"
DB_BENCH = "db_bench, batches of 1000"
BULK = "model files, shuffled keys"
BULK_ASCENDING = "model files, ascending keys"
BATCHES = "WriteBatch of 1000"


def rocksdb_fetch(run: Run) -> Iterator[Result]:
    """Compare a fetch from the block cache with rocksdict key by key and db_bench."""
    sizes, absent = run.sizes, DbBench.absent()
    for dim in sizes.dims:
        table, sampler = spec(dim), uniform(sizes.n_rows, seed=SEED)
        with ExitStack() as stack:
            setups: dict[str, Setup] = {}
            for name, threads in ((TIER, sizes.rocks_threads), (TIER_ONE_THREAD, 1)):
                tier = _filled(run, f"{dim}-{threads}", table, threads=threads)
                stack.enter_context(closing(tier))
                setups[name] = fetching(tier, table, sampler, sizes.rocks_batch)
            plain = stack.enter_context(closing(_plain(run, table, sizes.n_rows)))
            setups[PER_KEY] = reading(plain.fetch, table, sampler, sizes.rocks_batch)
            variants = [Variant(n, s, sizes.rocks_batch) for n, s in setups.items()]
            if not absent:
                variants.append(_db_bench_in_cache(run, table))
            yield from compare(
                run,
                "rocksdb_fetch",
                variants,
                params=_params(run, dim, batch=sizes.rocks_batch, keys="uniform"),
                claims=_fetch_claims(dim),
                absent=absent,
            )


def rocksdb_batches(run: Run) -> Iterator[Result]:
    """Time a fetch from the block cache by batch size."""
    for dim in run.sizes.dims:
        table, sampler = spec(dim), uniform(run.sizes.n_rows, seed=SEED)
        with closing(_filled(run, f"batches-{dim}", table)) as tier:
            variants = [
                Variant(f"batch {n}", fetching(tier, table, sampler, n), n)
                for n in run.sizes.rocks_batches
            ]
            params = _params(run, dim, keys="uniform")
            yield from compare(run, "rocksdb_batches", variants, params=params)


def rocksdb_disk(run: Run) -> Iterator[Result]:
    """Compare reads of a table that is several times the block cache, from disk."""
    sizes, absent = run.sizes, DbBench.absent()
    table = spec(sizes.disk_dim)
    sampler = uniform(sizes.disk_rows, seed=SEED)
    n = sizes.disk_reads
    with ExitStack() as stack:
        tier = RocksDBTier(
            str(run.scratch / "disk"),
            num_threads=sizes.disk_threads,
            cache_bytes=sizes.disk_cache_bytes,
            direct_reads=True,
        )
        stack.enter_context(closing(tier))
        tier.open_table(table)
        keys = np.arange(sizes.disk_rows, dtype=np.int64)
        tier.load(table.tag, blocks(keys, table), ascending=True)
        variants = [Variant(TIER, fetching(tier, table, sampler, n), n)]
        if not absent:
            program = DbBench(
                run.scratch / "disk-db_bench",
                n_rows=sizes.disk_rows,
                row_bytes=table.row_bytes,
                cache_bytes=sizes.disk_cache_bytes,
                threads=sizes.disk_threads,
                direct=True,
            )
            program.fill()
            stack.callback(shutil.rmtree, program.directory)
            variants.append(Variant(DB_BENCH, _running(program, n), n))
        yield from compare(
            run,
            "rocksdb_disk",
            variants,
            params={
                "dim": sizes.disk_dim,
                "n_rows": sizes.disk_rows,
                "batch": n,
                "threads": sizes.disk_threads,
                "cache_mib": sizes.disk_cache_bytes // defaults.MIB,
            },
            claims=[Claim(TIER, DB_BENCH, defaults.ROCKSDB_DISK_AGAINST_DB_BENCH)],
            absent=absent,
        )


def rocksdb_load(run: Run) -> Iterator[Result]:
    """Compare the bulk load of model files with batches of 1000 rows."""
    n = run.sizes.load_rows
    for dim in run.sizes.dims:
        table, keys = spec(dim), shuffled_keys(n)
        shuffled = RowBlock(keys, table_rows(keys, dim))
        order = np.argsort(keys)
        ascending = RowBlock(keys[order], shuffled.rows[order])
        with ExitStack() as stack:
            setups = {
                BULK: _loading(stack, run, table, shuffled),
                BULK_ASCENDING: _loading(stack, run, table, ascending),
                BATCHES: _writing(stack, run, table, shuffled),
            }
            yield from compare(
                run,
                "rocksdb_load",
                [Variant(name, setup, n) for name, setup in setups.items()],
                params={"dim": dim, "n_rows": n},
                claims=[
                    Claim(name, BATCHES, defaults.LOAD_AGAINST_WRITE_BATCH)
                    for name in (BULK, BULK_ASCENDING)
                ],
            )


def rocksdb_writes(run: Run) -> Iterator[Result]:
    """Time updates and deletes of rows that are stored."""
    n = run.sizes.rocks_batch
    for dim in run.sizes.dims:
        table, sampler = spec(dim), uniform(run.sizes.n_rows, seed=SEED)
        with closing(_filled(run, f"writes-{dim}", table)) as tier:
            setups = {
                "update": updating(tier, table, sampler, n),
                "delete": deleting(tier, table, sampler, n),
            }
            yield from compare(
                run,
                "rocksdb_writes",
                [Variant(name, setup, n) for name, setup in setups.items()],
                params=_params(run, dim, batch=n),
            )


def _params(run: Run, dim: int, **more: Param) -> dict[str, Param]:
    return {"dim": dim, "n_rows": run.sizes.n_rows, **more}


def _fetch_claims(dim: int) -> list[Claim]:
    return [
        Claim(TIER, PER_KEY, defaults.ROCKSDB_AGAINST_PER_KEY),
        Claim(TIER_ONE_THREAD, PER_KEY),
        Claim(TIER_ONE_THREAD, DB_BENCH, defaults.ROCKSDB_AGAINST_DB_BENCH.get(dim)),
    ]


def _filled(
    run: Run, name: str, table: TableSpec, *, threads: int | None = None
) -> RocksDBTier:
    """Return a tier whose rows are all in its block cache."""
    tier = RocksDBTier(
        str(run.scratch / f"rocksdb-{name}"),
        num_threads=threads or run.sizes.rocks_threads,
        cache_bytes=run.sizes.cached_bytes,
    )
    fill(tier, table, run.sizes.n_rows)
    warm(tier, table, run.sizes.n_rows)
    return tier


def _plain(run: Run, table: TableSpec, n_rows: int) -> RocksdictTable:
    """Return the rows in a plain database, all of them in its block cache."""
    plain = RocksdictTable(
        run.scratch / f"rocksdict-{table.dim}", cache_bytes=run.sizes.cached_bytes
    )
    keys = np.arange(n_rows, dtype=np.int64)
    for block in blocks(keys, table):
        plain.write(block.keys, block.rows)
    plain.compact()
    for part in blocks_of(keys):
        plain.fetch(part, np.empty((part.size, table.dim), table.numpy_dtype))
    return plain


def _db_bench_in_cache(run: Run, table: TableSpec) -> Variant:
    program = DbBench(
        run.scratch / f"db_bench-{table.dim}",
        n_rows=run.sizes.n_rows,
        row_bytes=table.row_bytes,
        cache_bytes=run.sizes.cached_bytes,
    )
    program.fill()
    return Variant(
        DB_BENCH, _running(program, run.sizes.db_bench_reads), run.sizes.db_bench_reads
    )


def _running(program: DbBench, n_keys: int) -> Setup:
    seed = SEED

    def setup() -> Call:
        nonlocal seed
        seed += 1
        return lambda: program.multi_get_s(n_keys, seed=seed)

    return setup


def _loading(stack: ExitStack, run: Run, table: TableSpec, block: RowBlock) -> Setup:
    """Load model files into a table that is new in every call; checked once, here."""
    path = run.scratch / f"load-{table.dim}-{block.keys[0]}"
    tier = stack.enter_context(closing(RocksDBTier(str(path / "rocksdb"))))
    write_model_directory(path / "model", block.keys, block.rows)
    files = open_model_directory(path / "model", table.dim)

    def setup() -> Call:
        tier.drop_table(table.tag)
        tier.open_table(table)
        return load

    def load() -> None:
        tier.load(table.tag, files.sorted_blocks(), ascending=True)

    setup()()
    warm(tier, table, len(block))
    return setup


def _writing(stack: ExitStack, run: Run, table: TableSpec, block: RowBlock) -> Setup:
    """Write into a database that is new in every call."""
    path, number = run.scratch / f"written-{table.dim}", 0
    opened = stack.enter_context(ExitStack())

    def setup() -> Call:
        nonlocal number
        number += 1
        opened.close()
        directory = path / str(number)
        directory.mkdir(parents=True)
        plain = RocksdictTable(directory, cache_bytes=run.sizes.disk_cache_bytes)
        opened.callback(shutil.rmtree, directory)
        opened.callback(plain.close)
        return lambda: plain.write(block.keys, block.rows)

    return setup


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (
    rocksdb_fetch,
    rocksdb_batches,
    rocksdb_disk,
    rocksdb_load,
    rocksdb_writes,
)
