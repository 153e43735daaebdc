"""No server brings back what another one updated, in every order of their steps.

``HPS_TEST_ALL_ORDERS=1`` adds worlds that take half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.runtime.backfill import Backfill
from hps_numba.tiers.redis import lease, writing
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.scripts import LEASE_US
from hps_numba.tiers.redis.table import buckets_of
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, Rows
from tests.runtime.histories import SteppedBackfills
from tests.support.orders import explore
from tests.support.redis_servers import RedisServer
from tests.support.wrappers import SteppedTier
from tests.tiers.redis.two_servers import SPEC, Servers, Stage, footprint


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(params=list(RedisLayout))
def tiers(
    server: RedisServer, request: pytest.FixtureRequest
) -> Iterator[list[RedisTier]]:
    """The tiers of two servers."""
    opened = [
        RedisTier(RedisOptions(server.address), num_partitions=1, layout=request.param)
        for _ in "ab"
    ]
    for tier in opened:
        tier.open_table(SPEC)
    yield opened
    for tier in opened:
        tier.close()


@dataclass(frozen=True)
class Case:
    """Tasks to run in every order."""

    add: Callable[[Servers], object]
    warm: bool = False
    apart: bool = False
    failed_over: bool = False

    def __str__(self) -> str:
        name = self.add.__name__.replace("_", " ")
        flags = {"warm": self.warm, "apart": self.apart, "failover": self.failed_over}
        return ", ".join([name, *(flag for flag, given in flags.items() if given)])


def lookup_and_update(s: Servers) -> None:
    s.lookup("a")
    s.update("b", 2)


def lookup_update_and_eviction(s: Servers) -> None:
    lookup_and_update(s)
    s.evict("a")


def lookup_that_learns_and_update(s: Servers) -> None:
    lookup_and_update(s)
    s.learn("a")


def lookups_on_both_and_update(s: Servers) -> None:
    s.lookup("a", "b")
    s.update("b", 2)


def lookup_deletion_and_eviction(s: Servers) -> None:
    s.lookup("a")
    s.delete("b")
    s.evict("a")


def lookup_and_load(s: Servers) -> None:
    s.lookup("a")
    s.load("b", 2)


def lookup_load_and_learning(s: Servers) -> None:
    lookup_and_load(s)
    s.learn("a")


def lookup_update_and_loss_of_stamps(s: Servers) -> None:
    lookup_and_update(s)
    s.lose_stamps()


def lookup_update_loss_of_stamps_and_update(s: Servers) -> None:
    lookup_and_update(s)
    s.lose_stamps_and_touch("a")


CASES = [
    Case(lookup_and_update),
    Case(lookup_and_update, apart=True),
    Case(lookup_and_update, failed_over=True),
    Case(lookup_update_and_eviction),
    Case(lookup_update_and_eviction, warm=True),
    Case(lookup_update_and_eviction, apart=True),
    Case(lookup_update_and_eviction, failed_over=True),
    Case(lookup_that_learns_and_update),
    Case(lookup_deletion_and_eviction),
    Case(lookup_deletion_and_eviction, warm=True),
    Case(lookup_and_load),
    Case(lookup_and_load, apart=True),
    Case(lookup_load_and_learning, apart=True),
    Case(lookup_update_and_loss_of_stamps),
    Case(lookup_update_and_loss_of_stamps, apart=True),
    Case(lookup_update_loss_of_stamps_and_update),
]
if os.environ.get("HPS_TEST_ALL_ORDERS"):
    CASES += [Case(lookups_on_both_and_update, warm=warm) for warm in (True, False)]


def world(stage: Stage, case: Case) -> Callable[[], Servers]:
    def make() -> Servers:
        servers = Servers(stage, warm=case.warm, failed_over=case.failed_over)
        case.add(servers)
        return servers

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_brings_an_old_row_back(
    case: Case,
    threads: ThreadPoolExecutor,
    tiers: list[RedisTier],
    server: RedisServer,
) -> None:
    stage = Stage(threads, tiers, server.client(), apart=case.apart)
    seen = explore(world(stage, case), footprint)
    assert seen.schedules > 5
    assert [str(violation) for violation in seen.violations] == []


def test_a_small_write_refuses_its_keys_and_a_large_one_all(
    tiers: list[RedisTier],
) -> None:
    writer, reader = tiers
    keys = np.arange(2000, dtype=np.int64)
    rows = np.ones((keys.size, SPEC.dim), np.float32)
    small, absent = keys[:40], keys[1500:]
    tokens = [reader.epoch(SPEC.tag)]
    writer.insert(SPEC.tag, small, rows[:40])
    assert reader.backfill(SPEC.tag, small, rows[:40], tokens[0]) == 0
    stamped = set(buckets_of(small).view("<u2").tolist())
    free = ~np.isin(buckets_of(absent).view("<u2"), list(stamped))
    stored = reader.backfill(SPEC.tag, absent, rows[1500:], tokens[0])
    assert stored == np.count_nonzero(free) > 450
    tokens.append(reader.epoch(SPEC.tag))
    writer.insert(SPEC.tag, keys[:1024], rows[:1024])
    for token in tokens:
        assert reader.backfill(SPEC.tag, absent, rows[1500:], token) == 0
    now = reader.epoch(SPEC.tag)
    assert reader.backfill(SPEC.tag, absent, rows[1500:], now) == absent.size


# Planted faults. Each must be seen, or the test above proves nothing.


class WithoutStamps(SteppedTier):
    """Writes rows and no stamps."""

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        self.before("insert")
        tier: Any = self.inner
        tier._changer._writer.put(tier._tables[tag], keys, rows)


class StampsLater(WithoutStamps):
    """Writes rows, and stamps them in another transaction."""

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        super().insert(tag, keys, rows)
        self.before("stamp")
        tier: Any = self.inner
        tier._changer._writer.stamp_all(tier._tables[tag], 0)


class StampsEarlier(WithoutStamps):
    """Stamps keys, and writes them in another transaction."""

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        self.before("stamp")
        tier: Any = self.inner
        tier._changer._writer.stamp_all(tier._tables[tag], 0)
        super().insert(tag, keys, rows)


class ReadsEpochsLate(SteppedBackfills):
    """Takes the numbers when the rows have been read."""

    def put(self, item: Backfill) -> bool:
        return super().put(replace(item, epoch=item.tier.epoch(item.tag)))


class OtherBuckets(SteppedTier):
    """Stamps other buckets than those that backfills look at."""

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        ours: Any = writing.buckets_to_stamp
        try:
            writing.buckets_to_stamp = lambda keys: ours(keys)[::-1]
            super().insert(tag, keys, rows)
        finally:
            writing.buckets_to_stamp = ours


@dataclass(frozen=True)
class Script:
    """Takes a line out of a script, or another name out of a module."""

    module: Any
    name: str
    old: Any
    new: Any

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the fault in."""
        text = getattr(self.module, self.name)
        if isinstance(text, str):
            assert text.count(self.old) == 1
            patch.setattr(self.module, self.name, text.replace(self.old, self.new))
        else:
            assert text == self.old
            patch.setattr(self.module, self.name, self.new)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        pytest.param(
            Case(lookup_and_update), {"wrapper": WithoutStamps}, id="no stamps"
        ),
        pytest.param(
            Case(lookup_and_update),
            {"wrapper": StampsLater},
            id="stamps follow the rows",
        ),
        pytest.param(
            Case(lookup_that_learns_and_update, apart=True),
            {"wrapper": StampsEarlier},
            id="stamps precede the rows",
        ),
        pytest.param(
            Case(lookup_that_learns_and_update),
            {"queue": ReadsEpochsLate},
            id="the numbers are taken after the rows are read",
        ),
        pytest.param(
            Case(lookup_and_update), {"wrapper": OtherBuckets}, id="other buckets"
        ),
    ],
)
def test_a_planted_fault_is_seen(
    case: Case,
    parts: dict[str, Any],
    threads: ThreadPoolExecutor,
    tiers: list[RedisTier],
    server: RedisServer,
) -> None:
    stage = Stage(threads, tiers, server.client(), apart=case.apart, **parts)
    assert explore(world(stage, case), footprint, stop_at_first=True).violations


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        pytest.param(
            Case(lookup_and_load),
            Script(writing, "BACKFILL", "if floor > token then", "if false then"),
            id="the floor of all keys is ignored",
        ),
        pytest.param(
            Case(lookup_load_and_learning, apart=True),
            Script(lease, "LEASE_US", LEASE_US, 0),
            id="a load has no lease",
        ),
        pytest.param(
            Case(lookup_and_update, failed_over=True),
            Script(writing, "BACKFILL", "last < token or", ""),
            id="numbers that were never given are accepted",
        ),
        pytest.param(
            Case(lookup_update_and_loss_of_stamps),
            Script(writing, "BACKFILL", "last < token or last == 0", "false"),
            id="backfills are stored without stamps",
        ),
        pytest.param(
            Case(lookup_update_loss_of_stamps_and_update),
            Script(writing, "STAMP", "if last == 0 then restart(key, 0) end", ""),
            id="lost stamps are begun anew without a floor",
        ),
    ],
)
def test_a_fault_planted_in_a_script_is_seen(
    case: Case,
    fault: Script,
    threads: ThreadPoolExecutor,
    tiers: list[RedisTier],
    server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault.plant(monkeypatch)
    stage = Stage(threads, tiers, server.client(), apart=case.apart)
    assert explore(world(stage, case), footprint, stop_at_first=True).violations
