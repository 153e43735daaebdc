"""Operations one by one, on pytest-benchmark: ``pytest bench --benchmark-json FILE``.

Nothing is compared here. Ratios against baselines come from ``python -m bench``, which
times both sides in one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.defaults import SEED, Sizes
from bench.harness import Call, Setup
from bench.servers import Served, host_server, looking_up
from bench.setups import (
    backfilling,
    blocks,
    evicting,
    fetching,
    fill,
    shuffled_keys,
    spec,
    updating,
    warm,
)
from bench.workloads import Sampler, uniform
from hps_numba.tiers.host import HostTier
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import TableSpec

ROUNDS = 20


@pytest.fixture(scope="module")
def table(dim: int) -> TableSpec:
    return spec(dim)


@pytest.fixture
def sampler(sizes: Sizes) -> Sampler:
    return uniform(sizes.n_rows, seed=SEED)


@pytest.fixture(scope="module")
def host(table: TableSpec, sizes: Sizes) -> Iterator[HostTier]:
    with closing(HostTier()) as tier:
        fill(tier, table, sizes.n_rows)
        yield tier


@pytest.fixture(scope="module")
def rocksdb(
    table: TableSpec, sizes: Sizes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RocksDBTier]:
    path = tmp_path_factory.mktemp("rocksdb")
    with closing(RocksDBTier(str(path), cache_bytes=sizes.cached_bytes)) as tier:
        fill(tier, table, sizes.n_rows)
        warm(tier, table, sizes.n_rows)
        yield tier


@pytest.fixture(scope="module")
def served(table: TableSpec, sizes: Sizes) -> Iterator[Served]:
    with host_server(table, sizes.n_rows) as server:
        yield server


def measure(benchmark: BenchmarkFixture, setup: Setup, items: int) -> None:
    """Time calls on fresh inputs, and note how many keys each handles."""

    def fresh() -> tuple[tuple[Call], dict[str, object]]:
        return (setup(),), {}

    benchmark.extra_info["items"] = items
    benchmark.pedantic(  # type: ignore[no-untyped-call]  # its package has no types
        _call, setup=fresh, rounds=ROUNDS, warmup_rounds=1
    )


def _call(call: Call) -> None:
    call()


def test_host_fetch(
    benchmark: BenchmarkFixture,
    host: HostTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, fetching(host, table, sampler, batch), batch)


def test_host_insert(
    benchmark: BenchmarkFixture,
    host: HostTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, updating(host, table, sampler, batch), batch)


def test_host_evict(
    benchmark: BenchmarkFixture,
    host: HostTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, evicting(host, table, sampler, batch), batch)


def test_host_backfill(
    benchmark: BenchmarkFixture,
    host: HostTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, backfilling(host, table, sampler, batch), batch)


def test_lookup(
    benchmark: BenchmarkFixture, served: Served, sampler: Sampler, batch: int
) -> None:
    measure(benchmark, looking_up(served, sampler, batch), batch)


def test_rocksdb_fetch(
    benchmark: BenchmarkFixture,
    rocksdb: RocksDBTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, fetching(rocksdb, table, sampler, batch), batch)


def test_rocksdb_insert(
    benchmark: BenchmarkFixture,
    rocksdb: RocksDBTier,
    table: TableSpec,
    sampler: Sampler,
    batch: int,
) -> None:
    measure(benchmark, updating(rocksdb, table, sampler, batch), batch)


def test_rocksdb_load(
    benchmark: BenchmarkFixture, rocksdb: RocksDBTier, table: TableSpec, batch: int
) -> None:
    loaded = spec(table.dim, name="loaded")
    rows = list(blocks(shuffled_keys(batch), loaded))

    def setup() -> Call:
        rocksdb.drop_table(loaded.tag)
        rocksdb.open_table(loaded)
        return load

    def load() -> None:
        rocksdb.load(loaded.tag, rows)

    measure(benchmark, setup, batch)
    assert rocksdb.size(loaded.tag) == batch
