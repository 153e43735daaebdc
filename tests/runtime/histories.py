"""One key in a hierarchy that a schedule steps through, and what may be seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hps_numba.errors import TierError, UpdateError
from hps_numba.runtime.backfill import Backfill
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.inflight import _REGISTER, Boarding, Flight, InFlight
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import (
    FailureMode,
    Keys,
    Position,
    RowBlock,
    Rows,
    StreamSpan,
    TableSpec,
)
from tests.support.gates import Scheduler, SteppedEvent, SteppedLock
from tests.support.orders import Footprint
from tests.support.wrappers import FailingTier, SteppedTier

SPEC = TableSpec("model", "table", 4)
KEY = np.array([7], np.int64)
DELETED = 0  # the value of the default row
FIRST = 1  # the version that the lowest tier begins with


def row(version: int) -> Rows:
    return np.full((1, SPEC.dim), version, np.float32)


class UpperTier(HostTier):
    """A remote tier above the lowest one."""

    name = "upper"
    local = False


class LowerTier(HostTier):
    """A remote tier; it is the lowest, so what it stores is what was written."""

    name = "lower"
    local = False

    def __init__(self) -> None:
        super().__init__(num_partitions=1)
        self.applied: list[int] = []

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        super().insert(tag, keys, rows)
        self.applied.append(int(rows[0, 0]))

    def load(self, tag: str, blocks: Iterable[RowBlock], **options: Any) -> int:
        (block,) = blocks
        n_rows = super().load(tag, [block], **options)
        self.applied.append(int(block.rows[0, 0]))
        return n_rows

    def delete(self, tag: str, keys: Keys) -> int:
        self.applied.append(DELETED)
        return super().delete(tag, keys)


class Stage:
    """A hierarchy for many histories, one after the other.

    Parameters
    ----------
    threads
        Where tasks run.
    uppers
        Makes the tiers above the lowest one.
    hierarchy, register, queue
        Parts to use, such as ones with a planted fault.
    streams
        Whether changes that are announced have stop points of their own, and lookups
        wait for them.
    """

    def __init__(
        self,
        threads: Executor,
        uppers: Sequence[Callable[[], Tier]] = (HostTier,),
        *,
        hierarchy: type[Hierarchy] = Hierarchy,
        register: type[SteppedInFlight] | None = None,
        queue: type[SteppedBackfills] | None = None,
        streams: bool = False,
    ) -> None:
        self.threads = threads
        self.scheduler = Scheduler(threads)
        self.lower = LowerTier()
        self.breaking = FailingTier(self.lower)
        tiers = [*(make() for make in uppers), self.breaking]
        for tier in tiers:
            tier.open_table(SPEC)
        self.tiers = [SteppedTier(tier, self.point) for tier in tiers]
        self.table = hierarchy(
            SPEC,
            self.tiers,
            backfills=(queue or SteppedBackfills)(self),  # type: ignore[arg-type]
            on_failure=FailureMode.RAISE,
            write_rows=8,
        )
        self.register = (register or SteppedInFlight)(SPEC, self)
        self.table._in_flight = self.register
        if streams:
            self._step_changes()
        else:  # not even waiting is needed, with as few lookups as there are
            self.table._wait_for_change = lambda keys: None  # type: ignore[method-assign]

    def _step_changes(self) -> None:
        """Stop where a stream announces a change, ends it, or is looked at."""
        look = self.table._wait_for_change

        def new_event() -> SteppedEvent:
            self.point("change.begin")
            return Changed(self.scheduler, "change.wait")

        def wait_for_change(keys: Keys) -> None:
            self.point("change.look")
            look(keys)

        self.table._new_event = new_event  # type: ignore[assignment,method-assign]
        self.table._wait_for_change = wait_for_change  # type: ignore[method-assign]

    def point(self, label: str) -> None:
        """Stop the calling task of the present history."""
        self.scheduler.point(label)

    def begin(self, *, warm: bool) -> None:
        """Make ready for another history.

        Parameters
        ----------
        warm
            Whether upper tiers begin with the row, or without it.
        """
        self.scheduler = Scheduler(self.threads)
        self.table._write_lock = SteppedLock(self.scheduler, "lock.acquire")
        self.register.clear()
        self.lower.applied.clear()
        self.breaking.heal()
        for tier in self.tiers:
            tier.inner.evict(SPEC.tag)
            if warm or tier is self.tiers[-1]:
                tier.inner.insert(SPEC.tag, KEY, row(FIRST))


class Changed(SteppedEvent):
    """The end of a change, which is a step."""

    def set(self) -> None:
        self._scheduler.point("change.end")
        super().set()


class SteppedInFlight(InFlight):
    """A register that stops before each operation."""

    def __init__(self, spec: TableSpec, stage: Stage) -> None:
        super().__init__(spec)
        self._stage = stage

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing is left on the register."""
        return not self._flights and self._register.size(_REGISTER.tag) == 0

    def clear(self) -> None:
        """Forget what a history left that was not followed to its end."""
        super().invalidate(None)
        self._flights.clear()

    def board(self, keys: Keys, flight: Flight | None = None) -> Boarding:
        self._stage.point("register.board")
        return super().board(keys, flight)

    def land(self, flight: Flight, *, failed: bool = False) -> None:
        self._stage.point("register.land")
        super().land(flight, failed=failed)

    def invalidate(self, keys: Keys | None) -> None:
        self._stage.point("register.invalidate")
        super().invalidate(keys)

    def new_flight(self) -> Flight:
        flight = super().new_flight()
        flight.landed = SteppedEvent(self._stage.scheduler, "flight.wait")
        return flight


