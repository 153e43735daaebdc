"""Lookups, updates, deletions, refreshes and evictions at once, on too small a cache.

``HPS_TEST_STRESS_S`` sets how many seconds it runs; 8 by default.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table
from tests.runtime.gpu.cached import cached_versions, served_model
from tests.runtime.gpu.foreign import uploaded
from tests.runtime.gpu.gpu_servers import downloaded, gpu_server

pytestmark = pytest.mark.device

TABLES = (
    Table("items", dim=4, n_rows=2000, version=1, default=-1.0),
    Table("users", dim=4, n_rows=600, version=1, default=-1.0),
)
BATCH = 160
SECONDS = float(os.environ.get("HPS_TEST_STRESS_S", "8"))
Versions = NDArray[np.int64]


class Ledger:
    """Which version of each key of a table was begun, acknowledged and seen.

    Versions of a key ascend by one from 1. Of every 16th key, even versions mean that
    there is no row. Keys are written by one thread, seen by many.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._begun = np.ones(table.n_rows, np.int64)
        self._floor = np.ones(table.n_rows, np.int64)  # acknowledged
        self._lock = threading.Lock()  # guards both

    def begin(self, keys: NDArray[np.int64]) -> Versions:
        """Return the versions that these unique keys will have next."""
        with self._lock:
            self._begun[keys] += 1
            return self._begun[keys]

    def acknowledge(self, keys: NDArray[np.int64], versions: Versions) -> None:
        """Note that every lookup from now on must see these versions."""
        with self._lock:
            np.maximum.at(self._floor, keys, versions)

    def floor(self, keys: NDArray[np.int64]) -> Versions:
        """Return the oldest versions that a lookup may see that begins now."""
        with self._lock:
            return self._floor[keys]

    def newest(self) -> dict[int, int]:
        """Return the version of each key that has a row, once nobody writes."""
        return {
            key: version
            for key, version in enumerate(self._floor.tolist())
            if key % 16 != 15 or version % 2
        }

    def judge(
        self,
        keys: NDArray[np.int64],
        versions: Versions,
        found: NDArray[np.bool_],
        floor: Versions,
    ) -> str | None:
        """Return what is wrong with what a lookup saw, or None."""
        with self._lock:
            ceiling = self._begun[keys]
        deletable = keys % 16 == 15
        # What was not found may be the oldest deletion that the lookup may see.
        seen = np.where(found, versions, floor + floor % 2)
        for what, wrong in {
            "a torn row": found & (versions < 0),
            "a row that went back": found & (seen < floor),
            "no row where there is one": ~found & (~deletable | (seen > ceiling)),
            "a row that nobody wrote": found & (seen > ceiling),
            "a deleted row": found & deletable & (seen % 2 == 0),
        }.items():
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                return (
                    f"{self.table.name}: {what}: key={keys[at]} found={found[at]} "
                    f"version={versions[at]} floor={floor[at]} ceiling={ceiling[at]}"
                )
        return None


