"""Servers of one table to measure on, and the tiers inside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.defaults import MIB
from bench.harness import Call, Setup
from bench.setups import blocks, reading, shuffled_keys
from bench.workloads import Sampler
from hps_numba.config import (
    DatabaseType,
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    UpdateSourceParams,
    UpdateSourceType,
    VolatileDatabaseParams,
)
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Rows, TableSpec


@dataclass(frozen=True)
class Served:
    """A server, and its tiers by name."""

    server: HPS
    table: TableSpec
    tiers: dict[str, Tier]

    def lookup(self, keys: Keys) -> Rows:
        """Look keys up as a user does who lets the server make the output."""
        rows: Rows = self.server.lookup(keys, self.table.model, self.table.name)
        return rows

    def lookup_into(self, keys: Keys, out: Rows) -> None:
        """Look keys up into an output of the user's own."""
        self.server.lookup(keys, self.table.model, self.table.name, out=out)


@contextmanager
def host_server(table: TableSpec, n_rows: int) -> Iterator[Served]:
    """Serve the keys ``0 .. n_rows - 1`` from host memory alone."""
    nowhere = PersistentDatabaseParams(backend=DatabaseType.DISABLED)
    with _serve(table, nowhere, MIB) as served:
        _load(served.tiers["host"], table, shuffled_keys(n_rows))
        yield served


@contextmanager
def two_tier_server(
    table: TableSpec,
    path: Path,
    *,
    n_rows: int,
    host_rows: int,
    chunk_keys: int,
    cache_bytes: int,
) -> Iterator[Served]:
    """Serve the keys ``0 .. n_rows - 1`` from RocksDB, some from host memory.

    Which rows are in host memory does not change: nothing is backfilled.
    """
    rocksdb = PersistentDatabaseParams(
        backend=DatabaseType.ROCKS_DB, path=str(path), cache_bytes=cache_bytes
    )
    with _serve(table, rocksdb, chunk_keys) as served:
        keys = shuffled_keys(n_rows)
        _load(served.tiers["rocksdb"], table, keys)
        _load(served.tiers["host"], table, keys[:host_rows])
        yield served


def looking_up(served: Served, sampler: Sampler, batch: int) -> Setup:
    """Time lookups of fresh keys; the answers are checked once, here."""
    reading(served.lookup_into, served.table, sampler, batch)

    def setup() -> Call:
        keys = sampler(batch)

        def call() -> None:
            served.lookup(keys)

        return call

    return setup


@contextmanager
def following_server(
    table: TableSpec, path: Path, brokers: str, *, cache_bytes: int
) -> Iterator[Served]:
    """Serve an empty table over RocksDB that follows its update stream."""
    rocksdb = PersistentDatabaseParams(
        backend=DatabaseType.ROCKS_DB, path=str(path), cache_bytes=cache_bytes
    )
    stream = UpdateSourceParams(
        type=UpdateSourceType.KAFKA_MESSAGE_QUEUE,
        brokers=brokers,
        receive_buffer_size=8 * MIB,
    )
    with _serve(table, rocksdb, MIB, stream) as served:
        yield served


@contextmanager
def _serve(
    table: TableSpec,
    persistent: PersistentDatabaseParams,
    chunk_keys: int,
    stream: UpdateSourceParams | None = None,
) -> Iterator[Served]:
    tiers: dict[str, Tier] = {}

    def keep(tier: Tier) -> Tier:
        return tiers.setdefault(tier.name, tier)

    config = ParameterServerConfig(
        volatile_db=VolatileDatabaseParams(
            type=DatabaseType.PARALLEL_HASH_MAP, max_batch_size=chunk_keys
        ),
        persistent_db=persistent,
        update_source=stream or UpdateSourceParams(),
        models=(
            InferenceParams(
                model_name=table.model,
                max_batchsize=MIB,
                embedding_table_names=(table.name,),
                embedding_vecsize_per_table=(table.dim,),
                maxnum_catfeature_query_per_table_per_sample=(1,),
                use_gpu_embedding_cache=False,
            ),
        ),
    )
    with HPS(config, wrap_tier=keep) as server:
        yield Served(server, table, tiers)


def _load(tier: Tier, table: TableSpec, keys: Keys) -> None:
    tier.load(table.tag, blocks(keys, table))
