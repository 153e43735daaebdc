"""How many bytes a configuration takes, before any is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hps_numba.config import DatabaseType, InferenceParams, ParameterServerConfig
from hps_numba.runtime.gpu.lane_layout import Buffers, buffer_bytes
from hps_numba.runtime.gpu.sizing import CachePlan, plan_cache
from hps_numba.runtime.gpu.warming import frequency_file
from hps_numba.tiers.host_table import Overflow, bytes_for_rows
from hps_numba.tiers.model_files import open_model_directory
from hps_numba.tiers.redis.sizes import row_bytes
from hps_numba.types import TableSpec

IN_THIS_PROCESS = (DatabaseType.HASH_MAP, DatabaseType.PARALLEL_HASH_MAP)
_DISK_KEY_BYTES = 24  # of a row in RocksDB: key, sequence number, index, bloom filter


@dataclass(frozen=True)
class TableEstimate:
    """Bytes of one table with the rows of its model directory.

    Those of Redis are about right, for a server of version 7 and the memory allocator
    that it comes with; replicas take as much again.
    """

    model: str
    table: str
    rows: int
    host_bytes: int  # what it takes, or its share of the budget if that is less
    disk_bytes: int
    host_rows: int  # rows that fit in host_bytes, about
    gpu_bytes: int  # its part of the model's cache, on each of gpu_devices
    gpu_rows: int  # rows that the cache can hold, no more than there are
    gpu_devices: tuple[int, ...]  # none without gpucache
    redis_bytes: int = 0  # of all masters together


@dataclass(frozen=True)
class Estimate:
    """Bytes of a whole configuration."""

    tables: tuple[TableEstimate, ...]
    host_bytes: int
    disk_bytes: int
    host_budget_bytes: int | None
    gpu_bytes: dict[int, int]  # of all caches on a device, by device
    gpu_buffer_bytes: dict[int, int]  # of the buffers of lookups and writes there
    pinned_bytes: int  # of the same buffers in host memory, for all devices
    redis_bytes: int = 0


def overflow_of(config: ParameterServerConfig) -> Overflow:
    """Return what full partitions of the volatile database do."""
    volatile = config.volatile_db
    margin = volatile.overflow_margin
    return Overflow(
        policy=volatile.overflow_policy,
        margin=None if margin >= 1 << 62 else max(margin, 1),
        target=volatile.overflow_resolution_target,
    )


def estimate(config: ParameterServerConfig) -> Estimate:
    """Return the bytes that serving ``config`` takes; reads sizes of files only.

    What it says of GPUs is what a machine that has them will need: none is asked.

    Raises
    ------
    ConfigError
        If a GPU cache cannot be as it is configured, or not be warmed up.
    ModelFileError
        If a model directory is missing or inconsistent.
    """
    has_disk = config.persistent_db.backend is not DatabaseType.DISABLED
    shares = host_shares(config, config.models, config.volatile_db.max_bytes)
    needs = _needs(config, config.models)
    plans = _plans(config, {spec.tag: rows for spec, rows, _ in needs})
    tables = []
    for spec, rows, need in needs:
        plan = plans.get(spec.model)
        share = shares[spec.tag]
        host_bytes = need if share is None else min(need, share)
        tables.append(
            TableEstimate(
                model=spec.model,
                table=spec.name,
                rows=rows,
                host_bytes=host_bytes,
                disk_bytes=rows * (spec.row_bytes + _DISK_KEY_BYTES) * has_disk,
                host_rows=int(rows * host_bytes / need) if need else 0,
                gpu_bytes=plan.table_bytes(spec.tag) if plan else 0,
                gpu_rows=plan.n_rows(spec.tag) if plan else 0,
                gpu_devices=config.model(spec.model).deployed_devices if plan else (),
                redis_bytes=rows * redis_row_bytes(config, spec),
            )
        )
    buffers = _buffers(config, plans)
    return Estimate(
        tables=tuple(tables),
        host_bytes=sum(t.host_bytes for t in tables),
        disk_bytes=sum(t.disk_bytes for t in tables),
        host_budget_bytes=config.volatile_db.max_bytes,
        gpu_bytes=_by_device((t.gpu_devices, t.gpu_bytes) for t in tables),
        gpu_buffer_bytes=_by_device((d, each.device) for d, each in buffers),
        pinned_bytes=sum(len(d) * each.pinned for d, each in buffers),
        redis_bytes=sum(t.redis_bytes for t in tables),
    )


def redis_row_bytes(config: ParameterServerConfig, spec: TableSpec) -> int:
    """Return about how many bytes of Redis a row takes; 0 without Redis."""
    volatile = config.volatile_db
    if volatile.type is not DatabaseType.REDIS_CLUSTER:
        return 0
    notes_uses = overflow_of(config).margin is not None
    return row_bytes(spec, volatile.redis_layout, notes_uses=notes_uses)


def host_shares(
    config: ParameterServerConfig,
    models: tuple[InferenceParams, ...],
    budget: int | None,
) -> dict[str, int | None]:
    """Split a budget over the tables of some models.

    A table with ``host_bytes_per_table`` gets that. The others share what is left in
    proportion to what their model directories need, up to twice that; a table without
    files counts as the average of those with files.
    """
    needs = _needs(config, models)
    fixed = {
        spec.tag: n_bytes
        for params in models
        for spec, n_bytes in zip(
            params.tables(), params.host_bytes_per_table or (), strict=False
        )
    }
    if budget is None:
        return {spec.tag: fixed.get(spec.tag) for spec, _, _ in needs}
    known = [need for spec, rows, need in needs if rows] or [1]
    weights = {
        spec.tag: need if rows else sum(known) // len(known)
        for spec, rows, need in needs
        if spec.tag not in fixed
    }
    left = max(budget - sum(fixed.values()), 0)
    scale = min(2.0, left / max(sum(weights.values()), 1))
    return {
        spec.tag: fixed[spec.tag]
        if spec.tag in fixed
        else int(weights[spec.tag] * scale)
        for spec, _, _ in needs
    }


def _plans(
    config: ParameterServerConfig, rows: Mapping[str, int]
) -> dict[str, CachePlan]:
    """Return the GPU cache of each model that has one, if it can be warmed up."""
    plans = {}
    for params in config.models:
        if params.use_gpu_embedding_cache:
            specs = params.tables()
            plans[params.model_name] = plan_cache(params, [rows[s.tag] for s in specs])
            for i in range(len(specs)):
                frequency_file(params, i)  # refuses what it cannot read
    return plans


def _buffers(
    config: ParameterServerConfig, plans: Mapping[str, CachePlan]
) -> list[tuple[tuple[int, ...], Buffers]]:
    """Return the buffers of each model with a GPU cache, on each of its devices."""
    block_rows = config.volatile_db.max_batch_size
    return [
        (
            params.deployed_devices,
            buffer_bytes(
                plans[params.model_name],
                block_rows,
                params.number_of_worker_buffers_in_pool,
            ),
        )
        for params in config.models
        if params.model_name in plans
    ]


def _by_device(parts: Iterable[tuple[Sequence[int], int]]) -> dict[int, int]:
    """Return sums by device, of bytes that each of some devices has."""
    sums: dict[int, int] = {}
    for devices, n_bytes in parts:
        for device in devices:
            sums[device] = sums.get(device, 0) + n_bytes
    return dict(sorted(sums.items()))


def _needs(
    config: ParameterServerConfig, models: tuple[InferenceParams, ...]
) -> list[tuple[TableSpec, int, int]]:
    """Return each table with its rows in files and the host bytes they take."""
    volatile = config.volatile_db
    in_memory = volatile.type in IN_THIS_PROCESS
    found = []
    for params in models:
        files = params.sparse_model_files or [None] * len(params.tables())
        for spec, path in zip(params.tables(), files, strict=True):
            rows = 0
            if path is not None:
                rows = open_model_directory(path, spec.dim, table=spec.tag).n_rows
            need = bytes_for_rows(
                spec,
                rows,
                n_partitions=volatile.num_partitions,
                overflow=overflow_of(config),
                capped=volatile.max_bytes is not None,
            )
            found.append((spec, rows, need * in_memory))
    return found
