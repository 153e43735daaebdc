"""Checks of a model directory's contents, before anything of it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hps_numba.tiers.model_files.directory import (
    ModelDirectory,
    convert,
    is_ascending,
)
from hps_numba.types import Progress

CHUNK_BYTES = 4 << 20  # of rows, so that a pass works in the processor's cache
SORT_KEYS = 1 << 24  # keys sorted at once: 128 MiB, and as much again to gather them
_SCAN_KEYS = 1 << 18
_MIX = np.uint64(0x9E3779B97F4A7C15)

DuplicateKeys = Literal["last_wins", "refuse"]
NonFinite = Literal["allow", "refuse"]


@dataclass(frozen=True)
class FileReport:
    """What a model directory holds.

    Parameters
    ----------
    n_rows
        Rows in the files.
    n_unique
        Different keys, which is the number of rows that a table gets.
    n_duplicates
        Rows that a later row of the same key replaces: ``n_rows - n_unique``.
    n_non_finite
        Values that are infinite or no number, in the dtype that they are stored in.
    n_non_finite_rows
        Rows with at least one such value.
    """

    n_rows: int
    n_unique: int
    n_duplicates: int
    n_non_finite: int
    n_non_finite_rows: int


def check(
    directory: ModelDirectory,
    *,
    duplicate_keys: DuplicateKeys = "last_wins",
    non_finite: NonFinite = "allow",
    dtype: DTypeLike = np.float32,
    progress: Progress | None = None,
) -> FileReport:
    """Read a model directory once and count what is unusual in it.

    Parameters
    ----------
    directory
        The mapped files.
    duplicate_keys
        ``"refuse"`` makes a key that repeats an error.
    non_finite
        ``"refuse"`` makes a value that is not finite an error.
    dtype
        What the rows will be stored in; float16 makes values from 65520 on infinite.
    progress
        Called with the rows read since the last call; they add up to ``n_rows``.

    Raises
    ------
    ModelFileError
        If a policy refuses the files; names the first key at fault.

    Notes
    -----
    Takes about 300 MiB of memory at most, however large the files are, unless a single
    key makes up most of them.
    """
    n_unique = count_unique(directory.raw_keys)
    n_duplicates = directory.n_rows - n_unique
    if n_duplicates and duplicate_keys == "refuse":
        example = _first_duplicate(directory.raw_keys)
        raise directory.error(
            f"{n_duplicates} of {directory.n_rows} rows repeat a key, for example key"
            f' {example}; remove them, or set duplicate_keys to "last_wins"'
        )
    n_values, n_bad_rows = _count_non_finite(directory, non_finite, dtype, progress)
    return FileReport(directory.n_rows, n_unique, n_duplicates, n_values, n_bad_rows)


def row_chunks(directory: ModelDirectory) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row number, rows) in pieces of about ``CHUNK_BYTES``."""
    step = max(1, CHUNK_BYTES // (4 * directory.dim))
    for start in range(0, directory.n_rows, step):
        yield start, directory.rows[start : start + step]


def count_unique(keys: NDArray[Any], *, sort_keys: int = SORT_KEYS) -> int:
    """Return the number of different keys, sorting about ``sort_keys`` at a time."""
    if is_ascending(keys):
        return len(keys)
    return sum(
        1 + int(np.count_nonzero(part[1:] != part[:-1]))
        for part in _sorted_parts(keys, sort_keys)
    )


def _first_duplicate(keys: NDArray[Any]) -> int:
    """Return a key that repeats; only called where one does."""
    for part in _sorted_parts(keys, SORT_KEYS):
        repeats = part[1:] == part[:-1]
        if repeats.any():
            return int(part[np.argmax(repeats)])
    raise AssertionError("no key repeats")


def _sorted_parts(keys: NDArray[Any], sort_keys: int) -> Iterator[NDArray[Any]]:
    """Yield all keys, sorted, in parts that share no key and are not empty."""
    n_parts = -(-len(keys) // sort_keys)
    for part in range(n_parts):
        picked = keys.copy() if n_parts == 1 else _part(keys, part, n_parts)
        picked.sort()
        if len(picked):
            yield picked


def _part(keys: NDArray[Any], part: int, n_parts: int) -> NDArray[Any]:
    """Return the keys that hash to one part of many, whatever their distribution."""
    picked = []
    for start in range(0, len(keys), _SCAN_KEYS):
        chunk = keys[start : start + _SCAN_KEYS]
        mixed = (chunk.astype(np.uint64) * _MIX) >> np.uint64(40)
        picked.append(chunk[mixed % np.uint64(n_parts) == part])
    return np.concatenate(picked)


def _count_non_finite(
    directory: ModelDirectory,
    policy: NonFinite,
    dtype: DTypeLike,
    progress: Progress | None,
) -> tuple[int, int]:
    """Return the numbers of values, and of rows with such values, not finite."""
    n_values = n_rows = 0
    for start, rows in row_chunks(directory):
        finite = np.isfinite(convert(rows, dtype))
        if not finite.all():
            bad = np.flatnonzero(~finite.all(axis=1))
            if policy == "refuse":
                raise _refusal(directory, start + int(bad[0]), dtype)
            n_values += finite.size - int(np.count_nonzero(finite))
            n_rows += len(bad)
        if progress is not None:
            progress(len(rows))
    return n_values, n_rows


def _refusal(directory: ModelDirectory, row: int, dtype: DTypeLike) -> Exception:
    """Return the error for the first row that has a value that is not finite."""
    values = directory.rows[row]
    column = int(np.argmin(np.isfinite(convert(values, dtype))))
    return directory.error(
        f"row {row} (key {directory.raw_keys[row]}) has {values[column]} at column"
        f" {column}, which is not finite as {np.dtype(dtype).name}; correct it, or set"
        ' non_finite to "allow"'
    )
