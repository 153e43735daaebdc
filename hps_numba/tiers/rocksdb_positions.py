"""How far an update stream was applied to a table, stored among the table's rows.

A position is a pair of the table's own family, behind the last possible row: a batch,
and also a sorted file that RocksDB takes over, changes rows and position together.
"""

from __future__ import annotations

from collections.abc import Mapping

from hps_numba.errors import StreamGapError, TierCorruptionError
from hps_numba.tiers.rocksdb_errors import NAME
from hps_numba.tiers.rocksdb_family import END_OF_ROWS, Batch, Family
from hps_numba.types import Position, StreamSpan

_PREFIX = END_OF_ROWS + b"stream/"


def pair_of(partition: int, position: Position) -> tuple[bytes, bytes]:
    """Return the key and the value that store a position."""
    return _PREFIX + b"%d" % partition, str(position).encode()


def put_positions(
    batch: Batch, family: Family, positions: Mapping[int, Position]
) -> None:
    """Add positions to a batch."""
    for partition, position in positions.items():
        batch.put(family, *pair_of(partition, position))


def read_positions(family: Family | None, tag: str) -> dict[int, Position]:
    """Return the positions that a family holds, by partition of the stream."""
    if family is None:
        return {}
    return dict(_parsed(key, value, tag) for key, value in family.beyond_rows())


def read_position(family: Family | None, partition: int, tag: str) -> Position | None:
    """Return the position of one partition of the stream, or None."""
    key, _ = pair_of(partition, Position(0))
    value = None if family is None else family.get(key)
    return None if value is None else _parsed(key, value, tag)[1]


def is_due(stored: Position | None, span: StreamSpan, tag: str) -> bool:
    """Return whether a span brings anything to a table that is at ``stored``.

    Raises
    ------
    StreamGapError
        If the span begins later than where the table is.
    """
    if stored is None:
        return True
    if stored < span.since:
        raise StreamGapError(
            f"{NAME}:{tag}: partition {span.partition} of the stream was applied up to "
            f"{stored}, and the next records are those from {span.since} on: give them "
            "from there, or seek",
            offset=stored.offset,
            record=stored.record,
        )
    return stored < span.until


def _parsed(key: bytes, value: bytes, tag: str) -> tuple[int, Position]:
    try:
        return int(key.removeprefix(_PREFIX)), Position.parse(value.decode())
    except ValueError as exc:
        raise TierCorruptionError(
            f"the position {key!r}: {value!r} cannot be read; restore the database, or "
            "remove it and deploy again",
            tier=NAME,
            tag=tag,
        ) from exc
