"""One model directory, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hps_numba.errors import ModelFileError
from hps_numba.tiers.model_files.sizes import (
    FileBytes,
    KeyBytes,
    SizeError,
    fit_sizes,
)
from hps_numba.types import Keys, RowBlock, Rows

KEY_FILE = "key"
ROW_FILE = "emb_vector"
BLOCK_ROWS = 16_384  # small enough to be encoded while still in the CPU's cache


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """The two files of one table, mapped and not yet read.

    Parameters
    ----------
    path
        The directory.
    dim
        Values per row.
    n_rows
        Rows in the files; a key that repeats counts as often as it does.
    key_bytes
        Bytes of one key in the key file, 8 or 4.
    raw_keys
        The key file: int64 or uint32 (n_rows,), read-only.
    rows
        The row file: float32 (n_rows, dim), read-only.
    key_mtime_ns, row_mtime_ns
        When the files were last written, in nanoseconds, as they were opened.
    table
        Name of the table in error messages, or ``""``.

    Notes
    -----
    Safe for several threads. A file that another process cuts short takes this process
    down (``SIGBUS``), so a new version of a table is renamed into place, as
    ``write_model_directory`` does, or has a directory of its own.
    """

    path: Path
    dim: int
    n_rows: int
    key_bytes: int
    raw_keys: NDArray[Any] = field(repr=False)
    rows: NDArray[np.float32] = field(repr=False)
    key_mtime_ns: int = 0
    row_mtime_ns: int = 0
    table: str = ""

    @property
    def keys(self) -> Keys:
        """The keys, int64 (n_rows,): the mapped file, or a copy of 4-byte keys."""
        return self.raw_keys.astype(np.int64, copy=False)

    @property
    def nbytes(self) -> int:
        """Bytes of both files."""
        return self.raw_keys.nbytes + self.rows.nbytes

    def blocks(
        self, dtype: DTypeLike = np.float32, block_rows: int = BLOCK_ROWS
    ) -> Iterator[RowBlock]:
        """Yield the rows in file order, so that inserting them lets the last row win.

        Parameters
        ----------
        dtype
            float32 or float16; values beyond float16's range become infinite.
        block_rows
            Most rows in a block, at least 1.

        Yields
        ------
        RowBlock
            int64 keys and C-contiguous rows, read-only where they are the file itself.

        Raises
        ------
        ValueError
            If ``block_rows`` is not positive.
        """
        _require_block_rows(block_rows)
        for start in range(0, self.n_rows, block_rows):
            part = slice(start, start + block_rows)
            yield self._block(self.raw_keys[part], self.rows[part], dtype)

    def sorted_blocks(
        self, dtype: DTypeLike = np.float32, block_rows: int = BLOCK_ROWS
    ) -> Iterator[RowBlock]:
        """Yield each key once, ascending, with the last of its rows.

        Parameters, blocks and errors are those of ``blocks``. Takes 16 bytes of memory
        a row of the file, or none if the file is sorted already.
        """
        _require_block_rows(block_rows)
        if is_ascending(self.raw_keys):
            yield from self.blocks(dtype, block_rows)
            return
        order = _last_of_each_key(self.raw_keys)
        for start in range(0, len(order), block_rows):
            picked = order[start : start + block_rows]
            rows = np.take(self.rows, picked, axis=0)
            yield self._block(self.raw_keys[picked], rows, dtype)

    def error(self, problem: str) -> ModelFileError:
        """Return an error that names this directory and its table."""
        return _error(self.path, self.table, problem)

    @staticmethod
    def _block(keys: NDArray[Any], rows: Rows, dtype: DTypeLike) -> RowBlock:
        """Return a block in the types that tiers take."""
        return RowBlock(np.ascontiguousarray(keys, np.int64), convert(rows, dtype))


def open_model_directory(
    path: str | os.PathLike[str],
    dim: int | None,
    *,
    key_bytes: KeyBytes | None = None,
    table: str = "",
) -> ModelDirectory:
    """Map a model directory and check that its files fit together.

    Parameters
    ----------
    path
        The directory. An empty table has two empty files.
    dim
        Values per row. With None it follows from the sizes, for 8-byte keys.
    key_bytes
        Bytes per key if they are known; with None they follow from the sizes.
    table
        Name of the table, for error messages.

    Returns
    -------
    ModelDirectory
        The mapped files. They are closed when the last array of them is gone.

    Raises
    ------
    ModelFileError
        If the directory or a file is missing or cannot be read, or if the sizes do not
        fit ``dim`` and 8 or 4 bytes a key.
    ValueError
        If ``dim`` is not positive.

    Notes
    -----
    HugeCTR writes 8 bytes a key even for ``supportlonglong: false``. Sizes alone cannot
    tell 4-byte keys from 8-byte keys of half as many rows of twice the dim; a file that
    looks like the latter is refused.
    """
    if dim is not None and dim < 1:
        raise ValueError(f"dim={dim}: a row has at least one value")
    folder = _folder(path, table)
    key_file, key_mtime_ns = _map(folder, KEY_FILE, table)
    row_file, row_mtime_ns = _map(folder, ROW_FILE, table)
    try:
        layout = fit_sizes(key_file, row_file.nbytes, dim, key_bytes)
    except SizeError as exc:
        sizes = f"{KEY_FILE} has {key_file.nbytes} bytes, {ROW_FILE} {row_file.nbytes}"
        raise _error(folder, table, f"{sizes}: {exc}") from None
    return ModelDirectory(
        path=folder,
        dim=layout.dim,
        n_rows=layout.n_rows,
        key_bytes=layout.key_bytes,
        raw_keys=key_file.view("<i8" if layout.key_bytes == 8 else "<u4"),
        rows=row_file.view("<f4").reshape(layout.n_rows, layout.dim),
        key_mtime_ns=key_mtime_ns,
        row_mtime_ns=row_mtime_ns,
        table=table,
    )


def is_ascending(keys: NDArray[Any]) -> bool:
    """Return whether every key is larger than the one before it."""
    for start in range(0, len(keys) - 1, BLOCK_ROWS):
        part = keys[start : start + BLOCK_ROWS + 1]
        if not (part[:-1] < part[1:]).all():
            return False
    return True


def convert(rows: Rows, dtype: DTypeLike) -> Rows:
    """Return rows in ``dtype``, C-contiguous; too large a value becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype)


