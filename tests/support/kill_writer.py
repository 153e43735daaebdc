"""A process that writes to a RocksDB tier until it is killed.

Calls are numbered from 1, and what a call does follows from its number alone, so the
test knows what the database holds after call n. The process prints ``ready`` and then
the number of each call that returned; it goes on where the database says it is.
"""

from __future__ import annotations

import os
import sys
from itertools import count

import numpy as np

from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import Keys, RowBlock, Rows, TableSpec

SPEC = TableSpec("model", "table", 8)
SOURCE = "topic/0"
BATCH_ROWS = 200
BATCHES = 5  # atomic batches of one call
GROUPS = 7  # sets of keys that calls write in turn
LOAD_ROWS = 20_000


def open_tier(path: str) -> RocksDBTier:
    """Open the database with small batches, so that calls have several."""
    tier = RocksDBTier(path, max_batch_size=BATCH_ROWS, cache_bytes=1 << 20)
    tier.open_table(SPEC)
    return tier


def group_keys(group: int) -> Keys:
    """Return the keys of a group, ascending; groups interleave."""
    return np.arange(BATCH_ROWS * BATCHES, dtype=np.int64) * GROUPS - 1000 + group


def deletes(call: int) -> bool:
    """Return whether a call deletes its group instead of writing it."""
    return call % 5 == 4


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


def update(tier: RocksDBTier) -> None:
    """Write and delete groups of keys, with the call's number as offset."""
    for call in count(tier.offsets().get(SOURCE, 0) + 1):
        keys = group_keys(call % GROUPS)
        if deletes(call):
            tier.delete(SPEC.tag, keys, offsets={SOURCE: call})
        else:
            rows = rows_of(call, keys.size)
            tier.insert(SPEC.tag, keys, rows, offsets={SOURCE: call})
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
    writer = open_tier(sys.argv[2])
    report("ready")
    {"update": update, "load": load}[sys.argv[1]](writer)
