"""Readers, updaters, a deleter and an evictor at once, on too little host memory.

``HPS_TEST_STRESS_S`` sets how many seconds it runs; 60 by default.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table, model, server_config
from tests.runtime.ledger import Ledger

TABLE = Table("items", dim=16, n_rows=4096, version=1)
MODEL = "wdl"
TAG = f"hps_et.{MODEL}.{TABLE.name}"
BATCH = 768
# Room for about a quarter of the rows.
HOST_BYTES = (128 << 10) + 96_000
SECONDS = float(os.environ.get("HPS_TEST_STRESS_S", "60"))


class Stress:
    """The threads, each a loop of rounds until ``stop`` is set."""

    def __init__(self, server: HPS, host: Tier) -> None:
        self.stop = threading.Event()
        self.ledger = Ledger(TABLE.n_rows)
        self.rounds: Counter[str] = Counter()
        self._server = server
        self._host = host

    def read(self, rng: np.random.Generator) -> None:
        keys = (rng.zipf(1.2, BATCH) - 1) % TABLE.n_rows
        found = np.zeros(BATCH, np.bool_)
        floor = self.ledger.floor(keys)
        rows = self._server.lookup(keys, MODEL, 0, found=found)
        versions = versions_in(keys, rows)
        reason = self.ledger.judge(keys, versions, found, floor)
        assert reason is None, reason

    def update(self, rng: np.random.Generator, parity: int) -> None:
        some = (rng.zipf(1.2, 64) - 1) % TABLE.n_rows
        keys = np.unique(some[(some % 2 == parity) & (some % 16 != 15)])
        versions = self.ledger.begin(keys)
        rows = versioned_rows(keys, versions, TABLE.dim)
        self._server.update(MODEL, TABLE.name, keys, rows)
        self.ledger.acknowledge(keys, versions)

    def delete(self, rng: np.random.Generator) -> None:
        keys = np.sort(rng.choice(self.ledger.deleted_keys, 16, replace=False))
        versions = self.ledger.begin(keys)
        gone = versions % 2 == 0
        if gone.any():
            self._server.delete(MODEL, TABLE.name, keys[gone])
        rows = versioned_rows(keys, versions, TABLE.dim)
        self._server.update(MODEL, TABLE.name, keys[~gone], rows[~gone])
        self.ledger.acknowledge(keys, versions)

    def evict(self, rng: np.random.Generator) -> None:
        self._host.evict(TAG, np.unique((rng.zipf(1.2, 256) - 1) % TABLE.n_rows))

    def loop(self, name: str, seed: int, turn: Callable[..., None], *args: int) -> None:
        """Take turns until it is time to stop, or something is wrong anywhere."""
        rng = np.random.default_rng(seed)
        try:
            while not self.stop.is_set():
                turn(rng, *args)
                self.rounds[name] += 1
        finally:
            self.stop.set()


@pytest.mark.stress
def test_no_reader_sees_a_version_go_back(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    tiers: list[Tier] = []

    def keep(tier: Tier) -> Tier:
        tiers.append(tier)
        return tier

    config = server_config(
        tmp_path,
        [model(tmp_path, [TABLE], name=MODEL)],
        volatile={"max_bytes": HOST_BYTES, "max_batch_size": 256},
    )
    with HPS(config, wrap_tier=keep) as server:
        host, rocks = tiers
        stress = Stress(server, host)
        end = monotonic() + SECONDS
        with ThreadPoolExecutor(8) as pool:
            running = [
                pool.submit(stress.loop, "reads", seed, stress.read)
                for seed in range(3)
            ]
            running += [
                pool.submit(stress.loop, "updates", 10 + p, stress.update, p)
                for p in range(2)
            ]
            running.append(pool.submit(stress.loop, "deletions", 20, stress.delete))
            running.append(pool.submit(stress.loop, "evictions", 30, stress.evict))
            stress.stop.wait(end - monotonic())
            stress.stop.set()
        for thread in running:
            thread.result()
        server.drain()
        stats = server.stats()
        table = stats.table(MODEL, TABLE.name)
        assert same_rows(host, rocks) > 0
    counts = {
        **stress.rounds,
        "keys read": table.keys,
        "joined keys": table.joined,
        "absent keys": table.defaults,
        "updated rows": table.updated_rows,
        "deleted keys": table.deleted_keys,
        "rows evicted for room": table.tiers[0].evictions,
        "backfilled rows": stats.backfill.stored_rows,
        "refused backfills": stats.backfill.refused_rows,
    }
    line = " ".join(f"{name}={count}" for name, count in counts.items())
    report(f"stress of {SECONDS:g} s: {line}")
    assert min(counts.values()) > 0, counts
    assert table.errors == 0
    assert table.tiers[0].bytes <= HOST_BYTES


def same_rows(host: Tier, rocks: Tier) -> int:
    """Compare every row in host memory with the one beneath; return how many."""
    n_rows = 0
    for block in host.iterate(TAG):
        rows = np.zeros_like(block.rows)
        found = np.zeros(len(block), np.bool_)
        assert rocks.fetch(TAG, block.keys, rows, found) == len(block)
        assert np.array_equal(rows, block.rows)
        n_rows += len(block)
    return n_rows
