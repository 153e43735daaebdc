"""A description of a model directory for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.tiers.model_files.checks import count_unique, row_chunks
from hps_numba.tiers.model_files.directory import ModelDirectory
from hps_numba.types import Progress


@dataclass(frozen=True)
class FileSummary:
    """What ``hps-numba inspect`` shows of a model directory.

    Parameters
    ----------
    path
        The directory.
    n_rows, dim
        Shape of the row file.
    total_bytes
        Bytes of both files.
    key_dtype
        ``"int64"`` or ``"uint32"``, as stored.
    min_key, max_key
        The smallest and the largest key; None for an empty table.
    n_unique, n_duplicates
        Different keys, and rows that a later row of the same key replaces.
    min_value, max_value, mean, std
        Over the finite values, in float64; None if there is none.
    n_non_finite
        Values that are infinite or no number.
    n_zero_rows
        Rows with nothing but zeros.
    """

    path: str
    n_rows: int
    dim: int
    total_bytes: int
    key_dtype: str
    min_key: int | None
    max_key: int | None
    n_unique: int
    n_duplicates: int
    min_value: float | None
    max_value: float | None
    mean: float | None
    std: float | None
    n_non_finite: int
    n_zero_rows: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary for ``json.dumps``."""
        return asdict(self)


def summarise(
    directory: ModelDirectory, *, progress: Progress | None = None
) -> FileSummary:
    """Read a model directory once and describe it, in bounded memory.

    Parameters
    ----------
    directory
        The mapped files.
    progress
        Called with the rows read since the last call; they add up to ``n_rows``.
    """
    keys = directory.raw_keys
    n_unique = count_unique(keys)
    values = _Values()
    for _, rows in row_chunks(directory):
        values.add(rows)
        if progress is not None:
            progress(len(rows))
    return FileSummary(
        path=str(directory.path),
        n_rows=directory.n_rows,
        dim=directory.dim,
        total_bytes=directory.nbytes,
        key_dtype=keys.dtype.name,
        min_key=int(keys.min()) if len(keys) else None,
        max_key=int(keys.max()) if len(keys) else None,
        n_unique=n_unique,
        n_duplicates=directory.n_rows - n_unique,
        min_value=values.low if values.n_finite else None,
        max_value=values.high if values.n_finite else None,
        mean=values.mean if values.n_finite else None,
        std=values.std if values.n_finite else None,
        n_non_finite=values.n_non_finite,
        n_zero_rows=values.n_zero_rows,
    )


class _Values:
    """Statistics of the values so far."""

    def __init__(self) -> None:
        self.n_finite = self.n_non_finite = self.n_zero_rows = 0
        self.low, self.high = math.inf, -math.inf
        self.mean = 0.0
        self._squares = 0.0  # sum of squared differences from the mean

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.n_finite)

    def add(self, rows: NDArray[np.float32]) -> None:
        self.n_zero_rows += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        finite = np.isfinite(rows)
        n_finite = int(np.count_nonzero(finite))
        self.n_non_finite += rows.size - n_finite
        if n_finite:
            self._add_finite(rows if n_finite == rows.size else rows[finite])

    def _add_finite(self, values: NDArray[np.float32]) -> None:
        """Merge a chunk's mean and squares, which stays exact for large means."""
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        mean = float(values.mean(dtype=np.float64))
        squares = float(values.var(dtype=np.float64)) * values.size
        n_before, self.n_finite = self.n_finite, self.n_finite + values.size
        shift = mean - self.mean
        self.mean += shift * values.size / self.n_finite
        self._squares += squares + shift**2 * n_before * values.size / self.n_finite
