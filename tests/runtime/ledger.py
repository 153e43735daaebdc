"""What lookups may see of versioned rows that change meanwhile."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

Versions = NDArray[np.int64]


class Ledger:
    """Which version of each key was begun, acknowledged and seen. Thread-safe.

    Versions of a key ascend by one from 1. Of keys that are deleted, even versions mean
    that there is no row.

    Parameters
    ----------
    n_rows
        Keys are 0 to ``n_rows`` - 1; every 16th, from 15 on, is one that is deleted.
    is_seen_by_all
        Whether a version that one lookup saw is the oldest that a later one may see.
        Otherwise only what is acknowledged is.
    """

    def __init__(self, n_rows: int, *, is_seen_by_all: bool = True) -> None:
        self.deleted_keys = np.arange(15, n_rows, 16)
        self._may_be_absent = np.zeros(n_rows, np.bool_)
        self._may_be_absent[self.deleted_keys] = True
        self._is_seen_by_all = is_seen_by_all
        self._lock = threading.Lock()
        self.begun = np.ones(n_rows, np.int64)  # by key; one thread a key writes
        self._floor = np.ones(n_rows, np.int64)  # guarded by _lock

    def begin(self, keys: NDArray[np.int64]) -> Versions:
        """Return the versions that these unique keys will have next."""
        self.begun[keys] += 1
        return self.begun[keys]

    def acknowledge(self, keys: NDArray[np.int64], versions: Versions) -> None:
        """Note that every lookup from now on must see these versions."""
        with self._lock:
            np.maximum.at(self._floor, keys, versions)

    def floor(self, keys: NDArray[np.int64]) -> Versions:
        """Return the oldest versions that a lookup may see that begins now."""
        with self._lock:
            return self._floor[keys]

    def newest(self) -> dict[int, int]:
        """Return the version of each key that has a row, once nobody writes."""
        return {
            key: version
            for key, version in enumerate(self.begun.tolist())
            if not self._may_be_absent[key] or version % 2
        }

    def judge(
        self,
        keys: NDArray[np.int64],
        versions: Versions,
        found: NDArray[np.bool_],
        floor: Versions,
    ) -> str | None:
        """Return what is wrong with what a lookup saw, or None."""
        ceiling = self.begun[keys]
        absent = ~found & self._may_be_absent[keys]
        seen = np.where(absent, floor + floor % 2, versions)
        torn = found & (versions < 0)
        lost = ~found & ~absent
        for what, wrong in {
            "a torn row": torn,
            "a row that went back": found & ~torn & (seen < floor),
            "no row where there is one": lost | (absent & (seen > ceiling)),
            "a row that nobody wrote": found & (seen > ceiling),
            "a deleted row": found & self._may_be_absent[keys] & (seen % 2 == 0),
        }.items():
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                return (
                    f"{what}: key={keys[at]} version={versions[at]} found={found[at]} "
                    f"floor={floor[at]} ceiling={ceiling[at]}"
                )
        if self._is_seen_by_all:
            self.acknowledge(keys, seen)
        return None