def _error(folder: str | os.PathLike[str], table: str, problem: str) -> ModelFileError:
    where = f"table {table}: " if table else ""
    return ModelFileError(f"{where}model directory {os.fspath(folder)}: {problem}")


def _folder(path: str | os.PathLike[str], table: str) -> Path:
    """Return the directory, or say why it is none."""
    folder = Path(path)
    if "://" in os.fspath(path):
        raise _error(path, table, "not a local path; copy or mount the files first")
    if not folder.exists():
        raise _error(folder, table, "does not exist; check sparse_files")
    if not folder.is_dir():
        raise _error(folder, table, "is a file; give the directory that holds it")
    return folder


def _map(folder: Path, name: str, table: str) -> tuple[FileBytes, int]:
    """Return a file's bytes, mapped read-only, and its modification time in ns."""
    try:
        with open(folder / name, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:  # an empty file cannot be mapped
                return np.empty(0, np.uint8), status.st_mtime_ns
            mapped = np.memmap(file, np.uint8, mode="r")
            return mapped.view(np.ndarray), status.st_mtime_ns
    except FileNotFoundError:
        raise _error(folder, table, f"no file {name!r}{_hint(folder)}") from None
    except OSError as exc:
        raise _error(folder, table, f"cannot read {name!r}: {exc.strerror}") from exc


def _hint(folder: Path) -> str:
    """Return the nearest model directories below, as the end of a message."""
    inner = sorted(child.parent.name for child in folder.glob(f"*/{KEY_FILE}"))
    return f"; did you mean one of {', '.join(inner[:5])} in it?" if inner else ""


def _last_of_each_key(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return the row number of each key's last row, in the order of the keys."""
    order = np.argsort(keys)
    ordered = keys[order]
    first = np.empty(len(keys), np.bool_)
    first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    if first.all():
        return order
    # The sort is not stable, so the last row of a key is the largest of its run.
    return np.maximum.reduceat(order, np.flatnonzero(first))


def _require_block_rows(block_rows: int) -> None:
    if block_rows < 1:
        raise ValueError(f"block_rows={block_rows}: a block has at least one row")