class Stress:
    """The threads, each a loop of rounds until ``stop`` is set."""

    def __init__(self, server: HPS) -> None:
        self.stop = threading.Event()
        self.ledgers = {table.name: Ledger(table) for table in TABLES}
        self.rounds: Counter[str] = Counter()
        self._server = server
        self._session = server.session("wdl")
        (self._cache,) = served_model(server).caches.values()

    def look_up(self, rng: np.random.Generator) -> None:
        """Look both tables up, with keys of the host or of the device."""
        asked = {
            name: self._keys(rng, one, BATCH) for name, one in self.ledgers.items()
        }
        found = {name: np.zeros(BATCH, np.bool_) for name in asked}
        on_device = rng.random() < 0.5
        given: dict[str, Any] = dict(asked)
        if on_device:
            given |= {n: uploaded(self._cache.gpu, k) for n, k in asked.items()}
        floors = {name: one.floor(asked[name]) for name, one in self.ledgers.items()}
        rows = self._session.lookup(given, found=found)
        for name, one in self.ledgers.items():
            got = rows[name]
            if on_device:
                got = downloaded(self._cache.gpu, got)
            versions = versions_in(asked[name], got)
            reason = one.judge(asked[name], versions, found[name], floors[name])
            assert reason is None, reason

    def update(self, rng: np.random.Generator) -> None:
        ledger = self._some_ledger(rng)
        keys = np.unique(self._keys(rng, ledger, 48))
        keys = keys[keys % 16 != 15]
        versions = ledger.begin(keys)
        rows = versioned_rows(keys, versions, ledger.table.dim)
        self._server.update("wdl", ledger.table.name, keys, rows)
        ledger.acknowledge(keys, versions)

    def delete(self, rng: np.random.Generator) -> None:
        """Delete keys, or bring those back that are deleted."""
        ledger = self._some_ledger(rng)
        keys = np.sort(rng.choice(ledger.table.keys[15::16], 12, replace=False))
        versions = ledger.begin(keys)
        gone = versions % 2 == 0
        if gone.any():
            self._server.delete("wdl", ledger.table.name, keys[gone])
        rows = versioned_rows(keys, versions, ledger.table.dim)
        self._server.update("wdl", ledger.table.name, keys[~gone], rows[~gone])
        ledger.acknowledge(keys, versions)

    def disturb(self, rng: np.random.Generator) -> None:
        """Refresh what is cached, or take rows out of host memory."""
        ledger = self._some_ledger(rng)
        name = ledger.table.name
        keys = np.unique(self._keys(rng, ledger, 200))
        choice = rng.integers(8)
        if choice == 0:
            self._server.refresh("wdl", name)
            self.rounds["refreshes"] += 1
        elif choice < 4:
            self._server.refresh("wdl", name, keys=keys)
        else:
            table = served_model(self._server).table(name)
            table.tiers[0].evict(table.spec.tag, keys)

    def loop(self, name: str, seed: int, turn: Callable[..., None]) -> None:
        """Take turns until it is time to stop, or something is wrong anywhere."""
        rng = np.random.default_rng(seed)
        try:
            while not self.stop.is_set():
                turn(rng)
                self.rounds[name] += 1
        finally:
            self.stop.set()

    def _some_ledger(self, rng: np.random.Generator) -> Ledger:
        return self.ledgers[TABLES[int(rng.integers(2))].name]

    def _keys(self, rng: np.random.Generator, ledger: Ledger, n: int) -> Any:
        # A few keys are asked for all the time, most now and then.
        return (rng.zipf(1.1, n) * 7919) % ledger.table.n_rows


@pytest.mark.parametrize(
    ("threshold", "policy"), [(1.1, "lru"), (1.0, "lfu")], ids=["lru", "lfu"]
)
def test_no_lookup_sees_a_version_go_back(
    tmp_path: Path, threshold: float, policy: str, report: Callable[[str], None]
) -> None:
    server = gpu_server(
        tmp_path,
        TABLES,
        cache_size_percentage=0.1,
        hit_rate_threshold=threshold,
        gpu_cache_policy=policy,
        number_of_worker_buffers_in_pool=3,
    )
    with server:
        stress = Stress(server)
        end = monotonic() + SECONDS / 2
        turns = [stress.look_up] * 3 + [stress.update, stress.delete, stress.disturb]
        with ThreadPoolExecutor(len(turns)) as pool:
            running = [
                pool.submit(stress.loop, turn.__name__, seed, turn)
                for seed, turn in enumerate(turns)
            ]
            stress.stop.wait(end - monotonic())
            stress.stop.set()
        for thread in running:
            thread.result()
        server.drain()
        stats = server.stats()
        caches = served_model(server).caches[0].tables
        totals = [one.totals() for one in caches.values()]
        for name, ledger in stress.ledgers.items():
            newest = ledger.newest()
            held = cached_versions(server, name)
            assert held == {key: newest.get(key) for key in held}
    tables = [stats.table("wdl", table.name) for table in TABLES]
    counts = {
        **stress.rounds,
        "keys": sum(one.keys for one in tables),
        "absent keys": sum(one.defaults for one in tables),
        "updated rows": sum(one.updated_rows for one in tables),
        "deleted keys": sum(one.deleted_keys for one in tables),
        "hits": sum(one.hits for one in totals),
        "misses": sum(one.misses for one in totals),
        "evicted for room": sum(one.evicted for one in totals),
        "refused inserts": sum(one.refused for one in totals),
        "replaced": sum(one.updated for one in totals),
    }
    line = " ".join(f"{name}={count}" for name, count in counts.items())
    report(f"stress of {SECONDS / 2:g} s, {policy}: {line}")
    assert min(counts.values()) > 0, counts
    assert sum(one.errors for one in tables) == 0
