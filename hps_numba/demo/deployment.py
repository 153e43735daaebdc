"""What the demo writes: model directories, ``ps.json`` and the database's place."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps_numba.demo.values import known_rows
from hps_numba.demo.workload import TableLoad, Workload
from hps_numba.errors import HPSError
from hps_numba.tiers.model_files import write_model_directory

TRAINED_VERSION = 1
"""Version of the rows in the model directories."""

CONFIG_FILE = "ps.json"
REPORT_FILE = "report.json"
PLOT_FILE = "demo.png"
_MODEL_DIR = "model"
_DATABASE_DIR = "rocksdb"
_OWN_ENTRIES = (CONFIG_FILE, REPORT_FILE, PLOT_FILE, _MODEL_DIR, _DATABASE_DIR)
_MARKER = ".hps-numba-demo"

_MIN_HOST_BYTES = 256 << 10  # of one table: its index and stamps take most of this
_GPU_SHARE = 0.2  # of the rows
_WAIT_FOR_ALL = 1.1  # a hit rate that is never reached: every row is fetched
_LOOKUPS_AT_ONCE = 2  # of the replay, and of the updater


@dataclass(frozen=True)
class Deployment:
    """A configuration, the bytes of host memory that it grants, and its GPU."""

    config: Path
    host_bytes: int
    gpu: str | None = None


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Hold a directory for one demo, emptied of what an earlier one wrote.

    Raises
    ------
    HPSError
        If the directory holds files of somebody else, or another demo uses it.
    """
    path = path.resolve()
    marker = path / _MARKER
    if path.exists() and not marker.exists() and (not path.is_dir() or _filled(path)):
        raise HPSError(
            f"output {path}: exists and was not written by the demo; name a new "
            f"directory, or an empty one"
        )
    path.mkdir(parents=True, exist_ok=True)
    with marker.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise HPSError(f"output {path}: another demo is using it") from exc
        _remove_own(path)
        yield path


def _filled(path: Path) -> bool:
    return next(path.iterdir(), None) is not None


def _remove_own(path: Path) -> None:
    for name in _OWN_ENTRIES:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def write_deployment(
    workload: Workload, output: Path, *, host_share: float, gpu: str | None = None
) -> Deployment:
    """Write the model directories and ``ps.json``.

    Parameters
    ----------
    workload
        The tables.
    output
        Where they are written.
    host_share
        Bytes of host memory, as a share of the rows' bytes.
    gpu
        Name of device 0, which gets a cache; None for none.
    """
    for table in workload.tables:
        keys = table.ids[table.trained]
        rows = known_rows(
            table.salt, keys, TRAINED_VERSION, dim=table.dim, default=table.default
        )
        write_model_directory(_model_directory(output, table), keys, rows)
    host_bytes = [
        max(_MIN_HOST_BYTES, int(host_share * table.model_bytes))
        for table in workload.tables
    ]
    config = _configuration(workload, output, host_bytes)
    config["models"][0] |= _cache() if gpu else {"gpucache": False}
    path = output / CONFIG_FILE
    path.write_text(json.dumps(config, indent=2) + "\n")
    return Deployment(path, sum(host_bytes), gpu)


def _model_directory(output: Path, table: TableLoad) -> Path:
    return output / _MODEL_DIR / table.name


def _configuration(
    workload: Workload, output: Path, host_bytes: list[int]
) -> dict[str, Any]:
    return {
        "supportlonglong": True,
        "volatile_db": {
            "type": "parallel_hash_map",
            "num_partitions": 2,
            "max_bytes": sum(host_bytes),
            "overflow_policy": "evict_oldest",
            "cache_missed_embeddings": True,
        },
        "persistent_db": {
            "type": "rocks_db",
            "path": str(output / _DATABASE_DIR),
            "num_threads": 2,
        },
        "models": [_model(workload, output, host_bytes)],
    }


def _model(workload: Workload, output: Path, host_bytes: list[int]) -> dict[str, Any]:
    tables = workload.tables
    return {
        "model": workload.model,
        "sparse_files": [str(_model_directory(output, table)) for table in tables],
        "embedding_table_names": [table.name for table in tables],
        "embedding_vecsize_per_table": [table.dim for table in tables],
        "maxnum_catfeature_query_per_table_per_sample": [
            table.positions.shape[1] for table in tables
        ],
        "default_value_for_each_table": [table.default for table in tables],
        "host_bytes_per_table": host_bytes,
        "max_batch_size": workload.batch,
        "deployed_device_list": [0],
    }


def _cache() -> dict[str, Any]:
    return {
        "gpucache": True,
        "require_gpu": True,
        "gpucacheper": _GPU_SHARE,
        "hit_rate_threshold": _WAIT_FOR_ALL,
        "num_of_worker_buffer_in_pool": _LOOKUPS_AT_ONCE,
    }
