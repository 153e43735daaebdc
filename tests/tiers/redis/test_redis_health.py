"""The breaker of each server: its schedule by a fake clock, its thread by events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.redis import health as health_module
from hps_numba.tiers.redis.health import (
    CALM_S,
    FIRST_PAUSE_S,
    GROWTH,
    LONGEST_PAUSE_S,
    Health,
    Outages,
)
from hps_numba.tiers.redis.replies import Fate
from hps_numba.tiers.redis.topology import Node, Topology
from tests.support.redis_servers import wait_for

A = cast(Node, SimpleNamespace(name="a:1"))
B = cast(Node, SimpleNamespace(name="b:2"))


def outages(jitter: float = 1.0) -> Outages:
    return Outages(lambda: jitter)


class FakeTopology:
    """Two servers with a slot each; a third slot that nobody has at first."""

    def __init__(self) -> None:
        self.owners = {0: A, 1: B}
        self.refreshed: list[str] = []
        self.error: Exception | None = None
        self.found: dict[int, Node] = {}  # by the next refresh

    def node(self, slot: int) -> Node:
        if slot not in self.owners:
            raise TierUnavailableError(f"no server has slot {slot}", tier="redis")
        return self.owners[slot]

    def master_names(self) -> set[str]:
        return {node.name for node in self.owners.values()}

    def refresh(self, *, avoid: str = "") -> None:
        self.refreshed.append(avoid)
        self.owners.update(self.found)


class Answers:
    """What servers answer when they are asked; each question waits for its answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._changed = threading.Condition()
        self._answers: list[str | None] = []

    def give(self, *answers: str | None) -> None:
        with self._changed:
            self._answers += answers
            self._changed.notify_all()

    def __call__(self, node: Node) -> str | None:
        with self._changed:
            self.asked.append(node.name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._answers, 10), "no answer"
            return self._answers.pop(0)

    def wait_for_questions(self, n: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= n, 10)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    found = Answers()
    monkeypatch.setattr(health_module, "ask", found)
    return found


@pytest.fixture
def topology() -> FakeTopology:
    return FakeTopology()


@pytest.fixture
def health(topology: FakeTopology, answers: Answers) -> Iterator[Health]:
    found = Health(cast(Topology, topology))
    yield found
    answers.give(*[None] * 10)
    found.close()
    assert "hps-redis-health" not in {t.name for t in threading.enumerate()}


def test_a_server_that_failed_is_asked_at_once() -> None:
    down = outages()
    assert down.first() is None
    assert down.begin(A, "refused", 100.0)
    first = cast(Any, down.first())
    assert (first.node, first.reason, first.next_s) == (A, "refused", 100.0)


def test_a_second_failure_of_the_same_outage_is_no_news() -> None:
    down = outages()
    assert down.begin(A, "refused", 100.0)
    assert not down.begin(A, "silent", 101.0)
    assert [(o.reason, o.since_s) for o in down.all()] == [("refused", 100.0)]


def test_pauses_grow_with_the_outage_and_end_at_the_longest() -> None:
    down = outages()
    down.begin(A, "refused", 0.0)
    now_s, pauses = 0.0, []
    for _ in range(30):
        down.fail_again("a:1", "still refused", now_s)
        pauses.append(cast(Any, down.first()).next_s - now_s)
        now_s = cast(Any, down.first()).next_s
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[1] == pytest.approx(FIRST_PAUSE_S * GROWTH)
    pauses = [round(pause, 9) for pause in pauses]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S)
    ages = [sum(pauses[:i]) for i in range(len(pauses))]
    late = [pause / age for pause, age in zip(pauses[12:], ages[12:], strict=True)]
    assert max(late) < 0.3  # a server that is back is noticed that much later


def test_pauses_are_shortened_at_random() -> None:
    down = outages(jitter=0.5)
    down.begin(A, "refused", 10.0)
    down.fail_again("a:1", "refused", 10.0)
    assert cast(Any, down.first()).next_s == 10.0 + FIRST_PAUSE_S / 2


def test_the_server_whose_pause_ends_first_is_asked_first() -> None:
    down = outages()
    down.begin(A, "refused", 10.0)
    down.begin(B, "refused", 10.01)
    down.fail_again("a:1", "refused", 10.02)
    assert cast(Any, down.first()).node is B
    down.fail_again("b:2", "refused", 10.03)
    assert cast(Any, down.first()).node is A


