"""A server at full speed beside another one, over one Redis and one lower tier.

The lower tier is a file that both map: a version for each key, negative if the key was
deleted then, and beside it the version that was last acknowledged; and how many rounds
each server has done, since both race until both have done enough. ``update`` writes
versions that grow; ``look_up`` looks keys up, evicts some, and gives rows back to Redis
a while after it read them. It counts what it sees: a row that is older than what was
acknowledged before the lookup began is a violation.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, TableSpec

SPEC = TableSpec("model", "table", 8)
N_KEYS = 64
BATCH = 16
LONGEST_DELAY = 12  # lookups between a read and its backfill
N_ROUNDS = 200  # of each server at least, however slow the machine is
UPDATER, READER = 0, 1

Versions = NDArray[np.int64]


def create(path: Path) -> None:
    """Make the lower tier: version 1 of all keys."""
    versions, rounds = np.ones((2, N_KEYS), np.int64), np.zeros(N_KEYS, np.int64)
    np.vstack([versions, rounds]).tofile(path)


def mapped(path: Path) -> Versions:
    """Return the versions, those that were acknowledged, and the rounds."""
    return np.memmap(path, np.int64, "r+", shape=(3, N_KEYS))


def race_on(rounds: Versions, me: int, end_s: float) -> bool:
    """Count a round, and return whether there is one to do."""
    rounds[me] += 1
    return monotonic() < end_s or min(rounds[UPDATER], rounds[READER]) <= N_ROUNDS


def open_tier(address: str, layout: str) -> RedisTier:
    """Open the shared table."""
    options = RedisOptions(address, timeout_s=10.0)
    tier = RedisTier(options, num_partitions=4, layout=RedisLayout(layout))
    tier.open_table(SPEC)
    return tier


def some_keys(random: np.random.Generator) -> Keys:
    """Return a batch of keys."""
    return np.sort(random.choice(N_KEYS, BATCH, replace=False)).astype(np.int64)


def rows_of(versions: Versions) -> NDArray[np.float32]:
    """Return rows that say their version."""
    return np.repeat(versions.astype(np.float32)[:, None], SPEC.dim, axis=1)


def update(tier: RedisTier, path: Path, seconds: float, fault: str) -> Counter[str]:
    """Write and delete as a hierarchy does: hold, evict, the lower tier, Redis."""
    random, counts = np.random.default_rng(1), Counter[str]()
    lower, acknowledged, rounds = mapped(path)
    end_s, version = monotonic() + seconds, 1
    while race_on(rounds, UPDATER, end_s):
        version += 1
        keys, deletes = some_keys(random), version % 8 == 0
        versions = np.full(BATCH, version, np.int64)
        with tier.hold(SPEC.tag, keys):
            tier.evict(SPEC.tag, keys)
            lower[keys] = -versions if deletes else versions
            if deletes:
                tier.delete(SPEC.tag, keys)
            elif fault == "no stamps":
                hidden: Any = tier
                table = hidden._tables[SPEC.tag]
                hidden._changer._writer.put(table, keys, rows_of(versions))
            else:
                tier.insert(SPEC.tag, keys, rows_of(versions))
        acknowledged[keys] = lower[keys]
        counts["deleted" if deletes else "updated"] += BATCH
    return counts


def look_up(tier: RedisTier, path: Path, seconds: float, seed: int) -> Counter[str]:
    """Look keys up and backfill them later."""
    random, counts = np.random.default_rng(seed), Counter[str]()
    lower, acknowledged, rounds = mapped(path)
    waiting: list[tuple[int, Any]] = []
    end_s, n = monotonic() + seconds, 0
    while race_on(rounds, READER, end_s):
        n += 1
        keys = some_keys(random)
        known = np.abs(acknowledged[keys])
        epoch = tier.epoch(SPEC.tag)
        if n % 2:
            tier.evict(SPEC.tag, keys)
        rows = np.zeros((BATCH, SPEC.dim), np.float32)
        found = np.zeros(BATCH, np.bool_)
        tier.fetch(SPEC.tag, keys, rows, found)
        seen = rows[found]
        counts["lookups"] += BATCH
        counts["hits"] += int(found.sum())
        counts["torn"] += int((seen != seen[:, :1]).any(axis=1).sum())
        counts["violations"] += int((seen[:, 0] < known[found]).sum())
        below = lower[keys]
        backfilled = ~found & (below > 0)
        if backfilled.any():
            item = keys[backfilled], rows_of(below[backfilled]), epoch
            waiting.append((n + int(random.integers(LONGEST_DELAY)), item))
        due = [item for when, item in waiting if when <= n]
        waiting = [entry for entry in waiting if entry[0] > n]
        for some, its_rows, its_epoch in due:
            stored = tier.backfill(SPEC.tag, some, its_rows, its_epoch)
            counts["backfilled"] += stored
            counts["refused"] += some.size - stored
    return counts


def main() -> None:
    """Write ``ready``, wait for a line, run, and write what was seen."""
    role, address, layout, path, seconds, extra = sys.argv[1:]
    tier = open_tier(address, layout)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    if role == "update":
        counts = update(tier, Path(path), float(seconds), extra)
    else:
        counts = look_up(tier, Path(path), float(seconds), int(extra))
    tier.close()
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
