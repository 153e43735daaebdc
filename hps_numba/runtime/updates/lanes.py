"""Frames being filled: one lane for each Kafka partition of a topic.

Records of one key are in one lane, and leave it in the order in which they came. A
frame holds rows of one width or deletions, so a lane that is to take another kind ships
what it has first.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.host.frames import gather_records
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.runtime.updates.frames import HEADER_BYTES, RawRows, header
from hps_numba.runtime.updates.outbox import Parcel
from hps_numba.types import Keys

# What a message takes beside its frame: the head of a batch, and that of a record.
OVERHEAD_BYTES = 128
_GROUP_KEYS = 1 << 16  # keys grouped at once; their order then stays in the CPU's cache


class Lane:
    """The next message to one partition; not thread-safe."""

    def __init__(self, topic: str, partition: int, message_bytes: int) -> None:
        self.topic = topic
        self.partition = partition
        self.born_s = 0.0  # when the first record came
        self.n_records = 0
        self._max_bytes = message_bytes - OVERHEAD_BYTES
        self._row_bytes = 0
        self._used = 0
        self._frame = np.empty(0, np.uint8)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the lane has for its messages."""
        return self._frame.size

    def room(self, row_bytes: int) -> int:
        """Return how many records of a kind fit in; 0 asks to ship first."""
        if self.n_records and row_bytes != self._row_bytes:
            return 0
        used = self._used or HEADER_BYTES
        return (self._max_bytes - used) // (8 + row_bytes)

    def add(self, keys: Keys, raw_rows: RawRows, picked: NDArray[np.int64]) -> None:
        """Add the records at some positions, for which there is room."""
        if not self.n_records:
            self._begin(raw_rows.shape[1])
        end = self._used + len(picked) * (8 + self._row_bytes)
        self._reserve(end)
        gather_records(keys, raw_rows, picked, self._frame[self._used : end])
        self._used = end
        self.n_records += len(picked)

    def parcel(self) -> Parcel:
        """Return the message as it is now."""
        frame = self._frame[: self._used].tobytes()
        is_delete = not self._row_bytes
        return Parcel(self.topic, self.partition, frame, self.n_records, is_delete)

    def clear(self) -> None:
        """Begin the next message, in the same memory."""
        self._used = self.n_records = 0

    def release(self) -> None:
        """Give the memory of an empty lane back."""
        assert not self.n_records
        self._frame = np.empty(0, np.uint8)

    def _begin(self, row_bytes: int) -> None:
        self.born_s = monotonic()
        self._row_bytes = row_bytes
        self._reserve(HEADER_BYTES)
        self._used = HEADER_BYTES
        self._frame[:HEADER_BYTES] = np.frombuffer(header(row_bytes), np.uint8)

    def _reserve(self, n_bytes: int) -> None:
        """Make the memory larger if it must be; by half at least, as it will go on."""
        if n_bytes > self._frame.size:
            grown = max(n_bytes, self._frame.size * 3 // 2)
            frame = np.empty(min(grown, self._max_bytes), np.uint8)
            frame[: self._used] = self._frame[: self._used]
            self._frame = frame


def spread(
    keys: Keys, lanes: list[Lane], num_partitions: int
) -> Iterator[tuple[Lane, NDArray[np.int64]]]:
    """Yield lanes, and the positions of keys that belong there, in order of each key.

    A key's group is its hash modulo ``num_partitions``, and a group's lane its number
    modulo the number of lanes, as HPS has it.
    """
    for start in range(0, len(keys), _GROUP_KEYS):
        some = keys[start : start + _GROUP_KEYS]
        order, bounds = group_by_partition(some, num_partitions)
        order += start
        ends = bounds.tolist()
        for group in range(num_partitions):
            if ends[group] < ends[group + 1]:
                picked = order[ends[group] : ends[group + 1]]
                yield lanes[group % len(lanes)], picked
