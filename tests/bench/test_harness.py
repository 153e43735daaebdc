from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench.harness import Call, Meter, Plan, Timing, Variant, interleave, speedup


class World:
    """A clock that moves when work is done, and other processes that use CPU."""

    def __init__(self, other_cores: Callable[[float], float] = lambda now: 0.0) -> None:
        self.now = 0.0
        self.others = 0.0
        self.own = 0.0
        self.other_cores = other_cores

    def work(self, seconds: float) -> None:
        self.others += seconds * self.other_cores(self.now)
        self.own += seconds
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.others += seconds * self.other_cores(self.now)
        self.now += seconds

    def meter(self) -> Meter:
        return Meter(
            wall=lambda: self.now,
            sleep=self.sleep,
            machine_cpu=lambda: self.own + self.others,
            own_cpu=lambda: self.own,
        )


def taking(world: World, name: str, seconds: float, items: int = 10) -> Variant:
    return Variant(name, lambda: lambda: world.work(seconds), items)


def timing(name: str, per_item: list[float]) -> Timing:
    values = np.array(per_item)
    return Timing(name, 1, values, values, quiet=True)


def test_seconds_are_those_of_the_calls_without_their_set_ups() -> None:
    world = World()

    def setup() -> Call:
        world.work(5.0)
        return lambda: world.work(0.25)

    plan = Plan(rounds=3, slice_s=0.5, budget_s=1e9)
    result = interleave([Variant("a", setup, 10)], plan, world.meter())["a"]
    assert result.calls.tolist() == pytest.approx([0.25] * 3)
    assert result.per_item.tolist() == pytest.approx([0.025] * 3)
    assert result.quiet


def test_a_slice_repeats_short_calls_until_its_time_is_up() -> None:
    world = World()
    plan = Plan(rounds=2, slice_s=1.0)
    result = interleave([taking(world, "a", 0.25)], plan, world.meter())["a"]
    assert len(result.calls) == 8


def test_variants_take_turns_and_the_first_turn_rotates() -> None:
    world, order = World(), []

    def variant(name: str) -> Variant:
        def setup() -> Call:
            def call() -> None:
                order.append(name)
                world.work(1.0)

            return call

        return Variant(name, setup, 1)

    plan = Plan(rounds=3, slice_s=0.5)
    interleave([variant("a"), variant("b"), variant("c")], plan, world.meter())
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_call_that_times_itself_is_believed() -> None:
    world = World()

    def setup() -> Call:
        def call() -> float:
            world.work(9.0)
            return 2.0

        return call

    plan = Plan(rounds=1, slice_s=1.0)
    result = interleave([Variant("a", setup, 4)], plan, world.meter())["a"]
    assert result.calls.tolist() == [2.0]
    assert result.per_item.tolist() == [0.5]


def test_rounds_in_which_others_worked_are_dropped() -> None:
    world = World(lambda now: 0.5 if now < 30 else 0.0)

    def setup() -> Call:
        slow = world.now < 30
        return lambda: world.work(4.0 if slow else 1.0)

    plan = Plan(rounds=5, slice_s=0.5, budget_s=1000)
    result = interleave([Variant("a", setup, 1)], plan, world.meter())["a"]
    assert result.quiet
    assert result.calls.tolist() == [1.0] * 5


def test_what_the_process_itself_uses_does_not_disturb_a_round() -> None:
    world = World(lambda now: 0.1)
    plan = Plan(rounds=4, slice_s=0.5, budget_s=1000)
    result = interleave([taking(world, "a", 1.0)], plan, world.meter())["a"]
    assert result.quiet
    assert len(result.per_item) == 4


def test_on_a_busy_machine_all_rounds_count_and_it_says_so() -> None:
    world = World(lambda now: 1.0)
    plan = Plan(rounds=5, slice_s=0.5, budget_s=40, quiet_wait_s=1)
    result = interleave([taking(world, "a", 2.0)], plan, world.meter())["a"]
    assert not result.quiet
    assert len(result.per_item) > 5


def test_some_quiet_rounds_are_enough_when_the_budget_ends() -> None:
    world = World(lambda now: 0.0 if now < 20 else 1.0)
    plan = Plan(rounds=50, slice_s=0.5, budget_s=60, quiet_wait_s=1, min_quiet_rounds=5)
    result = interleave([taking(world, "a", 2.0)], plan, world.meter())["a"]
    assert result.quiet
    assert 5 <= len(result.per_item) < 12


def test_a_speed_up_is_taken_inside_each_round() -> None:
    slow, fast = timing("slow", [4.0, 8.0]), timing("fast", [2.0, 1.0])
    assert speedup(fast, slow).tolist() == [2.0, 8.0]


def test_noise_is_the_spread_of_the_rounds() -> None:
    assert timing("a", [2.0] * 9).noise == 0
    one_outlier = timing("a", [2.0] * 9 + [50.0])
    assert one_outlier.noise == 0
    assert timing("a", [1.0, 2.0, 3.0]).noise == pytest.approx(1.4826 / 2)
