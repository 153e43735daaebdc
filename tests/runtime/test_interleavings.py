"""No resurrection, in every order of the steps of lookups, updates and evictions.

``HPS_TEST_ALL_ORDERS=1`` adds worlds that take minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest

from hps_numba.runtime.backfill import Backfill
from hps_numba.runtime.changes import Change
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.inflight import Flight
from hps_numba.tiers.base import Epoch, Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import Keys, Rows
from tests.runtime.histories import (
    History,
    Stage,
    SteppedBackfills,
    SteppedInFlight,
    UpperTier,
    footprint,
)
from tests.support.orders import explore

HOST = (HostTier,)
UPPER = (UpperTier,)
ALL = (HostTier, UpperTier)


@dataclass(frozen=True)
class Case:
    """Tasks to run in every order."""

    name: str
    add: Callable[[History], object]
    uppers: tuple[type[Tier], ...] = HOST
    warm: bool = False
    streams: bool = False

    def __str__(self) -> str:
        above = "+".join(tier.name for tier in self.uppers) or "nothing"
        state = "warm" if self.warm else "cold"
        return f"{self.name} under {above} {state}"


def lookup_update(h: History) -> None:
    h.lookup("a")
    h.update(2)


def lookup_update_evict(h: History) -> None:
    h.lookup("a")
    h.update(2)
    h.evict()


def lookup_delete_evict(h: History) -> None:
    h.lookup("a")
    h.delete()
    h.evict()


def lookup_update_refresh(h: History) -> None:
    h.lookup("a")
    h.update(2)
    h.refresh()


def delete_refresh_evict(h: History) -> None:
    h.delete()
    h.refresh()
    h.evict()


def two_lookups_update(h: History) -> None:
    h.lookup("a", "b")
    h.update(2)


def two_lookups_delete(h: History) -> None:
    h.lookup("a", "b")
    h.delete()


def two_lookups_update_evict(h: History) -> None:
    h.lookup("a", "b")
    h.update(2)
    h.evict()


def two_lookups_update_that_fails(h: History) -> None:
    h.lookup("a", "b")
    h.failing_update(2)


def two_lookups_update_that_fails_late(h: History) -> None:
    h.lookup("a", "b")
    h.failing_update(2, late=True)


def three_lookups_update(h: History) -> None:
    h.lookup("a", "b", "c")
    h.update(2)


def lookup_two_updates(h: History) -> None:
    h.lookup("a")
    h.update(2, 3)


def lookup_update_refresh_evict(h: History) -> None:
    lookup_update_refresh(h)
    h.evict()


def lookup_stream_evict(h: History) -> None:
    h.lookup("a")
    h.stream(2)
    h.evict()


def two_lookups_stream(h: History) -> None:
    h.lookup("a", "b")
    h.stream(2)


def probed_lookup_stream_backfill(h: History) -> None:
    h.probed_lookup("a")
    h.stream(2)
    h.backfill()


def probed_lookup_failing_stream_backfill(h: History) -> None:
    h.probed_lookup("a")
    h.failing_stream(2, late=True)
    h.backfill()


def two_lookups_stream_that_fails(h: History) -> None:
    h.lookup("a", "b")
    h.failing_stream(2)


def two_lookups_stream_that_fails_late(h: History) -> None:
    h.lookup("a", "b")
    h.failing_stream(2, late=True)


def lookup_two_spans(h: History) -> None:
    h.lookup("a")
    h.stream(2, 3)


CASES = [
    Case("lookup, update, evict", lookup_update_evict),
    Case("lookup, update, evict", lookup_update_evict, warm=True),
    Case("lookup, delete, evict", lookup_delete_evict),
    Case("lookup, delete, evict", lookup_delete_evict, warm=True),
    Case("lookup, update, refresh", lookup_update_refresh, warm=True),
    Case("delete, refresh, evict", delete_refresh_evict, warm=True),
    Case("two lookups, update", two_lookups_update, warm=True),
    Case("two lookups, update", two_lookups_update, ()),
    Case("two lookups, update", two_lookups_update, UPPER, warm=True),
    Case("two lookups, delete", two_lookups_delete),
    Case("two lookups, delete", two_lookups_delete, UPPER, warm=True),
    Case("two lookups, failing update", two_lookups_update_that_fails_late),
    Case("two lookups, failing update", two_lookups_update_that_fails_late, warm=True),
    Case("lookup, two updates", lookup_two_updates),
    Case("lookup, update", lookup_update, ALL, warm=True),
    Case("lookup, update", lookup_update, streams=True),
    Case("lookup, update", lookup_update, ALL, streams=True),
    Case("lookup, stream, evict", lookup_stream_evict, streams=True),
    Case("lookup, stream, evict", lookup_stream_evict, warm=True, streams=True),
    Case("two lookups, stream", two_lookups_stream, warm=True, streams=True),
    Case("two lookups, stream", two_lookups_stream, UPPER, warm=True, streams=True),
    Case(
        "two lookups, failing stream",
        two_lookups_stream_that_fails_late,
        warm=True,
        streams=True,
    ),
    Case("lookup, two spans", lookup_two_spans, streams=True),
    Case("lookup, stream, backfill", probed_lookup_stream_backfill, streams=True),
    Case(
        "lookup, failing stream, backfill",
        probed_lookup_failing_stream_backfill,
        streams=True,
    ),
    Case(
        "lookup, stream, backfill", probed_lookup_stream_backfill, UPPER, streams=True
    ),
]
if os.environ.get("HPS_TEST_ALL_ORDERS"):
    CASES += [
        Case("two lookups, update", two_lookups_update),
        Case("two lookups, stream", two_lookups_stream, streams=True),
        Case(
            "two lookups, failing stream", two_lookups_stream_that_fails, streams=True
        ),
        Case("two lookups, delete", two_lookups_delete, warm=True),
        Case("three lookups, update", three_lookups_update, ()),
        Case("two lookups, update", two_lookups_update, ALL, warm=True),
        Case("two lookups, update, evict", two_lookups_update_evict, warm=True),
        Case("lookup, update, refresh, evict", lookup_update_refresh_evict, warm=True),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_brings_an_old_row_back(
    case: Case, threads: ThreadPoolExecutor, report: Callable[[str], None]
) -> None:
    stage = Stage(threads, case.uppers, streams=case.streams)

    def world() -> History:
        history = History(stage, warm=case.warm)
        case.add(history)
        return history

    seen = explore(world, footprint)
    report(f"{case}: {seen.schedules} orders")
    assert seen.schedules > 30
    assert [str(violation) for violation in seen.violations] == []


def test_leaving_equal_orders_out_loses_no_outcome(threads: ThreadPoolExecutor) -> None:
    stage = Stage(threads, ())
    outcomes: dict[bool, set[tuple[tuple[str, int], ...]]] = {True: set(), False: set()}
    counts = {}
    for reduce, seen in outcomes.items():

        class Noting(History):
            def check(self, seen: set = seen) -> str | None:  # type: ignore[type-arg]
                reason = super().check()
                seen.add(self.outcome())
                return reason

        def world() -> History:
            history = Noting(stage)
            lookup_update(history)
            return history

        counts[reduce] = explore(world, footprint, reduce=reduce).schedules
    assert outcomes[True] == outcomes[False]
    assert len(outcomes[True]) == 2  # the lookup saw the old row, or the new one
    assert counts[False] == 252  # ten steps, five of each task
    assert counts[True] < 20


# Planted faults. Each must be seen, or the tests above prove nothing.


class HoldsNothing(HostTier):
    @contextmanager
    def hold(self, tag: str, keys: Keys | None = None) -> Iterator[None]:
        yield


class KeepsOldRows(HostTier):
    """Evicts everything or nothing."""

    def evict(self, tag: str, keys: Keys | None = None) -> int:
        return 0 if keys is not None else super().evict(tag)


class IgnoresEpochs(HostTier):
    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        return super().backfill(tag, keys, rows, (1 << 62))


class ReadsEpochsLate(SteppedBackfills):
    def put(self, item: Backfill) -> bool:
        return super().put(replace(item, epoch=item.tier.epoch(item.tag)))


class NeverInvalidates(SteppedInFlight):
    def invalidate(self, keys: Keys | None) -> None:
        pass


class NeverForgets(SteppedInFlight):
    def land(self, flight: Flight, *, failed: bool = False) -> None:
        flight.failed = failed
        flight.landed.set()


class InvalidatesEarly(Hierarchy):
    """Takes keys off the register before it writes, and not after."""

    def _write_part(self, change: Change) -> None:
        keys, rows = change.keys, change.rows
        with ExitStack() as holds:
            for tier in self.tiers[:-1]:
                holds.enter_context(tier.hold(self.spec.tag, keys))
                tier.evict(self.spec.tag, keys)
            assert self._in_flight is not None
            assert rows is not None
            self._in_flight.invalidate(keys)
            for tier in reversed(self.tiers):
                tier.insert(self.spec.tag, keys, rows)


class WaitsForNoChange(Hierarchy):
    """Hands new rows out while upper tiers have old ones."""

    def _wait_for_change(self, keys: Keys) -> None:
        pass


class WritesDownwards(Hierarchy):
    """Writes the first tier first."""

    def _write_part(self, change: Change) -> None:
        tiers, self.tiers = self.tiers, self.tiers[::-1]
        try:
            super()._write_part(change)
        finally:
            self.tiers = tiers


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        pytest.param(
            Case("", two_lookups_update_that_fails_late, (HoldsNothing,)),
            {},
            id="keys are not held",
        ),
        pytest.param(
            Case("", two_lookups_update_that_fails_late, (KeepsOldRows,)),
            {},
            id="old rows stay in upper tiers while the lowest is written",
        ),
        pytest.param(
            Case("", lookup_update, (IgnoresEpochs,)), {}, id="any backfill is stored"
        ),
        pytest.param(
            Case("", lookup_update),
            {"queue": ReadsEpochsLate},
            id="the epoch is read after the rows",
        ),
        pytest.param(
            Case("", two_lookups_update, ()),
            {"register": NeverInvalidates},
            id="a flight may be joined after an update",
        ),
        pytest.param(
            Case("", two_lookups_update, ()),
            {"hierarchy": InvalidatesEarly},
            id="flights are forgotten before the write only",
        ),
        pytest.param(
            Case("", two_lookups_update, UPPER, warm=True),
            {"hierarchy": InvalidatesEarly},
            id="flights are forgotten before the lowest tier is written only",
        ),
        pytest.param(
            Case("", lookup_update, ()),
            {"register": NeverForgets},
            id="a flight stays on the register",
        ),
        pytest.param(
            Case("", two_lookups_update_that_fails),
            {"hierarchy": WritesDownwards},
            id="upper tiers are written first",
        ),
        pytest.param(
            Case("", probed_lookup_stream_backfill, streams=True),
            {"hierarchy": WaitsForNoChange},
            id="new rows of a stream are handed out too early",
        ),
        pytest.param(
            Case(
                "", probed_lookup_failing_stream_backfill, (KeepsOldRows,), streams=True
            ),
            {},
            id="old rows stay in upper tiers when a stream fails",
        ),
    ],
)
def test_a_planted_fault_is_seen(
    case: Case, parts: dict[str, type], threads: ThreadPoolExecutor
) -> None:
    stage = Stage(threads, case.uppers, streams=case.streams, **parts)

    def world() -> History:
        history = History(stage, warm=case.warm)
        case.add(history)
        return history

    assert explore(world, footprint, stop_at_first=True).violations
