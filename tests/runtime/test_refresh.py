"""A refresh is final: no row that was read before it comes back after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, Keys, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier
from tests.support.gates import StopPoints
from tests.support.wrappers import GatedTier

SPEC = TableSpec("model", "table", 4)
KEYS = np.arange(20, dtype=np.int64)


class World:
    """Host memory with the keys below 10 over a tier that another program changes."""

    def __init__(self) -> None:
        self.stops = StopPoints()
        self.host, self.lower = HostTier(), LowerTier()
        for tier in (self.host, self.lower):
            tier.open_table(SPEC)
        self.change(1)
        self.host.insert(SPEC.tag, KEYS[:10], versioned_rows(KEYS[:10], 1, SPEC.dim))
        self.queue = BackfillQueue(1 << 20)
        self.table = Hierarchy(
            SPEC,
            [GatedTier(self.host, self.stops), GatedTier(self.lower, self.stops)],
            backfills=self.queue,
            on_failure=FailureMode.RAISE,
            write_rows=64,
        )

    def change(self, version: int) -> None:
        self.lower.insert(SPEC.tag, KEYS, versioned_rows(KEYS, version, SPEC.dim))

    def versions(self, keys: Keys) -> list[int]:
        out = np.zeros((keys.size, SPEC.dim), np.float32)
        chunk = Chunk(keys, out, np.zeros(keys.size, np.bool_))
        self.table.ask_local(chunk)
        self.table.ask_remote(chunk)
        return np.where(chunk.found, versions_in(keys, out), 0).tolist()

    def in_host(self) -> dict[int, int]:
        return {
            key: version
            for block in self.host.iterate(SPEC.tag)
            for key, version in zip(
                block.keys.tolist(),
                versions_in(block.keys, block.rows).tolist(),
                strict=True,
            )
        }


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.queue.close()


def test_what_a_lookup_read_before_is_not_backfilled_after(world: World) -> None:
    """The key is not in host memory, so that the refresh does not come across it."""
    world.stops.arm("lower.fetch.done")
    looking = threading.Thread(target=world.versions, args=(KEYS[15:],))
    looking.start()
    world.stops.wait_held("lower.fetch.done")
    world.change(2)
    refreshing = threading.Thread(target=world.table.refresh, args=(7,))
    refreshing.start()
    world.stops.wait_held("lower.fetch.done", 2)
    world.stops.release("lower.fetch.done")
    looking.join()
    refreshing.join()
    world.queue.drain()
    assert world.in_host() == dict.fromkeys(range(10), 2)
    assert world.queue.stats().refused_rows == 5
    assert world.versions(KEYS) == [2] * 20


def test_a_backfill_that_waits_is_refused(world: World) -> None:
    world.host.evict(SPEC.tag)
    world.stops.arm("host.backfill")
    assert world.versions(KEYS) == [1] * 20
    world.stops.wait_held("host.backfill")
    world.change(2)
    assert world.table.refresh(7) == 0  # host memory holds nothing yet
    world.stops.release("host.backfill")
    world.queue.drain()
    assert world.in_host() == {}
    assert world.queue.stats().refused_rows == 20


def test_a_lookup_after_it_does_not_join_a_fetch_from_before(world: World) -> None:
    world.stops.arm("lower.fetch.done")
    world.host.evict(SPEC.tag)  # the refresh has nothing to read, and returns at once
    looking = threading.Thread(target=world.versions, args=(KEYS,))
    looking.start()
    world.stops.wait_held("lower.fetch.done")
    world.change(2)
    world.table.refresh(7)
    seen: list[int] = []
    after = threading.Thread(target=lambda: seen.extend(world.versions(KEYS)))
    after.start()
    world.stops.wait_held("lower.fetch.done", 2)  # it fetches for itself
    world.stops.release("lower.fetch.done")
    for thread in (looking, after):
        thread.join()
    assert seen == [2] * 20


def test_an_update_meanwhile_wins(world: World) -> None:
    world.change(2)
    world.stops.arm("lower.fetch.done")
    refreshing = threading.Thread(target=world.table.refresh, args=(100,))
    refreshing.start()
    world.stops.wait_held("lower.fetch.done")  # version 2 is read, and not stored yet
    world.table.update(KEYS[:3], versioned_rows(KEYS[:3], 3, SPEC.dim))
    world.table.delete(KEYS[3:5])
    world.stops.release("lower.fetch.done")
    refreshing.join()
    assert world.versions(KEYS[:10]) == [3] * 3 + [0] * 2 + [2] * 5
    assert world.in_host() == dict.fromkeys(range(3), 3) | dict.fromkeys(
        range(5, 10), 2
    )
