"""A process that writes to a RocksDB tier until it is killed.

Calls are numbered from 1, and what a call does follows from its number alone, so the
test knows what the database holds after call n. The process prints ``ready`` and then
the number of each call that returned; it goes on where the database says it is.

An update's call is a message of a stream, applied in pieces, or at once as a file.
"""

from __future__ import annotations

import os
import sys
from itertools import count

import numpy as np

from hps_numba.tiers import rocksdb_table
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import Keys, Position, RowBlock, Rows, StreamSpan, TableSpec

SPEC = TableSpec("model", "table", 8)
PARTITION = 3
PIECE_ROWS = 200
PIECES = 5  # of one call
GROUPS = 7  # sets of keys that calls write in turn
LOAD_ROWS = 20_000


def open_tier(path: str) -> RocksDBTier:
    """Open the database."""
    tier = RocksDBTier(path, cache_bytes=1 << 20)
    tier.open_table(SPEC)
    return tier


def group_keys(group: int) -> Keys:
    """Return the keys of a group, ascending; groups interleave."""
    return np.arange(PIECE_ROWS * PIECES, dtype=np.int64) * GROUPS - 1000 + group


def deletes(call: int) -> bool:
    """Return whether a call deletes its group instead of writing it."""
    return call % 5 == 4


def at_once(call: int) -> bool:
    """Return whether a call is applied as one span, large enough for a file."""
    return call % 3 == 0


def group_value(group: int, call: int) -> int:
    """Return what a group's rows hold after a call, 0 for no rows."""
    last = call - (call - group) % GROUPS
    return 0 if last < 1 or deletes(last) else last


def rows_of(call: int, n_rows: int) -> Rows:
    """Return rows that name the call."""
    return np.full((n_rows, SPEC.dim), call, np.float32)


def load_keys(call: int) -> Keys:
    """Return the keys of a load: other calls have others, in another order."""
    keys = np.arange(LOAD_ROWS, dtype=np.int64) * (1 + call % 3)
    return np.random.default_rng(call).permutation(keys)


def report(line: object) -> None:
    """Write a line to the test, all at once."""
    os.write(1, f"{line}\n".encode())


def position(tier: RocksDBTier) -> Position:
    """Return where the updates go on."""
    return tier.positions(SPEC.tag).get(PARTITION, Position(1))


def update(tier: RocksDBTier) -> None:
    """Write and delete groups of keys, from the stored position on."""
    start = position(tier)
    for call in count(start.offset):
        keys = group_keys(call % GROUPS)
        step = keys.size if at_once(call) else PIECE_ROWS
        for low in range(start.record, keys.size, step):
            part = keys[low : low + step]
            rows = None if deletes(call) else rows_of(call, part.size)
            ends = low + step >= keys.size
            until = Position(call + 1) if ends else Position(call, low + step)
            span = StreamSpan(PARTITION, Position(call, low), until)
            assert tier.apply(SPEC.tag, part, rows, span) == part.size
        start = Position(call + 1)
        report(call)


def load(tier: RocksDBTier) -> None:
    """Replace the table again and again."""
    fingerprint = tier.fingerprint(SPEC.tag) or {"call": 0}
    for call in count(fingerprint["call"] + 1):
        keys = load_keys(call)
        block = RowBlock(keys, rows_of(call, keys.size))
        tier.load(SPEC.tag, [block], fingerprint={"call": call})
        report(call)


if __name__ == "__main__":
    rocksdb_table._BURST_ROWS = PIECE_ROWS * PIECES
    writer = open_tier(sys.argv[2])
    report("ready")
    {"update": update, "load": load}[sys.argv[1]](writer)
