"""Plain answers to compare with: rows that say what they are, and a dict of tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT = 1 << 24  # float32 holds every integer up to here


def versioned_rows(
    keys: ArrayLike, version: ArrayLike, dim: int, dtype: Any = np.float32
) -> NDArray[Any]:
    """Return a row per key: the key at even places, the version at odd ones.

    Both are whole numbers that the dtype holds exactly. ``dim`` is at least 2.
    """
    key_array = np.asarray(keys)
    rows = np.empty((*key_array.shape, dim), dtype)
    rows[..., 0::2] = np.abs(key_array % _EXACT)[..., None]
    rows[..., 1::2] = np.broadcast_to(version, key_array.shape)[..., None]
    return rows


def versions_in(keys: ArrayLike, rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return the version in each row, and -1 for one that is torn or another key's."""
    versions = rows[..., 1].astype(np.int64)
    whole = rows == versioned_rows(keys, versions, rows.shape[-1], rows.dtype)
    return np.where(whole.all(axis=-1), versions, -1)


class Table:
    """A table as a dict from keys to rows."""

    def __init__(self, dim: int, default: float = 0.0) -> None:
        self._dim = dim
        self._default = default
        self._rows: dict[int, NDArray[Any]] = {}

    def update(self, keys: Iterable[int], rows: NDArray[Any]) -> None:
        """Store rows; of a repeated key the last counts."""
        self._rows.update(zip((int(k) for k in keys), rows, strict=True))

    def delete(self, keys: Iterable[int]) -> None:
        """Remove keys."""
        for key in keys:
            self._rows.pop(int(key), None)

    def lookup(self, keys: ArrayLike) -> NDArray[np.float32]:
        """Return the rows of keys of any shape."""
        key_array = np.asarray(keys)
        default = np.full(self._dim, self._default, np.float32)
        rows = [self._rows.get(int(key), default) for key in key_array.reshape(-1)]
        flat = np.array(rows, np.float32).reshape(-1, self._dim)
        return flat.reshape(*key_array.shape, self._dim)

    def found(self, keys: ArrayLike) -> NDArray[np.bool_]:
        """Return which keys there are."""
        key_array = np.asarray(keys)
        known = [int(key) in self._rows for key in key_array.reshape(-1)]
        return np.array(known, np.bool_).reshape(key_array.shape)
