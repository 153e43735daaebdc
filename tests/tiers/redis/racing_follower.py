"""One of two servers that race through one stream, over a shared Redis.

Each has a lower tier of its own and cuts the stream into spans of its own; now and then
it lags. Rows say which record of the stream brought them. What was acknowledged, and
what any lookup has seen, lies in a file that both map.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.redis.tokens import Tokens
from hps_numba.types import Keys, Position, StreamSpan, TableSpec

SPEC = TableSpec("model", "table", 8)
N_KEYS = 64
BATCH = 16
LONGEST_SPAN = 40  # records
RUN = 64  # records, of which the last few are deletions
LONGEST_DELAY = 12  # rounds between a read and its backfill
N_RECORDS = 1000  # of the stream at least, however slow the machine is
STREAM = 3  # the partition of the stream

Records = NDArray[np.int64]


def create(path: Path) -> None:
    """Make the file: what was seen of each key, and where each server is to stop."""
    np.zeros(N_KEYS + 2, np.int64).tofile(path)


def mapped(path: Path) -> tuple[Records, Records]:
    """Return the newest record seen of each key; and the progress, and the end."""
    shared = np.memmap(path, np.int64, "r+", shape=(N_KEYS + 2,))
    return shared[:N_KEYS], shared[N_KEYS:]


def open_tier(address: str, layout: str) -> RedisTier:
    """Open the shared table."""
    options = RedisOptions(address, timeout_s=10.0)
    tier = RedisTier(options, num_partitions=4, layout=RedisLayout(layout))
    tier.open_table(SPEC)
    return tier


def key_of(record: int) -> int:
    """Return the key that a record is about."""
    return (record * 0x9E3779B1 >> 7) % N_KEYS


def deletes(record: int) -> bool:
    """Whether a record deletes its key."""
    return record % RUN >= RUN - 4


def replay(until: int) -> dict[int, int]:
    """Return the newest record of each key that is there at the end."""
    rows: dict[int, int] = {}
    for record in range(until):
        rows[key_of(record)] = record
    return {key: record for key, record in rows.items() if not deletes(record)}


class Follower:
    """One server.

    Parameters
    ----------
    tier
        The shared table.
    path
        The file that both map.
    me
        Which server this is.
    """

    def __init__(self, tier: RedisTier, path: Path, me: int) -> None:
        self._tier = tier
        self._seen, self._ends = mapped(path)
        self._me = me
        self._random = np.random.default_rng(me)
        self._lower = np.full(N_KEYS, -1, np.int64)  # records; -1: no row
        self._at = 0
        self._waiting: list[tuple[int, Any]] = []
        self.counts = Counter[str]()
        tier.lower_positions(SPEC.tag, {STREAM: Position(0)})

    def race(self, seconds: float) -> None:
        """Follow the stream for a time, and then to the end that the first one sets."""
        end_s = monotonic() + seconds
        pauses = self._pauses()
        for round_ in range(1 << 40):
            progress, end = self._ends
            self._ends[0] = max(progress, self._at)
            if (
                not self._me
                and not end
                and monotonic() > end_s
                and self._at > N_RECORDS
            ):
                self._ends[1] = int(self._ends[0]) + LONGEST_SPAN
            if end and self._at == end:
                break
            if not next(pauses) or end:
                self._apply(int(end) or 1 << 40)
            self._look_up(round_, evicts=round_ % 3 == 0 and not end)

    def _pauses(self) -> Iterator[bool]:
        """Tell for each round whether to lag in it."""
        while True:
            lags = bool(self._random.random() < 0.3)
            yield from [lags] * int(self._random.integers(1, 30))

    def _apply(self, end: int) -> None:
        """Apply a span as a hierarchy does: hold, the lower tier, Redis."""
        since, until = self._at, self._at + int(self._random.integers(LONGEST_SPAN))
        until = min(until, end)
        kind = deletes(since)
        records = range(since, until)
        until = next((r for r in records if deletes(r) != kind), until)
        newest = {key_of(record): record for record in range(since, until)}
        keys = np.array([*newest], np.int64)
        rows = np.array([*newest.values()], np.int64)
        span = StreamSpan(STREAM, Position(since), Position(until))
        with self._tier.hold(SPEC.tag, keys):
            self._lower[keys] = -1 if kind else rows
            given = None if kind else rows_of(rows)
            n_written = self._tier.apply(SPEC.tag, keys, given, span)
        self._see(keys, rows)
        self._at = until
        self.counts["written"] += n_written
        self.counts["known"] += keys.size - n_written
        self.counts["deleted"] += n_written if kind else 0

    def _look_up(self, round_: int, *, evicts: bool) -> None:
        """Look keys up, and backfill some that were looked up before."""
        keys = np.sort(self._random.choice(N_KEYS, BATCH, replace=False))
        keys = keys.astype(np.int64)
        floor = self._seen[keys].copy()
        epoch = self._tier.epoch(SPEC.tag)
        if evicts:
            self._tier.evict(SPEC.tag, keys)
        rows = np.zeros((BATCH, SPEC.dim), np.float32)
        found = np.zeros(BATCH, np.bool_)
        self._tier.fetch(SPEC.tag, keys, rows, found)
        records = rows[found][:, 0].astype(np.int64)
        self.counts["hits"] += records.size
        self.counts["torn"] += int(
            (rows[found] != rows[found][:, :1]).any(axis=1).sum()
        )
        self.counts["violations"] += int((records < floor[found]).sum())
        self._see(keys[found], records)
        below = self._lower[keys]
        given = ~found & (below >= 0)
        if given.any():
            item = keys[given], rows_of(below[given]), epoch
            due = round_ + int(self._random.integers(LONGEST_DELAY))
            self._waiting.append((due, item))
        self._backfill(round_)

    def _backfill(self, round_: int) -> None:
        due = [item for when, item in self._waiting if when <= round_]
        self._waiting = [entry for entry in self._waiting if entry[0] > round_]
        for keys, rows, epoch in due:
            stored = self._tier.backfill(SPEC.tag, keys, rows, epoch)
            self.counts["backfilled"] += stored
            self.counts["refused"] += keys.size - stored

    def _see(self, keys: Keys, records: Records) -> None:
        self._seen[keys] = np.maximum(self._seen[keys], records)


def rows_of(records: Records) -> NDArray[np.float32]:
    """Return rows that say which record brought them."""
    return np.repeat(records.astype(np.float32)[:, None], SPEC.dim, axis=1)


def plant(fault: str) -> None:
    """Put a fault in."""
    hidden: Any = Tokens
    if fault == "every number is a token":
        hidden._has = lambda *_: True


def main() -> None:
    """Write ``ready``, wait for a line, run, and write what was seen."""
    me, address, layout, path, seconds, fault = sys.argv[1:]
    plant(fault)
    tier = open_tier(address, layout)
    follower = Follower(tier, Path(path), int(me))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    follower.race(float(seconds))
    tier.close()
    sys.stdout.write(json.dumps(follower.counts))


if __name__ == "__main__":
    main()
