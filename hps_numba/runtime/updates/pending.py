"""Messages of one stream partition that wait to be applied, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from hps_numba.runtime.arrays import newest_of_each
from hps_numba.runtime.updates.frames import Records
from hps_numba.types import Keys, Position, Rows, StreamSpan, TableSpec


@dataclass(frozen=True)
class Arrived:
    """A message: its records, or None if nothing of it is to be applied."""

    offset: int
    timestamp_ms: int | None
    records: Records | None

    @property
    def kind(self) -> str:
        """What its records do; messages without any do nothing."""
        if self.records is None or not len(self.records):
            return "nothing"
        return "delete" if self.records.raw_rows is None else "insert"


@dataclass(frozen=True)
class Piece:
    """Records that are applied together: the newest of each key.

    Parameters
    ----------
    keys, rows
        Unique keys and their rows; None deletes them.
    span
        Where they are in the stream.
    n_records
        Records that they came from.
    finished
        The messages that end with this piece.
    """

    keys: Keys
    rows: Rows | None
    span: StreamSpan
    n_records: int
    finished: tuple[Arrived, ...]


class Pending:
    """What was read of one stream partition and is not applied. Not thread-safe.

    Parameters
    ----------
    spec
        The table.
    partition
        Of the stream.
    position
        The first record that is not applied.
    """

    def __init__(self, spec: TableSpec, partition: int, position: Position) -> None:
        self._spec = spec
        self._partition = partition
        self.position = position
        self.n_records = self.n_bytes = 0
        self._messages: list[Arrived] = []

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, message: Arrived) -> None:
        """Take the next message; those before the position are ignored."""
        if message.offset < self.position.offset:
            return
        self._messages.append(message)
        if message.records is not None:
            self.n_records += len(message.records)
            self.n_bytes += _bytes(message.records)

    def restart(self, position: Position) -> None:
        """Forget the messages, and go on from another position."""
        self.position = position
        self._messages.clear()
        self.n_records = self.n_bytes = 0

    def pieces(self, piece_rows: int, burst_rows: int) -> Iterator[Piece]:
        """Yield what waits, in order; the caller applies each piece.

        When the caller comes back for the next piece, the one before counts as applied;
        the rest waits on if the caller does not.

        Parameters
        ----------
        piece_rows
            Most records of a piece.
        burst_rows
            As many records that do the same, one after the other, are one piece; 0:
            never.
        """
        self._forget_applied()
        for run in _runs(self._messages):
            for piece in self._cut(run, piece_rows, burst_rows):
                yield piece
                self.position = piece.span.until
        self.restart(self.position)

    def _forget_applied(self) -> None:
        """Drop what an earlier call applied before it was broken off."""
        waiting = [m for m in self._messages if m.offset >= self.position.offset]
        self.restart(self.position)
        for message in waiting:
            self.add(message)

    def _cut(
        self, run: list[Arrived], piece_rows: int, burst_rows: int
    ) -> Iterator[Piece]:
        skipped = self._applied_of(run[0])
        sizes = [len(m.records) if m.records is not None else 0 for m in run]
        sizes[0] -= skipped
        keys, rows = self._gathered(run, skipped)
        ends = list(accumulate(sizes))
        n = ends[-1]
        step = n if burst_rows and n >= burst_rows else piece_rows
        done, since = 0, self.position
        for low in range(0, max(n, 1), max(step, 1)):
            high = min(low + step, n)
            finished = done
            while finished < len(run) and ends[finished] <= high:
                finished += 1
            until = Position(run[finished - 1].offset + 1)
            if finished < len(run) and high > (ends[finished - 1] if finished else 0):
                begin = ends[finished - 1] if finished else -skipped
                until = Position(run[finished].offset, high - begin)
            some = None if rows is None else rows[low:high]
            newest = _newest(keys[low:high], some)
            span = StreamSpan(self._partition, since, until)
            yield Piece(*newest, span, high - low, tuple(run[done:finished]))
            done, since = finished, until

    def _applied_of(self, message: Arrived) -> int:
        """Return how many records of the message were applied already."""
        records, position = message.records, self.position
        if records is None or message.offset != position.offset:
            return 0
        return min(position.record, len(records))

    def _gathered(self, run: list[Arrived], skipped: int) -> tuple[Keys, Rows | None]:
        """Return the records of a run of messages as one, contiguous and writable."""
        spec = self._spec
        parts = [m.records for m in run if m.records is not None]
        if run[0].kind == "nothing":
            return np.empty(0, np.int64), None
        keys = np.concatenate([part.keys for part in parts])[skipped:]
        if run[0].kind == "delete":
            return keys, None
        rows = [part.rows(spec.dim, spec.numpy_dtype) for part in parts]
        return keys, np.concatenate(rows)[skipped:]


def _runs(messages: list[Arrived]) -> Iterator[list[Arrived]]:
    """Yield messages that follow each other and do the same."""
    for _, run in groupby(messages, key=lambda message: message.kind):
        yield list(run)


def _newest(keys: Keys, rows: Rows | None) -> tuple[Keys, Rows | None]:
    if rows is None:
        return np.unique(keys), None
    return newest_of_each(keys, rows)


def _bytes(records: Records) -> int:
    rows = records.raw_rows
    return records.keys.size * 8 + (0 if rows is None else rows.size)