class SteppedBackfills:
    """A queue whose every item is a task, so that they are stored in any order."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def put(self, item: Backfill) -> bool:
        tier, scheduler = item.tier, self._stage.scheduler
        assert isinstance(tier, SteppedTier)
        scheduler.spawn(
            f"backfill {scheduler.n_tasks}",
            lambda: tier.inner.backfill(item.tag, item.keys, item.rows, item.epoch),
            label=f"{tier.name}.backfill",
        )
        return True


@cache
def footprint(label: str) -> Footprint:
    """Return what the step that begins at a stop point touches."""
    return _FOOTPRINTS.get(label) or _of_tier(*label.split("."))


# Operations that add to one thing may change places: two flights may land, or be taken
# off the register, in any order.
_FOOTPRINTS = {
    "begin": Footprint(reads=frozenset({"ended"})),
    "end": Footprint(adds=frozenset({"ended"})),
    "end and look": Footprint(
        reads=frozenset({"host", "upper"}), adds=frozenset({"ended"})
    ),
    "lock.acquire": Footprint(writes=frozenset({"lock"})),
    "register.board": Footprint(writes=frozenset({"register"})),
    "register.land": Footprint(adds=frozenset({"register", "landed"})),
    "register.invalidate": Footprint(adds=frozenset({"register"})),
    "flight.wait": Footprint(waits=frozenset({"landed"})),
    "change.begin": Footprint(writes=frozenset({"change"})),
    "change.look": Footprint(reads=frozenset({"change"})),
    "change.end": Footprint(writes=frozenset({"change"}), adds=frozenset({"changed"})),
    "change.wait": Footprint(waits=frozenset({"changed"})),
}


def _of_tier(tier: str, operation: str) -> Footprint:
    rows, epoch, stamps = tier, f"{tier} epoch", f"{tier} stamps"
    reads, writes = {
        "fetch": ({rows}, set()),
        "iterate": ({rows}, set()),
        "epoch": ({epoch}, set()),
        "insert": (set(), {rows, epoch, stamps}),
        "load": (set(), {rows, epoch, stamps}),
        "delete": (set(), {rows, epoch, stamps}),
        "evict": (set(), {rows}),
        "backfill": ({stamps}, {rows}),
        "hold": (set(), {stamps}),
        "release": (set(), {epoch, stamps}),
    }[operation]
    return Footprint(frozenset(reads), frozenset(writes))


@dataclass(frozen=True)
class Lookup:
    """What a lookup returned, and when it ran."""

    task: str
    version: int
    begin: int
    end: int


class History:
    """The tasks of one schedule on a stage, and what they saw."""

    def __init__(self, stage: Stage, *, warm: bool = False) -> None:
        stage.begin(warm=warm)
        self.scheduler = stage.scheduler
        self._stage = stage
        self._now = 0
        self._lookups: list[Lookup] = []
        self._acknowledged: list[tuple[int, int]] = []  # (version, when)

    def lookup(self, *names: str) -> None:
        """Add lookups."""
        for name in names:
            self.scheduler.spawn(name, lambda n=name: self._look_up(n), label="begin")

    def probed_lookup(self, name: str) -> None:
        """Add a lookup, with another one of upper tiers as soon as it has ended."""
        self.scheduler.spawn(
            name, lambda: self._look_up(name, probe=True), label="begin"
        )

    def update(self, *versions: int) -> None:
        """Add updates to these versions."""
        for version in versions:
            self.scheduler.spawn(
                f"update {version}", lambda v=version: self._update(v), label="begin"
            )

    def stream(self, *versions: int) -> None:
        """Add spans of an update stream, applied by one task in their order."""
        self.scheduler.spawn("stream", lambda: self._stream(versions), label="begin")

    def failing_stream(self, version: int, *, late: bool = False) -> None:
        """Add a span that the lowest tier fails once, ``late``: after it applied it."""
        self._stage.breaking.fail("insert", late=late)
        self.stream(version)

    def failing_update(self, version: int, *, late: bool = False) -> None:
        """Add an update that the lowest tier fails, ``late``: after it applied it."""
        self._stage.breaking.fail("insert", late=late)
        self.update(version)

    def delete(self) -> None:
        """Add a deletion."""
        self.scheduler.spawn("delete", self._delete, label="begin")

    def evict(self) -> None:
        """Add an eviction from the first tier."""
        first = self._stage.tiers[0]
        self.scheduler.spawn(
            "evict",
            lambda: first.inner.evict(SPEC.tag, KEY),
            label=f"{first.name}.evict",
        )

    def backfill(self) -> None:
        """Add the backfill of a lookup that read the first row before all else."""
        first = self._stage.tiers[0]
        epoch = first.inner.epoch(SPEC.tag)
        self.scheduler.spawn(
            "backfill",
            lambda: first.inner.backfill(SPEC.tag, KEY, row(FIRST), epoch),
            label=f"{first.name}.backfill",
        )

    def refresh(self) -> None:
        """Add a refresh."""
        self.scheduler.spawn(
            "refresh", lambda: self._stage.table.refresh(8), label="begin"
        )

    def check(self) -> str | None:
        """Return what was seen that must not be, or None."""
        if not self._stage.register.idle:
            return "the in-flight register is not empty"
        newest = self._stage.lower.applied[-1]
        settled = newest in (FIRST, *(v for v, _ in self._acknowledged))
        uppers = [tier.inner for tier in self._stage.tiers[:-1]]
        for tier in uppers:
            version = _held(tier)
            if settled and version not in (None, newest):
                return f"{tier.name} holds version {version} under {newest}"
        self._look_up("after")
        for tier in uppers:
            tier.evict(SPEC.tag, KEY)
        self._look_up("after eviction")
        return self._first_illegal()

    def outcome(self) -> tuple[tuple[str, int], ...]:
        """Return what each lookup saw."""
        return tuple(sorted((x.task, x.version) for x in self._lookups))

    def _look_up(self, name: str, *, probe: bool = False) -> None:
        begin = self._tick()
        chunk = Chunk(KEY, np.zeros((1, SPEC.dim), np.float32), np.zeros(1, np.bool_))
        self._stage.table.ask_local(chunk)
        self._stage.table.ask_remote(chunk)
        self.scheduler.point("end and look" if probe else "end")
        assert chunk.out[0, 0] == chunk.out[0, 1]
        version = int(chunk.out[0, 0])
        assert chunk.found[0] == (version != DELETED)
        self._lookups.append(Lookup(name, version, begin, self._tick()))
        held = [_held(tier.inner) for tier in self._stage.tiers[:-1]] if probe else []
        for above in [v for v in held if v is not None]:
            begin = self._tick()
            self._lookups.append(Lookup(f"{name} again", above, begin, self._tick()))

    def _update(self, version: int) -> None:
        try:
            self._stage.table.update(KEY, row(version))
        except UpdateError:
            return
        self._acknowledge(version)

    def _stream(self, versions: Sequence[int]) -> None:
        into = self._stage.tiers
        for i, version in enumerate(versions):
            span = StreamSpan(0, Position(i), Position(i + 1))
            try:
                self._stage.table.apply(KEY, row(version), span, into)
            except TierError:
                return
            self._acknowledge(version)

    def _delete(self) -> None:
        self._stage.table.delete(KEY)
        self._acknowledge(DELETED)

    def _acknowledge(self, version: int) -> None:
        self.scheduler.point("end")
        self._acknowledged.append((version, self._tick()))

    def _first_illegal(self) -> str | None:
        age = {v: i for i, v in enumerate(self._stage.lower.applied)}
        known = self._known()
        for lookup in self._lookups:
            if lookup.version not in age:
                return f"{lookup.task} saw {lookup.version}, which was not written"
            for version, end, why in known:
                if end < lookup.begin and age[lookup.version] < age[version]:
                    return f"{lookup.task} saw {lookup.version} after {why}"
        return None

    def _known(self) -> list[tuple[int, int, str]]:
        """Return what later lookups may not be behind of: version, since when, why."""
        known = [(v, end, f"{v} was acknowledged") for v, end in self._acknowledged]
        return known + [
            (x.version, x.end, f"{x.task} saw {x.version}") for x in self._lookups
        ]

    def _tick(self) -> int:
        self._now += 1
        return self._now


def _held(tier: Tier) -> int | None:
    out, found = row(-1), np.zeros(1, np.bool_)
    tier.fetch(SPEC.tag, KEY, out, found)
    return int(out[0, 0]) if found[0] else None
