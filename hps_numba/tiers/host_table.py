"""One table in host memory: its partitions, their growth, and their limits.

Invariants
----------
- Writers hold ``lock``; readers take the newest ``snapshot`` and no lock.
- A snapshot keeps alive every array whose address is in it, so memory that a reader may
  touch is freed only after the reader is gone.
- A snapshot is published before its index replaces the old one, and the old index is
  marked retired before any row changes again (see ``kernels.host.table``).
- ``n_bytes`` counts every array of the table and stays within ``max_bytes``, also while
  an index is being rebuilt.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import ConfigError
from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, OverflowPolicy, Rows, TableSpec

Bytes = NDArray[np.uint8]

_POLICIES = {
    OverflowPolicy.EVICT_RANDOM: kernel.RANDOM,
    OverflowPolicy.EVICT_LEAST_USED: kernel.LEAST_USED,
    OverflowPolicy.EVICT_OLDEST: kernel.OLDEST,
}
_FIRST_SLOTS = 64
_MAX_LOAD = 0.75  # of an index, tombstones included
_FULL_LOAD = 0.6  # of the largest index at capacity, so that tombstones find room
_ALIGNMENT = 64
_SEGMENT_OVERHEAD = 2 * _ALIGNMENT * kernel.MAX_SEGMENTS


@dataclass(frozen=True)
class Overflow:
    """What a table partition does when it is full."""

    policy: OverflowPolicy = OverflowPolicy.EVICT_RANDOM
    margin: int | None = None  # most rows per partition
    target: float = 0.8  # share of the margin that eviction leaves


@dataclass(frozen=True)
class Snapshot:
    """What readers see: addresses, and the arrays that they point into."""

    descriptor: NDArray[np.int64]
    arrays: tuple[Bytes, ...]


def bytes_for_rows(
    spec: TableSpec,
    n_rows: int,
    *,
    n_partitions: int,
    overflow: Overflow,
    capped: bool,
) -> int:
    """Return the most bytes that a table of ``n_rows`` takes.

    A budget of as many bytes holds the rows, however the hash spreads them (within four
    standard deviations). Without a budget, segments double and so may be half empty.
    """
    rows = n_rows / n_partitions
    rows_each = int(rows + 4 * math.sqrt(rows)) + 2
    if overflow.margin is not None:
        rows_each = min(rows_each, overflow.margin + 2)
    slots = _FIRST_SLOTS
    while slots * _FULL_LOAD < rows_each:
        slots *= 2
    if not capped:
        segments = (rows_each >> kernel.SEGMENT_SHIFT).bit_length()
        rows_each = ((2 << segments) - 1) << kernel.SEGMENT_SHIFT
    per_row = spec.row_bytes + _row_overhead(overflow.policy)
    each = 2 * _index_bytes(slots) + _SEGMENT_OVERHEAD + rows_each * per_row
    return UpdateStamps.nbytes + n_partitions * each


class HostTable:
    """The rows of one table.

    Parameters
    ----------
    spec
        The table.
    n_partitions
        Number of partitions, each with an index and rows of its own.
    overflow
        Eviction policy and bound.
    max_bytes
        Budget of the table, or None.

    Raises
    ------
    ConfigError
        If the budget holds no row per partition.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        n_partitions: int,
        overflow: Overflow,
        max_bytes: int | None,
    ) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.stamps = UpdateStamps()  # guarded by lock
        self.policy = _POLICIES[overflow.policy]
        self.tick = 0
        self.evictions = 0  # guarded by lock
        self.refused_backfills = 0  # guarded by lock
        self.max_bytes = max_bytes
        self._overflow = overflow
        self._random = np.random.default_rng(0)
        self._n_partitions = n_partitions
        self.capacity = self._capacity()
        self.clear_locked()

    @property
    def margin(self) -> int:
        """Most rows per partition, by configuration or by the budget."""
        margin = self._overflow.margin
        return self.capacity if margin is None else min(margin, self.capacity)

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(int(p.state[writing.S_SIZE]) for p in self._partitions)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return UpdateStamps.nbytes + sum(p.n_bytes for p in self._partitions)

    def clear_locked(self) -> None:
        """Forget all rows."""
        n = self._n_partitions
        capped = self.max_bytes is not None
        free_rows = self.capacity + 1 if capped else 0
        self._partitions = [_Partition(self, free_rows) for _ in range(n)]
        self._descriptor = np.zeros((n, kernel.D_FIELDS), np.int64)
        for p, partition in enumerate(self._partitions):
            partition.describe(self._descriptor[p])
        self._publish()

    def upsert_locked(self, keys: Keys, rows: Rows) -> None:
        """Store rows, growing or evicting where there is no room."""
        # Compiled code is made for writable arrays, so read-only ones are copied.
        keys, rows = (np.require(a, requirements="W") for a in (keys, rows))
        order, bounds = group_by_partition(keys, len(self._partitions))
        as_bytes = rows.view(np.uint8)
        for p, partition in enumerate(self._partitions):
            todo = order[bounds[p] : bounds[p + 1]]
            while todo.size:
                reason, done = writing.upsert_rows(
                    self._descriptor,
                    p,
                    partition.state,
                    partition.free,
                    keys,
                    as_bytes,
                    todo,
                    partition.limits,
                    self.policy,
                    self.tick,
                )
                todo = todo[done:]
                self._make_room(p, reason)

    def remove_locked(self, keys: Keys) -> int:
        """Remove keys and return how many were there."""
        order, bounds = group_by_partition(keys, len(self._partitions))
        return sum(
            writing.remove_keys(
                self._descriptor,
                p,
                partition.state,
                partition.free,
                keys,
                order[bounds[p] : bounds[p + 1]],
            )
            for p, partition in enumerate(self._partitions)
        )

    def keys_by_partition(self) -> Iterator[Keys]:
        """Yield the keys of each partition, as they are when it is reached."""
        for p in range(len(self._partitions)):
            with self.lock:
                keys = np.empty(self._partitions[p].state[writing.S_SIZE], np.int64)
                n = kernel.list_keys(self._descriptor, p, keys)
            yield keys[:n]

    def _make_room(self, p: int, reason: int) -> None:
        if reason == writing.NEED_EVICTION:
            self._evict(p)
        elif reason == writing.NEED_ROWS:
            self._partitions[p].add_segment(self.spec.row_bytes)
            self._partitions[p].describe(self._descriptor[p])
            self._publish()
        elif reason == writing.NEED_INDEX:
            self._rebuild_index(p)

    def _evict(self, p: int) -> None:
        partition = self._partitions[p]
        goal = min(int(self.margin * self._overflow.target), self.margin - 1)
        # Rows used while victims are chosen are spared, so one pass may not do.
        for policy in (self.policy, self.policy, kernel.RANDOM):
            excess = int(partition.state[writing.S_SIZE]) - goal
            if excess <= 0:
                return
            self.evictions += writing.evict_rows(
                self._descriptor,
                p,
                partition.state,
                partition.free,
                excess,
                policy,
                int(self._random.integers(partition.n_slots)),
            )

    def _rebuild_index(self, p: int) -> None:
        partition = self._partitions[p]
        old = partition.index
        index = partition.new_index()
        writing.rebuild_index(
            self._descriptor,
            p,
            partition.state,
            _address(index),
            _n_slots(index) - 1,
        )
        partition.set_index(index)
        partition.describe(self._descriptor[p])
        self._publish()
        writing.retire_index(_address(old))

    def _publish(self) -> None:
        arrays = tuple(a for p in self._partitions for a in p.arrays())
        self.snapshot = Snapshot(self._descriptor.copy(), arrays)

    def _capacity(self) -> int:
        """Return the rows per partition that the budget allows, rebuilds included."""
        if self.max_bytes is None:
            return kernel.MAX_ROWS
        n_partitions = self._n_partitions
        budget = (self.max_bytes - UpdateStamps.nbytes) // n_partitions
        per_row = self.spec.row_bytes + _row_overhead(self._overflow.policy)
        best, slots = 0, _FIRST_SLOTS
        while 2 * _index_bytes(slots) < budget:
            left = budget - 2 * _index_bytes(slots) - _SEGMENT_OVERHEAD
            best = max(best, min(int(slots * _FULL_LOAD), left // per_row - 1))
            slots *= 2
        if best < 1:
            raise ConfigError(
                f"table {self.spec.tag}: {self.max_bytes} bytes of host memory hold no "
                f"row in each of {n_partitions} partitions (a row takes {per_row} "
                f"bytes, the table {UpdateStamps.nbytes} more); raise "
                f"volatile_db.max_bytes or lower volatile_db.num_partitions"
            )
        return best


class _Partition:
    """An index and segments of rows. Written under the lock of its table."""

    def __init__(self, table: HostTable, free_rows: int) -> None:
        self._table = table
        self._segments: list[Bytes] = []
        self._scores: list[Bytes] = []
        self.state = np.zeros(writing.S_FIELDS, np.int64)
        self.limits = np.zeros(2, np.int64)
        self.free = np.empty(free_rows, np.uint32)
        self.set_index(_empty_index(min(_FIRST_SLOTS, self._largest_index())))

    @property
    def n_slots(self) -> int:
        return _n_slots(self.index)

    @property
    def n_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays()) + self.free.nbytes

    def arrays(self) -> list[Bytes]:
        return [self.index, *self._segments, *self._scores]

    def describe(self, row: NDArray[np.int64]) -> None:
        """Write the addresses of the arrays to a descriptor row."""
        row[kernel.D_INDEX] = _address(self.index)
        row[kernel.D_MASK] = self.n_slots - 1
        for k, segment in enumerate(self._segments):
            row[kernel.D_ROWS + k] = _address(segment)
        for k, segment in enumerate(self._scores):
            row[kernel.D_SCORES + k] = _address(segment)

    def set_index(self, index: Bytes) -> None:
        self.index = index
        self.limits[:] = self._table.margin, int(self.n_slots * _MAX_LOAD)

    def new_index(self) -> Bytes:
        """Return an empty index for the present keys and as many again."""
        n_slots = _FIRST_SLOTS
        while n_slots < 2 * (int(self.state[writing.S_SIZE]) + 1):
            n_slots *= 2
        return _empty_index(min(n_slots, self._largest_index()))

    def add_segment(self, row_bytes: int) -> None:
        """Make room for more rows, twice as many as the last time."""
        n_rows = 1 << (kernel.SEGMENT_SHIFT + len(self._segments))
        room = int(self.state[writing.S_ROOM])
        n_rows = min(n_rows, self._table.capacity + 1 - room)
        self._segments.append(_aligned(n_rows * row_bytes))
        if self._table.policy != kernel.RANDOM:
            self._scores.append(_aligned(n_rows * 8))
        if self.free.size < room + n_rows:
            grown = np.empty(room + n_rows, np.uint32)
            grown[: self.free.size] = self.free
            self.free = grown
        self.state[writing.S_ROOM] = room + n_rows

    def _largest_index(self) -> int:
        if self._table.max_bytes is None:
            return 1 << 40
        n_slots = _FIRST_SLOTS
        while int(n_slots * _FULL_LOAD) < self._table.margin:
            n_slots *= 2
        return n_slots


def _row_overhead(policy: OverflowPolicy) -> int:
    """Bytes per row beside the row itself: its place in the free list, its score."""
    return 4 if policy is OverflowPolicy.EVICT_RANDOM else 12


def _aligned(n_bytes: int) -> Bytes:
    # np.empty asks for huge pages and zeroes nothing; np.zeros does neither.
    raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + n_bytes]


def _index_bytes(n_slots: int) -> int:
    return kernel.HEADER_BYTES + n_slots * kernel.SLOT_BYTES + _ALIGNMENT


def _empty_index(n_slots: int) -> Bytes:
    index = _aligned(kernel.HEADER_BYTES + n_slots * kernel.SLOT_BYTES)
    words = index.view(np.int64)
    words[: kernel.HEADER_BYTES // 8] = 0
    words[kernel.HEADER_BYTES // 8 + 1 :: 2] = kernel.NO_ROW
    return index


def _n_slots(index: Bytes) -> int:
    return (index.size - kernel.HEADER_BYTES) // kernel.SLOT_BYTES


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)
