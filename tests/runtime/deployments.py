"""Model directories of versioned rows, and servers for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hps_numba.config import (
    DatabaseType,
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    VolatileDatabaseParams,
)
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from hps_numba.tiers.model_files import write_model_directory
from tests.oracle import versioned_rows, versions_in
from tests.support.gates import StopPoints
from tests.support.wrappers import GatedTier


@dataclass(frozen=True)
class Table:
    """One table of a model: rows of one version."""

    name: str = "items"
    dim: int = 4
    n_rows: int = 100
    version: int = 1
    default: float = -1.0
    dtype: str = "float32"

    @property
    def keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.arange(self.n_rows, dtype=np.int64)

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return versioned_rows(self.keys, self.version, self.dim)


ITEMS = Table("items", dim=4, n_rows=1000, version=1, default=-1.0)
USERS = Table("users", dim=8, n_rows=500, version=2, default=0.5)
NOBODY = np.iinfo(np.int64).max


def write_table(path: Path, keys: ArrayLike, version: int = 1, *, dim: int = 4) -> None:
    """Write a model directory of rows of one version."""
    write_model_directory(path, keys, versioned_rows(keys, version, dim))


def model(
    root: Path,
    tables: Sequence[Table] = (Table(),),
    *,
    name: str = "wdl",
    write: bool = True,
    **options: Any,
) -> InferenceParams:
    """Write a model's directories below ``root`` and return what serves them."""
    paths = [root / name / table.name for table in tables]
    if write:
        for path, table in zip(paths, tables, strict=True):
            write_table(path, table.keys, table.version, dim=table.dim)
    return InferenceParams(
        **{
            "model_name": name,
            "max_batchsize": 1000,
            "sparse_model_files": [str(path) for path in paths],
            "embedding_table_names": [table.name for table in tables],
            "embedding_vecsize_per_table": [table.dim for table in tables],
            "maxnum_catfeature_query_per_table_per_sample": [10] * len(tables),
            "default_value_for_each_table": [table.default for table in tables],
            "row_dtype_per_table": [table.dtype for table in tables],
            "use_gpu_embedding_cache": False,
            "thread_pool_size": 4,
        }
        | options
    )


def server_config(
    root: Path,
    models: Sequence[InferenceParams] | None = None,
    *,
    volatile: dict[str, Any] | None = None,
    persistent: dict[str, Any] | None = None,
    **options: Any,
) -> ParameterServerConfig:
    """Return a configuration of host memory over RocksDB below ``root``."""
    return ParameterServerConfig(
        models=list(models) if models is not None else [model(root)],
        volatile_db=VolatileDatabaseParams(
            **{
                "type": DatabaseType.PARALLEL_HASH_MAP,
                "num_partitions": 2,
                "cache_missed_embeddings": True,
            }
            | (volatile or {})
        ),
        persistent_db=PersistentDatabaseParams(
            **{
                "backend": DatabaseType.ROCKS_DB,
                "path": str(root / "rocksdb"),
                "num_threads": 2,
            }
            | (persistent or {})
        ),
        **options,
    )


class Wraps:
    """Wraps the tiers of a server as they are opened, and keeps them by name."""

    def __init__(self, wrap: Callable[[Tier], Tier]) -> None:
        self._wrap = wrap
        self.tiers: dict[str, Tier] = {}

    def __call__(self, tier: Tier) -> Tier:
        return self.tiers.setdefault(tier.name, self._wrap(tier))


def gated(stops: StopPoints) -> Wraps:
    return Wraps(lambda tier: GatedTier(tier, stops))


def versions(server: HPS, keys: Any, table: int | str = 0, name: str = "wdl") -> Any:
    """Return the version of each key, 0 where there is none."""
    array = np.asarray(keys, np.int64)
    found = np.zeros(array.shape, np.bool_)
    rows = server.lookup(array, name, table, found=found)
    return np.where(found, versions_in(array, rows), 0).tolist()
