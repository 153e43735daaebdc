"""Rows that say which version of which key they are, and who may see which."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import Keys, Mask, Rows, TableSpec

SPEC = TableSpec("model", "versions", 8)
UNTOUCHED = np.float32(-1.5)  # of rows that nobody filled in

_MIX = np.uint32(0x9E3779B1)

Versions = NDArray[np.int64]


def rows_at(keys: Keys, versions: Versions | int, spec: TableSpec = SPEC) -> Rows:
    """Return the rows of keys at their versions: every word depends on both."""
    n = np.broadcast_to(np.asarray(versions), keys.shape).astype(np.uint32)
    words = np.empty((keys.size, spec.dim), np.uint32)
    words[:, 0] = n
    low = (keys & 0xFFFFFFFF).astype(np.uint32)
    for column in range(1, spec.dim):
        words[:, column] = (low * np.uint32(2 * column + 1) ^ n * _MIX) + n
    return words.view(np.float32)


def versions_of(keys: Keys, rows: Rows, spec: TableSpec = SPEC) -> Versions:
    """Return the version of each row, which must be a whole row of its key."""
    versions = rows.view(np.uint32)[:, 0].astype(np.int64)
    expected = rows_at(keys, versions, spec).view(np.uint32)
    np.testing.assert_array_equal(rows.view(np.uint32), expected)
    return versions


class Ledger:
    """Which versions of a key a lookup may return: one writer, any number of readers.

    Versions of which `deletes` is true remove the key.
    """

    def __init__(self, keys: Keys, delete_every: int = 0) -> None:
        self.keys = keys
        self._delete_every = delete_every
        self._lock = threading.Lock()
        self._acknowledged = np.zeros(keys.size, np.int64)
        self._begun = np.zeros(keys.size, np.int64)
        self.n_checked = 0

    def deletes(self, versions: Versions | int) -> NDArray[np.bool_] | np.bool_:
        """Tell which versions are deletions."""
        every = self._delete_every
        if not every:
            return np.zeros(np.shape(versions), np.bool_)
        return np.equal(np.mod(versions, every), every - 1)

    def begin(self, which: NDArray[np.int64], version: int) -> None:
        """Note that a write begins; its rows may be seen from now on."""
        with self._lock:
            self._begun[which] = version

    def acknowledge(self, which: NDArray[np.int64], version: int) -> None:
        """Note that a write is done; no older row may be seen from now on."""
        with self._lock:
            self._acknowledged[which] = version

    def floor(self, which: NDArray[np.int64]) -> Versions:
        """Return the oldest versions that a lookup which begins now may return."""
        with self._lock:
            return self._acknowledged[which].copy()

    def check(
        self, which: NDArray[np.int64], floor: Versions, rows: Rows, found: Mask
    ) -> None:
        """Check what a lookup returned, all of which was answered."""
        with self._lock:
            begun = self._begun[which].copy()
            self.n_checked += which.size
        keys = self.keys[which]
        seen = versions_of(keys[found], rows[found])
        assert (seen >= floor[found]).all(), "a row older than one acknowledged"
        assert (seen <= begun[found]).all(), "a row nobody wrote"
        assert not self.deletes(seen).any()
        if (~found).any():
            assert self._delete_every, "a row is missing"
            every, low = self._delete_every, floor[~found]
            deletion = low + (every - 1 - low) % every
            assert (deletion <= begun[~found]).all(), "a row is missing"
