"""A stream read by other means: a plain consumer, ``struct`` and a dict."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from typing_extensions import Self

from hps_numba.types import Position, RowBlock

PATIENCE_S = 20.0

Row = tuple[float, ...]


@dataclass(frozen=True)
class _Message:
    offset: int
    records: tuple[tuple[int, Row | None], ...]


class Replay(AbstractContextManager["Replay"]):
    """What a table holds when its stream was applied up to some positions.

    Parameters
    ----------
    brokers, topic
        The stream.
    partitions
        How many it has.
    """

    def __init__(self, brokers: str, topic: str, partitions: int) -> None:
        self.rows: dict[int, Row] = {}
        self.n_records = self.n_deletes = 0
        self._reached = {p: Position(0) for p in range(partitions)}
        self._read: dict[int, deque[_Message]] = {p: deque() for p in self._reached}
        self._consumer: Any = Consumer(
            {
                "bootstrap.servers": brokers,
                "group.id": "replay",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        self._consumer.assign([TopicPartition(topic, p, 0) for p in self._reached])

    def advance(self, positions: Mapping[int, Position]) -> None:
        """Apply the stream up to positions, each at or beyond the one before."""
        for partition, until in positions.items():
            assert until >= self._reached[partition], "a position went back"
            while self._reached[partition] < until:
                self._apply(partition, until)

    def _apply(self, partition: int, until: Position) -> None:
        """Apply the next message, or what of it is before a position."""
        message = self._next(partition)
        since = self._reached[partition]
        assert message.offset == since.offset, "a message is missing"
        ends = until.offset > message.offset
        last = len(message.records) if ends else until.record
        for key, row in message.records[since.record : last]:
            self.n_records += 1
            if row is None:
                self.n_deletes += 1
                self.rows.pop(key, None)
            else:
                self.rows[key] = row
        self._reached[partition] = Position(message.offset + 1) if ends else until
        if ends:
            self._read[partition].popleft()

    def _next(self, partition: int) -> _Message:
        deadline = monotonic() + PATIENCE_S
        while not self._read[partition]:
            assert monotonic() < deadline, f"partition {partition} ends too early"
            message = self._consumer.poll(0.1)
            if message is not None:
                assert message.error() is None, message.error()
                records = tuple(_records(message.key(), message.value()))
                read = _Message(message.offset(), records)
                self._read[message.partition()].append(read)
        return self._read[partition][0]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Read no more."""
        self._consumer.close()

    def __enter__(self) -> Self:
        return self


def _records(key: bytes | None, value: bytes) -> Iterator[tuple[int, Row | None]]:
    """Yield the keys of a message with their rows, None where they are deleted."""
    magic, row_bytes = struct.unpack_from("<4sI", value)
    assert magic == b"HCTR"
    assert key in (None, b"delete")
    body = memoryview(value)[8:]
    if key is not None:
        for (deleted,) in struct.iter_unpack("<q", body):
            yield deleted, None
    elif body:
        for kept, *row in struct.iter_unpack(f"<q{row_bytes // 4}f", body):
            yield kept, tuple(row)


def mark_ends(brokers: str, topic: str, partitions: int) -> dict[int, Position]:
    """End each partition with a message that holds nothing; return what comes next."""
    ends: dict[int, Position] = {}

    def delivered(error: Any, message: Any) -> None:
        assert error is None, error
        ends[message.partition()] = Position(message.offset() + 1)

    producer = Producer({"bootstrap.servers": brokers, "log_level": 0})
    beacon = struct.pack("<4sI", b"HCTR", 0)
    for partition in range(partitions):
        producer.produce(topic, beacon, partition=partition, on_delivery=delivered)
    assert producer.flush(PATIENCE_S) == 0
    assert len(ends) == partitions
    return ends


def as_dict(blocks: Iterable[RowBlock]) -> dict[int, Row]:
    """Return rows by key; no key may come twice."""
    rows: dict[int, Row] = {}
    for block in blocks:
        keys = block.keys.tolist()
        rows.update(zip(keys, map(tuple, block.rows.tolist()), strict=True))
        assert rows.keys() >= set(keys)
    return rows
