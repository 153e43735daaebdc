"""Interleaved timing of variants on a machine that others use too.

A variant is a set-up that returns the call to time. In every round each variant runs in
turn, on inputs that its set-up made for this one call, and the turn rotates. A round
counts only if other processes used little CPU while it ran. Ratios are taken inside a
round, so a slow minute slows both sides; their spread is the spread over rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.summaries import Mark

Call = Callable[[], float | None]
"""Does the work once; returns its own seconds if it measured them itself."""

Setup = Callable[[], Call]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_SLOW_SETUP = 4  # slices after which a variant's turn ends, its set-ups included


@dataclass(frozen=True)
class Variant:
    """One way to do the work that a benchmark compares.

    Parameters
    ----------
    name
        How results call it.
    setup
        Makes fresh inputs, untimed, and returns the call.
    items
        Keys or rows that one call handles; ratios are per item.
    """

    name: str
    setup: Setup
    items: int


@dataclass(frozen=True)
class Meter:
    """How time and CPU use are read; tests pass their own."""

    wall: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    machine_cpu: Callable[[], float] = field(default=lambda: machine_cpu_s())
    own_cpu: Callable[[], float] = field(default=lambda: own_cpu_s())


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Parameters
    ----------
    rounds
        Quiet rounds wanted.
    slice_s
        Seconds for which each variant repeats its call in a round; at least one call,
        and fewer calls where making their inputs takes most of the time.
    budget_s
        Seconds after which the benchmark stops, with the rounds it has.
    max_other_cores
        Cores that others may use in a round that counts.
    quiet_wait_s
        Seconds to wait for the machine to become quiet before a round.
    min_quiet_rounds
        With fewer quiet rounds than this at the end, all rounds count.
    """

    rounds: int = 20
    slice_s: float = 0.1
    budget_s: float = 60.0
    max_other_cores: float = 0.15
    quiet_wait_s: float = 2.0
    min_quiet_rounds: int = 5


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    ``calls`` are seconds of every counted call; ``per_item`` is the median seconds per
    item of each counted round, in the order of the rounds. ``marks`` are what results
    are to say beside what their spread does.
    """

    name: str
    items: int
    calls: NDArray[np.float64]
    per_item: NDArray[np.float64]
    quiet: bool  # whether only quiet rounds were counted
    marks: tuple[Mark, ...] = ()

    @property
    def noise(self) -> float:
        """Robust relative standard deviation of the rounds."""
        middle = float(np.median(self.per_item))
        spread = float(np.median(np.abs(self.per_item - middle)))
        return _MAD_TO_SIGMA * spread / middle if middle else 0.0


def interleave(
    variants: Sequence[Variant], plan: Plan, meter: Meter | None = None
) -> dict[str, Timing]:
    """Time the variants round-robin and return their timings by name.

    Every variant runs once, untimed, before the first round. If the budget ends before
    ``plan.min_quiet_rounds`` were seen, all rounds count and the timings say so.
    """
    meter = meter or Meter()
    for variant in variants:
        variant.setup()()
    rounds: list[_Round] = []
    stop = meter.wall() + plan.budget_s
    while sum(r.quiet for r in rounds) < plan.rounds:
        if rounds and meter.wall() >= stop:
            break
        _wait_until_quiet(plan, meter)
        rounds.append(_one_round(_rotated(variants, len(rounds)), plan, meter))
    return _timings(variants, rounds, plan)


def speedup(timing: Timing, baseline: Timing) -> NDArray[np.float64]:
    """Return how many times less than the baseline an item takes, per round."""
    return baseline.per_item / timing.per_item


def machine_cpu_s() -> float:
    """Return busy seconds of all cores since boot; waiting for disks is not busy."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def own_cpu_s() -> float:
    """Return CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return sum(times[:4])


@dataclass(frozen=True)
class _Round:
    quiet: bool
    calls: dict[str, list[float]]


def _rotated(variants: Sequence[Variant], turn: int) -> list[Variant]:
    start = turn % len(variants)
    return [*variants[start:], *variants[:start]]


def _one_round(variants: Sequence[Variant], plan: Plan, meter: Meter) -> _Round:
    machine, own, start = meter.machine_cpu(), meter.own_cpu(), meter.wall()
    calls = {v.name: _one_slice(v, plan.slice_s, meter) for v in variants}
    others = (meter.machine_cpu() - machine) - (meter.own_cpu() - own)
    elapsed = meter.wall() - start
    return _Round(others <= plan.max_other_cores * elapsed, calls)


def _one_slice(variant: Variant, slice_s: float, meter: Meter) -> list[float]:
    calls: list[float] = []
    stop = meter.wall() + _SLOW_SETUP * slice_s
    while not calls or (sum(calls) < slice_s and meter.wall() < stop):
        call = variant.setup()
        start = meter.wall()
        own_s = call()
        calls.append(meter.wall() - start if own_s is None else own_s)
    return calls


def _wait_until_quiet(plan: Plan, meter: Meter) -> None:
    probe_s = 0.12
    stop = meter.wall() + plan.quiet_wait_s
    while meter.wall() < stop:
        before = meter.machine_cpu()
        meter.sleep(probe_s)
        if meter.machine_cpu() - before <= 2 * plan.max_other_cores * probe_s:
            return


def _timings(
    variants: Sequence[Variant], rounds: Sequence[_Round], plan: Plan
) -> dict[str, Timing]:
    quiet = [r for r in rounds if r.quiet]
    enough = len(quiet) >= min(plan.min_quiet_rounds, plan.rounds)
    counted = quiet if enough else rounds
    return {v.name: _timing(v, counted, enough) for v in variants}


def _timing(variant: Variant, rounds: Sequence[_Round], quiet: bool) -> Timing:
    calls = [r.calls[variant.name] for r in rounds]
    return Timing(
        variant.name,
        variant.items,
        np.array([s for round_ in calls for s in round_]),
        np.array([statistics.median(c) / variant.items for c in calls]),
        quiet,
    )
