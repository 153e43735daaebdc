"""How many bytes a configuration takes, before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from hps_numba.config import DatabaseType, InferenceParams, ParameterServerConfig
from hps_numba.tiers.host_table import Overflow, bytes_for_rows
from hps_numba.tiers.model_files import open_model_directory
from hps_numba.types import TableSpec

_DISK_KEY_BYTES = 24  # of a row in RocksDB: key, sequence number, index, bloom filter


@dataclass(frozen=True)
class TableEstimate:
    """Bytes of one table with the rows of its model directory."""

    model: str
    table: str
    rows: int
    host_bytes: int  # what it takes, or its share of the budget if that is less
    disk_bytes: int
    host_rows: int  # rows that fit in host_bytes, about


@dataclass(frozen=True)
class Estimate:
    """Bytes of a whole configuration."""

    tables: tuple[TableEstimate, ...]
    host_bytes: int
    disk_bytes: int
    host_budget_bytes: int | None


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

    Raises
    ------
    ModelFileError
        If a model directory is missing or inconsistent.
    """
    has_disk = config.persistent_db.backend is not DatabaseType.DISABLED
    shares = host_shares(config, config.models, config.volatile_db.max_bytes)
    tables = []
    for spec, rows, need in _needs(config, config.models):
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
            )
        )
    return Estimate(
        tables=tuple(tables),
        host_bytes=sum(t.host_bytes for t in tables),
        disk_bytes=sum(t.disk_bytes for t in tables),
        host_budget_bytes=config.volatile_db.max_bytes,
    )


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


def _needs(
    config: ParameterServerConfig, models: tuple[InferenceParams, ...]
) -> list[tuple[TableSpec, int, int]]:
    """Return each table with its rows in files and the host bytes they take."""
    volatile = config.volatile_db
    in_memory = volatile.type is not DatabaseType.DISABLED
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
