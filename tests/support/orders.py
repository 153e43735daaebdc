"""Every order in which the tasks of a scheduler can take their steps.

Orders that differ only in steps that commute are equal: one of them is run. Which steps
commute is told by their footprints.

Source: Abdulla, Aronis, Jonsson, Sagonas, Optimal Dynamic Partial Order Reduction,
POPL 2014, algorithm 1 (source-DPOR); races are looked for once a run is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from tests.support.gates import Scheduler

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Footprint:
    """What a step touches. Steps commute unless one changes what the other touches.

    ``adds`` commute with each other, but not with reads and writes. A step is enabled
    by those that add what it ``waits`` for.
    """

    reads: frozenset[str] = _NOTHING
    writes: frozenset[str] = _NOTHING
    adds: frozenset[str] = _NOTHING
    waits: frozenset[str] = _NOTHING

    def commutes_with(self, other: Footprint) -> bool:
        """Whether the two may change places without anybody noticing."""
        return not (
            self.writes & (other.reads | other.writes | other.adds)
            or other.writes & (self.reads | self.adds)
            or self.adds & other.reads
            or other.adds & self.reads
        )


FootprintOf = Callable[[str], Footprint]
"""Tells what the step from a stop point to the next touches."""


class World(Protocol):
    """What one schedule runs in."""

    scheduler: Scheduler

    def check(self) -> str | None:
        """Return what is wrong once all tasks have ended, or None."""


@dataclass(frozen=True)
class Violation:
    """A schedule, as (task, stop point) pairs, and what it broke."""

    schedule: tuple[tuple[str, str], ...]
    reason: str

    def __str__(self) -> str:
        steps = "\n".join(f"  {task:12} {label}" for task, label in self.schedule)
        return f"{self.reason}\n{steps}"


@dataclass
class Exploration:
    """What ``explore`` saw."""

    schedules: int = 0
    cut_short: int = 0  # begun, but seen to be equal to one that was run
    violations: list[Violation] = field(default_factory=list)


@dataclass
class _Node:
    """A state on the way, and the step that was taken from it."""

    enabled: dict[str, str]  # where each task stands that can go on
    asleep: set[str]  # tasks whose step leads to nothing new
    choice: str
    to_try: set[str]

    @property
    def label(self) -> str:
        return self.enabled[self.choice]


def explore(
    make_world: Callable[[], World],
    footprint: FootprintOf,
    *,
    reduce: bool = True,
    stop_at_first: bool = False,
) -> Exploration:
    """Run every order of the steps of a world's tasks, each in a world of its own.

    Parameters
    ----------
    make_world
        Called for each order; the worlds begin alike.
    footprint
        What the step from a stop point to the next touches.
    reduce
        Whether one of several equal orders will do.
    stop_at_first
        Return when an order violates something.

    Raises
    ------
    AssertionError
        If tasks wait for each other for ever.
    """
    search = _Search(footprint, reduce=reduce)
    while True:
        search.run(make_world())
        if stop_at_first and search.seen.violations:
            return search.seen
        if not search.turn():
            return search.seen


class _Search:
    """Depth first through the tree of orders; ``path`` leads to the present one."""

    def __init__(self, footprint: FootprintOf, *, reduce: bool) -> None:
        self.seen = Exploration()
        self._path: list[_Node] = []
        self._reduce = reduce
        self._commute = cache(lambda a, b: footprint(a).commutes_with(footprint(b)))
        self._enables = cache(lambda a, b: bool(footprint(a).adds & footprint(b).waits))

    def run(self, world: World) -> None:
        """Repeat the steps of the path, go on to the end, and look at the outcome."""
        n_repeated = len(self._path)
        try:
            for node in self._path:
                world.scheduler.step(node.choice)
            if self._extend(world.scheduler):
                self._judge(world)
            else:
                self.seen.cut_short += 1
        finally:
            world.scheduler.abandon()
        if self._reduce:
            self._plan_reversals(max(n_repeated - 1, 0))

    def turn(self) -> bool:
        """Turn to the next order; False if there is none."""
        while self._path:
            node = self._path[-1]
            node.asleep.add(node.choice)
            left = node.to_try - node.asleep
            if left:
                node.choice = min(left)
                return True
            self._path.pop()
        return False

    def _extend(self, scheduler: Scheduler) -> bool:
        """Go on to the end; False if an equal order was run before."""
        while not scheduler.finished:
            enabled = scheduler.enabled()
            assert enabled, f"all tasks wait: {scheduler.where()}"
            asleep = self._still_asleep()
            choice = next((name for name in enabled if name not in asleep), None)
            if choice is None:
                return False
            to_try = {choice} if self._reduce else set(enabled)
            self._path.append(_Node(enabled, asleep, choice, to_try))
            scheduler.step(choice)
        return True

    def _judge(self, world: World) -> None:
        self.seen.schedules += 1
        if reason := world.check():
            schedule = tuple((node.choice, node.label) for node in self._path)
            self.seen.violations.append(Violation(schedule, reason))

    def _still_asleep(self) -> set[str]:
        if not self._path or not self._reduce:
            return set()
        last = self._path[-1]
        return {
            name
            for name in last.asleep
            if self._commute(last.enabled[name], last.label)
        }

    def _plan_reversals(self, n_planned: int) -> None:
        """See to it that of two steps that raced the second comes first once."""
        path, before = self._path, self._happened_before()
        for j, node in enumerate(path[n_planned:], start=n_planned):
            covered = 0
            for i in range(j - 1, -1, -1):
                if not before[j] >> i & 1 or covered >> i & 1:
                    continue
                covered |= before[i] | 1 << i
                linked = path[i].choice == node.choice
                if not linked and not self._commute(path[i].label, node.label):
                    self._plan(before, i, j)

    def _plan(self, before: list[int], i: int, j: int) -> None:
        """Let some task lead from node i to where step j does not come after step i."""
        path = self._path
        kept = [k for k in range(i + 1, j) if not before[k] >> i & 1]
        earlier, first = 0, set()
        for k in [*kept, j]:
            if not before[k] & earlier:
                first.add(path[k].choice)
            earlier |= 1 << k
        node = path[i]
        if not first & node.to_try:
            possible = first & node.enabled.keys()
            node.to_try |= {min(possible)} if possible else node.enabled.keys()

    def _happened_before(self) -> list[int]:
        """Return for each step the earlier ones that it depends on, as bits."""
        known: dict[str, int] = {}  # task -> what happened before its next step
        before: list[int] = []
        for j, node in enumerate(self._path):
            for name in node.enabled:
                # A task that is new here was begun by the last step.
                known.setdefault(name, before[-1] | 1 << (j - 1) if before else 0)
            bits = known[node.choice]
            for i, earlier in enumerate(self._path[:j]):
                a, b = earlier.label, node.label
                if not bits >> i & 1 and (
                    not self._commute(a, b) or self._enables(a, b)
                ):
                    bits |= before[i] | 1 << i
            before.append(bits)
            known[node.choice] = bits | 1 << j
        return before
