"""The tiers that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from hps_numba.config import DatabaseType, ParameterServerConfig, UpdateSourceType
from hps_numba.errors import ConfigError
from hps_numba.runtime.estimate import overflow_of
from hps_numba.tiers.base import PersistentTier, Tier
from hps_numba.tiers.host import HostTier

_IN_THIS_PROCESS = (DatabaseType.HASH_MAP, DatabaseType.PARALLEL_HASH_MAP)


@dataclass(frozen=True)
class Stores:
    """Where rows are kept, and which stores are filled from files at the start."""

    volatile: Tier | None
    persistent: PersistentTier | None
    fill_volatile: bool
    fill_persistent: bool

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers, from the fastest to the slowest."""
        return tuple(t for t in (self.volatile, self.persistent) if t is not None)


def open_stores(
    config: ParameterServerConfig, wrap: Callable[[Tier], Tier] | None = None
) -> Stores:
    """Open the tiers of a configuration.

    Raises
    ------
    ConfigError
        If it asks for a store that this version does not have, or for none.
    TierError
        If a store cannot be opened.
    """
    _check_supported(config)
    keep = wrap or (lambda tier: tier)
    volatile = _host_tier(config)
    persistent = _rocksdb_tier(config)
    return Stores(
        volatile=keep(volatile) if volatile else None,
        persistent=cast("PersistentTier", keep(persistent)) if persistent else None,
        fill_volatile=config.volatile_db.initialize_after_startup,
        fill_persistent=config.persistent_db.initialize_after_startup,
    )


def _check_supported(config: ParameterServerConfig) -> None:
    kind = config.volatile_db.type
    if kind not in (DatabaseType.DISABLED, *_IN_THIS_PROCESS):
        raise ConfigError(
            f"volatile_db.type: {kind.value} is not available in this version; "
            f"use parallel_hash_map"
        )
    if config.update_source.type is not UpdateSourceType.NULL:
        raise ConfigError(
            f"update_source.type: {config.update_source.type.value} is not available "
            f"in this version; remove update_source and call HPS.update()"
        )
    if kind is DatabaseType.DISABLED and not _has_rocksdb(config):
        raise ConfigError("volatile_db and persistent_db: enable at least one of them")


def _host_tier(config: ParameterServerConfig) -> HostTier | None:
    volatile = config.volatile_db
    if volatile.type not in _IN_THIS_PROCESS:
        return None
    overflow = overflow_of(config)
    return HostTier(
        num_partitions=volatile.num_partitions,
        max_bytes=volatile.max_bytes,
        overflow_margin=overflow.margin,
        overflow_policy=overflow.policy,
        overflow_resolution_target=overflow.target,
        num_threads=_cores(),
    )


def _has_rocksdb(config: ParameterServerConfig) -> bool:
    return config.persistent_db.backend is DatabaseType.ROCKS_DB


def _rocksdb_tier(config: ParameterServerConfig) -> PersistentTier | None:
    if not _has_rocksdb(config):
        return None
    # Imported here, so that serving from host memory alone does not load RocksDB.
    from hps_numba.tiers.rocksdb import RocksDBTier

    persistent = config.persistent_db
    return RocksDBTier(
        persistent.path,
        num_threads=persistent.num_threads,
        read_only=persistent.read_only,
        max_batch_size=persistent.max_batch_size,
        cache_bytes=persistent.cache_bytes,
        direct_reads=persistent.direct_reads,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
