"""The tiers that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hps_numba.config import (
    DatabaseType,
    ParameterServerConfig,
    VolatileDatabaseParams,
)
from hps_numba.errors import ConfigError
from hps_numba.runtime.estimate import IN_THIS_PROCESS, overflow_of
from hps_numba.tiers.base import LastingTier, PersistentTier, Tier
from hps_numba.tiers.host import HostTier

if TYPE_CHECKING:
    from hps_numba.tiers.redis.tls import RedisTls


@dataclass(frozen=True)
class Stores:
    """Where rows are kept, and which stores are filled from files at the start."""

    volatile: Tier | None
    persistent: PersistentTier | None
    fill_volatile: bool
    fill_persistent: bool
    shares_volatile: bool = False  # with other servers, whose rows are there as well

    @property
    def local(self) -> Tier | None:
        """The volatile database if it is this server's own."""
        return None if self.shares_volatile else self.volatile

    @property
    def shared(self) -> LastingTier | None:
        """The volatile database if other servers use it, too."""
        return cast("LastingTier", self.volatile) if self.shares_volatile else None

    @property
    def keeper(self) -> LastingTier | None:
        """The last tier, if it remembers which files its rows are from."""
        return self.persistent or self.shared

    @property
    def lasting(self) -> tuple[LastingTier, ...]:
        """The tiers whose tables are there before a server starts."""
        return tuple(t for t in (self.shared, self.persistent) if t is not None)

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
    shares = config.volatile_db.type is DatabaseType.REDIS_CLUSTER
    volatile = _redis_tier(config) if shares else _host_tier(config)
    try:
        persistent = _rocksdb_tier(config)
    except BaseException:
        if volatile is not None:
            volatile.close()
        raise
    return Stores(
        volatile=keep(volatile) if volatile else None,
        persistent=cast("PersistentTier", keep(persistent)) if persistent else None,
        fill_volatile=config.volatile_db.initialize_after_startup,
        fill_persistent=config.persistent_db.initialize_after_startup,
        shares_volatile=shares,
    )


def _check_supported(config: ParameterServerConfig) -> None:
    kind = config.volatile_db.type
    if kind is DatabaseType.MULTI_PROCESS_HASH_MAP:
        raise ConfigError(
            f"volatile_db.type: {kind.value} is not available in this version; "
            f"use parallel_hash_map"
        )
    if kind is DatabaseType.DISABLED and not _has_rocksdb(config):
        raise ConfigError("volatile_db and persistent_db: enable at least one of them")


def _host_tier(config: ParameterServerConfig) -> HostTier | None:
    volatile = config.volatile_db
    if volatile.type not in IN_THIS_PROCESS:
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


def _redis_tier(config: ParameterServerConfig) -> Tier:
    # Imported here, since redis-py is optional.
    try:
        from hps_numba.tiers.redis.client import RedisOptions
        from hps_numba.tiers.redis.tier import RedisTier
    except ModuleNotFoundError as exc:
        if exc.name != "redis":
            raise
        raise ConfigError(
            "volatile_db.type: redis_cluster needs redis-py; "
            'pip install "hps-numba[redis]"'
        ) from exc

    volatile = config.volatile_db
    return RedisTier(
        RedisOptions(
            address=volatile.address,
            user=volatile.user_name,
            password=volatile.resolve_password(),
            tls=_tls(volatile),
            timeout_s=volatile.redis_timeout_ms / 1e3,
            connect_timeout_s=volatile.redis_connect_timeout_ms / 1e3,
            max_connections=volatile.num_node_connections,
        ),
        num_partitions=volatile.num_partitions,
        layout=volatile.redis_layout,
        max_batch_size=volatile.max_batch_size,
        overflow=overflow_of(config),
        wait_replicas=volatile.redis_wait_replicas,
    )


def _tls(volatile: VolatileDatabaseParams) -> RedisTls | None:
    from hps_numba.tiers.redis.tls import RedisTls

    if not volatile.enable_tls:
        return None
    certificate, key = volatile.client_certificate()
    return RedisTls(
        ca=volatile.tls_ca_certificate,
        certificate=certificate,
        key=key,
        server_name=volatile.tls_server_name_identification,
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