def test_a_server_that_flaps_is_left_alone_for_twice_as_long_each_time() -> None:
    down, now_s, pauses = outages(), 0.0, []
    for _ in range(9):
        down.begin(A, "silent", now_s)
        pauses.append(cast(Any, down.first()).next_s - now_s)
        now_s += pauses[-1] + 0.1
        down.end("a:1", now_s)
        now_s += 0.5  # it answered PING, and then no lookup
    expected = [0.0] + [min(FIRST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(1, 9)]
    assert pauses == pytest.approx(expected)


def test_a_server_that_was_well_for_long_is_asked_at_once_again() -> None:
    down = outages()
    down.begin(A, "silent", 0.0)
    down.end("a:1", 1.0)
    down.begin(A, "silent", 1.5)
    down.end("a:1", 2.0)
    down.begin(A, "silent", 2.0 + CALM_S)
    assert cast(Any, down.first()).next_s == 2.0 + CALM_S


def test_what_is_known_of_the_past_does_not_grow() -> None:
    down = outages()
    for i in range(100):
        node = cast(Node, SimpleNamespace(name=f"n{i}:1"))
        down.begin(node, "refused", 20.0 * i)
        down.end(node.name, 20.0 * i + 1)
    assert len(down._past) == 1


def test_an_open_breaker_refuses_with_the_reason_and_closes_by_itself(
    health: Health, topology: FakeTopology, answers: Answers
) -> None:
    assert health.server_of(0) is A
    health.failed(A, "no answer in 1 s")
    with pytest.raises(
        TierUnavailableError, match=r"server a:1 is down .*\(no answer in 1 s\)"
    ):
        health.server_of(0)
    assert health.server_of(1) is B
    answers.give("still no answer")
    answers.wait_for_questions(2)
    with pytest.raises(TierUnavailableError, match=r"\(still no answer\)"):
        health.server_of(0)
    assert [state.name for state in health.down()] == ["a:1"]
    answers.give(None)
    wait_for(lambda: not health.down())
    assert health.server_of(0) is A
    assert health.failures == 1
    assert topology.refreshed == ["a:1", "a:1"]  # asked who has its slots, not it


def test_lookups_that_are_refused_ask_nobody(health: Health, answers: Answers) -> None:
    health.failed(A, "silent")
    answers.wait_for_questions(1)
    for _ in range(1000):
        with pytest.raises(TierUnavailableError):
            health.server_of(0)
        health.failed(A, "silent")
    assert answers.asked == ["a:1"]
    assert health.failures == 1


def test_a_server_without_slots_is_not_waited_for(
    health: Health, topology: FakeTopology, answers: Answers
) -> None:
    topology.found = {0: B}
    health.failed(A, "refused")
    wait_for(lambda: not health.down())
    assert health.server_of(0) is B
    assert answers.asked == []


def test_two_servers_are_down_apart(health: Health, answers: Answers) -> None:
    health.failed(A, "refused")
    health.failed(B, "silent")
    assert [state.name for state in health.down()] == ["a:1", "b:2"]
    answers.give(None, None)
    wait_for(lambda: not health.down())
    assert sorted(answers.asked) == ["a:1", "b:2"]


def test_a_slot_that_nobody_has_is_looked_for(
    health: Health, topology: FakeTopology
) -> None:
    topology.found = {2: B}
    with pytest.raises(TierUnavailableError, match="no server has slot 2"):
        health.server_of(2)
    wait_for(lambda: 2 in topology.owners)
    assert health.server_of(2) is B
    assert topology.refreshed == [""]


def test_errors_that_say_who_has_what_only_refresh(
    health: Health, topology: FakeTopology
) -> None:
    health.learn(A, Fate.REFUSED, "WRONGTYPE")
    health.learn(A, Fate.OUTDATED, "CLUSTERDOWN")
    wait_for(lambda: topology.refreshed)
    assert health.server_of(0) is A
    assert health.failures == 0
    assert topology.refreshed == [""]


def test_many_outdated_lookups_refresh_once(topology: FakeTopology) -> None:
    now = [0.0]
    health = Health(cast(Topology, topology), monotonic=lambda: now[0])
    health.outdated()
    wait_for(lambda: topology.refreshed)
    for _ in range(1000):
        health.outdated()
    health.close()
    assert topology.refreshed == [""]


def test_a_closed_health_notes_nothing_and_starts_nothing(
    topology: FakeTopology, answers: Answers
) -> None:
    health = Health(cast(Topology, topology))
    health.close()
    health.failed(A, "refused")
    health.outdated()
    health.close()
    assert health.server_of(0) is A
    assert (health.down(), topology.refreshed, answers.asked) == ([], [], [])
