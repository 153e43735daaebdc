"""Frames being filled: one lane for each Kafka partition of a topic.

Records of one key are in one lane, and leave it in the order in which they came. A
frame holds rows of one width or deletions, so a lane that is to take another kind ships
what it has first.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import numpy as np

from hps_numba.kernels.host.frames import gather_records
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.runtime.updates.frames import HEADER_BYTES, header
from hps_numba.runtime.updates.outbox import Parcel
from hps_numba.types import Keys, Rows

# What a message takes beside its frame: the head of a batch, and that of a record.
OVERHEAD_BYTES = 128
_PACK_BYTES = 4 << 20  # of records packed at once, so that a large send needs no copy


class Lane:
    """The next message to one partition; not thread-safe."""

    def __init__(self, topic: str, partition: int, message_bytes: int) -> None:
        self.topic = topic
        self.partition = partition
        self.born_s = 0.0  # when the first record came
        self.n_records = 0
        self._max_bytes = message_bytes - OVERHEAD_BYTES
        self._row_bytes = 0
        self._frame = bytearray()

    @property
    def n_bytes(self) -> int:
        """Bytes that wait."""
        return len(self._frame)

    def takes(self, row_bytes: int, record_bytes: int) -> int:
        """Return how many records of a kind have room here; 0 asks to ship first."""
        if not self.n_records:
            return (self._max_bytes - HEADER_BYTES) // record_bytes
        if row_bytes != self._row_bytes:
            return 0
        return (self._max_bytes - len(self._frame)) // record_bytes

    def add(self, records: memoryview, n_records: int, row_bytes: int) -> None:
        """Add packed records, for which there is room."""
        if not self.n_records:
            self.born_s = monotonic()
            self._row_bytes = row_bytes
            self._frame += header(row_bytes)
        self._frame += records
        self.n_records += n_records

    def parcel(self) -> Parcel:
        """Return the message as it is now."""
        return Parcel(
            self.topic,
            self.partition,
            bytes(self._frame),
            self.n_records,
            not self._row_bytes,
        )

    def clear(self) -> None:
        """Begin the next message."""
        self._frame = bytearray()
        self.n_records = 0


def spread(
    keys: Keys, rows: Rows | None, lanes: list[Lane], num_partitions: int
) -> Iterator[tuple[Lane, memoryview, int]]:
    """Yield packed records for the lanes that they belong to, in order of each key.

    A key's group is its hash modulo ``num_partitions``, and a group's lane its number
    modulo the number of lanes, as HPS has it.
    """
    raw = np.empty((len(keys), 0), np.uint8) if rows is None else rows.view(np.uint8)
    record_bytes = keys.itemsize + raw.shape[1]
    step = max(1, _PACK_BYTES // record_bytes)
    for start in range(0, len(keys), step):
        some = keys[start : start + step]
        order, bounds = group_by_partition(some, num_partitions)
        records = np.empty(len(some) * record_bytes, np.uint8)
        gather_records(some, raw[start : start + step], order, records)
        packed = records.data
        for group in range(num_partitions):
            begin, end = int(bounds[group]), int(bounds[group + 1])
            if begin < end:
                part = packed[begin * record_bytes : end * record_bytes]
                yield lanes[group % len(lanes)], part, end - begin
