"""Writing model directories."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.tiers.model_files.directory import KEY_FILE, ROW_FILE


def write_model_directory(
    path: str | os.PathLike[str], keys: ArrayLike, rows: ArrayLike
) -> None:
    """Write a table as a model directory, creating it if needed.

    Parameters
    ----------
    path
        The directory. Other files in it are left alone.
    keys
        Any integer dtype (n,); stored as int64.
    rows
        float32 or float16 (n, dim); stored as float32.

    Raises
    ------
    TypeError
        If keys are no integers, or rows are not float32 or float16.
    ValueError
        If the shapes do not fit, or a uint64 key is above the largest int64.
    OSError
        If the files cannot be written; the old ones are then untouched.

    Notes
    -----
    Each file is replaced as a whole, after it reached the disk. The two together are
    not: a table that servers may be loading gets a new directory for each version.
    """
    key_array = _checked_keys(np.asarray(keys))
    row_array = _checked_rows(np.asarray(rows), len(key_array))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, {KEY_FILE: key_array, ROW_FILE: row_array})


def _checked_keys(keys: NDArray[Any]) -> NDArray[Any]:
    """Return keys as contiguous little-endian int64."""
    if keys.ndim != 1:
        raise ValueError(f"keys of shape {keys.shape}: give one dimension")
    if len(keys) and keys.dtype.kind not in "iu":
        raise TypeError(f"keys of dtype {keys.dtype}: give integers")
    limit = np.iinfo(np.int64).max
    if keys.dtype == np.uint64 and len(keys) and keys.max() > limit:
        raise ValueError(f"key {keys.max()} is above the largest int64, {limit}")
    return np.ascontiguousarray(keys, "<i8")


def _checked_rows(rows: NDArray[Any], n_keys: int) -> NDArray[Any]:
    """Return rows as contiguous little-endian float32."""
    if rows.dtype not in (np.float32, np.float16):
        raise TypeError(f"rows of dtype {rows.dtype}: give float32 or float16")
    if rows.ndim != 2 or len(rows) != n_keys or rows.shape[1] == 0:
        raise ValueError(f"rows of shape {rows.shape}: give ({n_keys}, dim), dim >= 1")
    return np.ascontiguousarray(rows, "<f4")


def _replace(folder: Path, contents: dict[str, NDArray[Any]]) -> None:
    """Write all files under other names, flush them, then rename them."""
    written: dict[str, Path] = {}
    try:
        for name, array in contents.items():
            written[name] = _write_beside(folder, name, array)
        for name, temporary in written.items():
            os.replace(temporary, folder / name)
    except BaseException:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        raise
    _sync(folder)


def _write_beside(folder: Path, name: str, array: NDArray[Any]) -> Path:
    """Write an array to a new file of the folder and return its path."""
    path = folder / f".{name}.{secrets.token_hex(8)}"
    try:
        with open(path, "xb") as file:
            array.tofile(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _sync(folder: Path) -> None:
    """Make the renames in a folder last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
