"""One partition of a host table and its kernels, driven by hand."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing
from hps_numba.tiers.host_partition import FIRST_SLOTS, Partition
from tests.kernels.test_hashing import reference_hash

ROW_BYTES = 24


def row_of(key: int, version: int) -> np.ndarray:
    words = np.array([key, version, key ^ version], np.int64)
    return words.view(np.uint8)


def rows_of(keys: np.ndarray, version: int) -> np.ndarray:
    return np.array([row_of(k, version) for k in keys.tolist()]).reshape(-1, ROW_BYTES)


def home(key: int, n_slots: int) -> int:
    """The slot where probing for a key begins, in an index of ``n_slots``."""
    return (reference_hash(key) >> 20) % n_slots


def colliding_keys(n: int, *, slot: int, n_slots: int = FIRST_SLOTS) -> np.ndarray:
    keys = (k for k in range(-(10**6), 10**6) if home(k, n_slots) == slot)
    return np.array([next(keys) for _ in range(n)])


class Bare:
    """One partition and its kernels, with limits set by hand and a dict beside it."""

    def __init__(
        self,
        *,
        margin: int = 48,
        most_used: int = 48,
        policy: int = kernel.RANDOM,
        row_bytes: int = ROW_BYTES,
    ) -> None:
        self.policy = policy
        self.partition = Partition(
            margin, row_bytes, scored=policy != kernel.RANDOM, capped=True
        )
        self.partition.limits[:] = margin, most_used
        self.descriptor = np.zeros((1, kernel.D_FIELDS), np.int64)
        self.partition.describe(self.descriptor[0])
        self.tick = 0

    def upsert(self, keys, version: int) -> tuple[int, int]:
        """Upsert, adding segments as needed; return why it stopped and how far."""
        keys = np.asarray(keys, np.int64)
        order, done = np.arange(keys.size), 0
        self.tick += 1
        while True:
            reason, n = writing.upsert_rows(
                self.descriptor,
                0,
                self.partition.state,
                self.partition.free,
                keys,
                rows_of(keys, version),
                order[done:],
                self.partition.limits,
                self.policy,
                self.tick,
            )
            done += n
            if reason != writing.NEED_ROWS:
                return reason, done
            self.partition.add_segment()
            self.partition.describe(self.descriptor[0])

    def remove(self, keys) -> int:
        keys = np.asarray(keys, np.int64)
        p = self.partition
        order = np.arange(keys.size)
        return writing.remove_keys(self.descriptor, 0, p.state, p.free, keys, order)

    def evict(self, n_victims: int, seed: int = 0) -> int:
        p = self.partition
        return writing.evict_rows(
            self.descriptor, 0, p.state, p.free, n_victims, self.policy, seed
        )

    def fetch(self, keys, descriptor=None):
        """Return hits, where it stopped, the rows and what was found."""
        keys = np.asarray(keys, np.int64)
        out = np.zeros((keys.size, ROW_BYTES), np.uint8)
        found = np.zeros(keys.size, np.bool_)
        self.tick += 1
        hits, stop = kernel.fetch_rows(
            self.descriptor if descriptor is None else descriptor,
            keys,
            out,
            found,
            0,
            keys.size,
            self.policy,
            self.tick,
        )
        return hits, stop, out, found

    def keys(self) -> list[int]:
        out = np.empty(self.size, np.int64)
        assert kernel.list_keys(self.descriptor, 0, out) == out.size
        return sorted(out.tolist())

    def rebuild(self) -> None:
        index = self.partition.new_index()
        new_slots = (index.size - kernel.HEADER_BYTES) // kernel.SLOT_BYTES
        old = self.partition.index
        writing.rebuild_index(
            self.descriptor,
            0,
            self.partition.state,
            index.ctypes.data,
            new_slots - 1,
        )
        limits = self.partition.limits.copy()
        self.partition.set_index(index)
        self.partition.limits[0] = limits[0]
        self.partition.describe(self.descriptor[0])
        writing.retire_index(old.ctypes.data)
        self.old = old  # as a snapshot would, keep it for those who still read it

    @property
    def slots(self) -> np.ndarray:
        """The index as (n_slots, 2): key, meta."""
        words = self.partition.index.view(np.int64)
        return words[kernel.HEADER_BYTES // 8 :].reshape(-1, 2)

    @property
    def size(self) -> int:
        return int(self.partition.state[writing.S_SIZE])

    @property
    def used(self) -> int:
        return int(self.partition.state[writing.S_USED])

    def check(self, expected: dict[int, int]) -> None:
        """Compare everything with a dict of key -> version."""
        assert self.keys() == sorted(expected)
        row_numbers = self.slots[:, 1] & kernel.LOW
        assert self.used == np.count_nonzero(row_numbers != kernel.NO_ROW)
        live = row_numbers[row_numbers < kernel.TOMBSTONE].tolist()
        free = self.partition.free[: self.partition.state[writing.S_FREE]].tolist()
        rows_handed_out = range(int(self.partition.state[writing.S_NEXT_ROW]))
        assert sorted(live + free) == list(rows_handed_out)
        keys = list(expected)
        hits, stop, out, found = self.fetch(keys)
        assert (hits, stop) == (len(keys), len(keys))
        assert found.all()
        for key, row in zip(keys, out, strict=True):
            np.testing.assert_array_equal(row, row_of(key, expected[key]))
