"""A partition of a host table: the memory of its index and rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing

Bytes = NDArray[np.uint8]

FIRST_SLOTS = 64
FULL_LOAD = 0.6  # of the largest index at the margin, so that tombstones find room
_MAX_LOAD = 0.75  # of an index, tombstones included
_ALIGNMENT = 64
SEGMENT_OVERHEAD = 2 * _ALIGNMENT * kernel.MAX_SEGMENTS


class Partition:
    """An index and segments of rows. Written under the lock of its table.

    Parameters
    ----------
    margin
        Most rows.
    row_bytes
        Bytes of one row.
    scored
        Whether each row has a score.
    capped
        Whether all bytes are planned for: the index stays as small as ``margin``
        allows, and the free list is as long as it can get from the beginning.
    """

    def __init__(
        self, margin: int, row_bytes: int, *, scored: bool, capped: bool
    ) -> None:
        self._margin = margin
        self._row_bytes = row_bytes
        self._scored = scored
        self._max_slots = slots_for(margin) if capped else 1 << 40
        self._segments: list[Bytes] = []
        self._scores: list[Bytes] = []
        self.state = np.zeros(writing.S_FIELDS, np.int64)
        self.limits = np.zeros(2, np.int64)
        self.free = np.empty(margin + 1 if capped else 0, np.uint32)
        self.set_index(_empty_index(FIRST_SLOTS))

    @property
    def n_slots(self) -> int:
        """Slots of the index."""
        return n_slots(self.index)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays()) + self.free.nbytes

    def arrays(self) -> list[Bytes]:
        """Return the arrays that readers reach."""
        return [self.index, *self._segments, *self._scores]

    def describe(self, row: NDArray[np.int64]) -> None:
        """Write the addresses of the arrays to a descriptor row."""
        row[kernel.D_INDEX] = address(self.index)
        row[kernel.D_MASK] = self.n_slots - 1
        for k, segment in enumerate(self._segments):
            row[kernel.D_ROWS + k] = address(segment)
        for k, segment in enumerate(self._scores):
            row[kernel.D_SCORES + k] = address(segment)

    def set_index(self, index: Bytes) -> None:
        """Take an index that holds the partition's keys."""
        self.index = index
        self.limits[:] = self._margin, int(self.n_slots * _MAX_LOAD)

    def new_index(self) -> Bytes:
        """Return an empty index for the present keys and as many again."""
        n_slots = FIRST_SLOTS
        while n_slots < 2 * (int(self.state[writing.S_SIZE]) + 1):
            n_slots *= 2
        return _empty_index(min(n_slots, self._max_slots))

    def add_segment(self) -> None:
        """Make room for more rows, twice as many as the last time."""
        room = int(self.state[writing.S_ROOM])
        n_rows = 1 << (kernel.SEGMENT_SHIFT + len(self._segments))
        # A row more than there are keys, because an update takes a fresh one.
        n_rows = min(n_rows, self._margin + 1 - room)
        free = self.free
        if free.size < room + n_rows:
            free = np.empty(room + n_rows, np.uint32)
            free[: self.free.size] = self.free
        # All is allocated before anything changes: memory may run out.
        segment = _aligned(n_rows * self._row_bytes)
        if self._scored:
            self._scores.append(_aligned(n_rows * 8))
        self._segments.append(segment)
        self.free = free
        self.state[writing.S_ROOM] = room + n_rows


def slots_for(n_rows: int) -> int:
    """Return the slots of the smallest index that keeps ``n_rows`` in any order."""
    n_slots = FIRST_SLOTS
    while int(n_slots * FULL_LOAD) < n_rows:
        n_slots *= 2
    return n_slots


def _aligned(n_bytes: int) -> Bytes:
    # np.empty asks for huge pages and zeroes nothing; np.zeros does neither.
    raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + n_bytes]


def index_bytes(n_slots: int) -> int:
    """Return the bytes of an index, alignment included."""
    return kernel.HEADER_BYTES + n_slots * kernel.SLOT_BYTES + _ALIGNMENT


def _empty_index(n_slots: int) -> Bytes:
    index = _aligned(kernel.HEADER_BYTES + n_slots * kernel.SLOT_BYTES)
    words = index.view(np.int64)
    words[: kernel.HEADER_BYTES // 8] = 0
    words[kernel.HEADER_BYTES // 8 + 1 :: 2] = kernel.NO_ROW
    return index


def n_slots(index: Bytes) -> int:
    """Return the slots of an index."""
    return (index.size - kernel.HEADER_BYTES) // kernel.SLOT_BYTES


def address(array: NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    return int(array.ctypes.data)
