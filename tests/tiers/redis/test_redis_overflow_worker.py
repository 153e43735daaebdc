"""The background of overflow handling: bounded, and never in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.client import RedisOptions, connect
from hps_numba.tiers.redis.evicting import Answer, Evicted, Evictor, victims_of
from hps_numba.tiers.redis.exchange import Exchange
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.layout import Layout
from hps_numba.tiers.redis.overflow import OverflowStats, OverflowWorker
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.topology import Topology
from hps_numba.types import OverflowPolicy, TableSpec
from tests.support.redis_servers import RedisServer

MARGIN, GOAL = 10_000, 8_000
PATIENCE_S = 20
VICTIMS = 410  # a fifth of a sample, as the target asks for


def table_of(
    name: str = "table", policy: OverflowPolicy = OverflowPolicy.EVICT_OLDEST
) -> RedisTable:
    layout = Layout(TableSpec("model", name, dim=4), RedisLayout.HASHES, 4)
    return RedisTable(layout, [0] * 4, [[b"1", b""]] * 4, Overflow(policy, MARGIN, 0.8))


class FakeEvictor(Evictor):
    """Partitions in memory; holds the background back while ``gate`` is closed."""

    def __init__(self, rows: dict[int, int] | None = None) -> None:
        self.rows = dict(rows or {})
        self.noted: list[tuple[str, list[int], list[int]]] = []
        self.steps: list[tuple[bool, list[int]]] = []  # in the background; partitions
        self.aged: dict[int, int] = {}
        self.failing: dict[int, list[Answer]] = {}
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered, self.has_noted = threading.Event(), threading.Event()

    def _wait(self) -> None:
        if threading.current_thread().name == "hps-redis-overflow":
            self.entered.set()
            assert self.gate.wait(PATIENCE_S)
            if self.error is not None:
                raise self.error

    def evict(self, table: RedisTable, partitions: Iterable[int]) -> list[Answer]:
        background = threading.current_thread().name == "hps-redis-overflow"
        self.steps.append((background, list(partitions)))
        self._wait()
        return [self._evict(p) for p in partitions]

    def _evict(self, p: int) -> Answer:
        if self.failing.get(p):
            return self.failing[p].pop()
        removed = max(min(self.rows[p] - GOAL, VICTIMS), 0)
        self.rows[p] -= removed
        return Answer(p, Evicted(removed, self.rows[p]))

    def age(self, table: RedisTable, cursors: dict[int, bytes]) -> list[Answer]:
        self._wait()
        for p, cursor in cursors.items():
            self.aged[p] = int(cursor) + 1
        return [Answer(p, b"%d" % (self.aged[p] % 3)) for p in cursors]

    def note(self, table: RedisTable, keys: np.ndarray, counts: np.ndarray) -> int:
        self._wait()
        self.noted.append((table.spec.name, keys.tolist(), counts.tolist()))
        self.has_noted.set()
        return 0


@pytest.fixture
def evictor() -> FakeEvictor:
    return FakeEvictor()


@pytest.fixture
def worker(evictor: FakeEvictor) -> Iterator[OverflowWorker]:
    with closing(OverflowWorker(evictor, max_uses=6)) as worker:
        yield worker
        evictor.gate.set()


@pytest.mark.parametrize(
    ("policy", "target", "victims"),
    [
        (OverflowPolicy.EVICT_OLDEST, 0.8, VICTIMS),
        (OverflowPolicy.EVICT_LEAST_USED, 0.8, VICTIMS),
        (OverflowPolicy.EVICT_OLDEST, 0.1, 512),
        (OverflowPolicy.EVICT_OLDEST, 1.0, 128),
        (OverflowPolicy.EVICT_RANDOM, 1.0, 512),
    ],
)
def test_steps_are_large_enough_to_end_and_small_enough_to_choose(
    policy, target, victims
):
    table = table_of(policy=policy)
    table.overflow = Overflow(policy, MARGIN, target)
    assert victims_of(table) == victims


def test_an_insert_waits_for_the_margin_and_no_longer(worker, evictor):
    evictor.rows = {0: MARGIN + 2 * VICTIMS - 1, 1: MARGIN + 1}
    evictor.gate.clear()
    worker.relieve(table_of(), {0: 2 * VICTIMS - 1, 1: 1})
    waited = [partitions for background, partitions in evictor.steps if not background]
    assert waited == [[0, 1], [0]]
    assert max(evictor.rows.values()) <= MARGIN
    evictor.gate.set()
    worker.drain()
    assert evictor.rows == {0: GOAL, 1: GOAL}


def test_an_insert_does_not_pay_for_rows_that_others_brought(worker, evictor):
    evictor.rows = {0: 10 * MARGIN, 1: 10 * MARGIN}
    evictor.gate.clear()
    worker.relieve(table_of(), {0: VICTIMS + 1, 1: 0})
    waited = [partitions for background, partitions in evictor.steps if not background]
    assert waited == [[0, 1], [0]]
    assert worker.stats().queued_partitions + evictor.entered.is_set() >= 1
    evictor.gate.set()
    worker.drain()
    assert evictor.rows == {0: GOAL, 1: GOAL}


def test_an_insert_does_not_wait_for_the_target(worker, evictor):
    evictor.rows = {0: MARGIN + VICTIMS}
    evictor.gate.clear()
    worker.relieve(table_of(), {0: 5 * VICTIMS})
    assert [
        partitions for background, partitions in evictor.steps if not background
    ] == [[0]]


def test_a_partition_waits_at_most_once(worker, evictor):
    evictor.gate.clear()
    worker.note(table_of(), np.array([1]))
    assert evictor.entered.wait(PATIENCE_S)  # busy from now on
    for name in ("table", "other"):
        table = table_of(name)
        for _ in range(5):
            evictor.rows = {0: 2 * MARGIN, 1: 2 * MARGIN}
            worker.relieve(table, {0: 1, 1: 1})
    assert worker.stats().queued_partitions == 4


def test_uses_wait_without_delaying_anybody_and_are_noted_at_once(worker, evictor):
    table, other = table_of(), table_of("other")
    evictor.gate.clear()
    worker.note(table, np.array([9]))
    assert evictor.entered.wait(PATIENCE_S)
    worker.note(table, np.array([1, 2]))
    worker.note(other, np.array([3]))
    worker.note(table, np.array([2, 4, 1]))
    worker.note(table, np.array([7]))  # one more than there is room for
    assert worker.stats() == OverflowStats(0, 6, 0, 1)
    evictor.gate.set()
    worker.drain()
    assert evictor.noted == [
        ("table", [9], [1]),
        ("table", [1, 2, 4], [2, 2, 1]),
        ("other", [3], [1]),
    ]
    worker.note(table, np.arange(6))
    worker.drain()
    assert worker.stats() == OverflowStats(0, 0, 0, 1)


def test_a_partition_of_a_dead_server_is_left_out_and_counted(worker, evictor):
    evictor.rows = {0: MARGIN + 1, 1: MARGIN + 1}
    evictor.failing = {1: [Answer(1, None)]}
    worker.relieve(table_of(), {0: 1, 1: 1})
    worker.drain()
    assert evictor.rows == {0: GOAL, 1: MARGIN + 1}
    assert worker.stats().dropped_partitions == 1


def test_a_partition_on_its_way_is_tried_again_after_a_pause():
    now_s = [0.0]
    evictor = FakeEvictor({0: MARGIN + 1})
    evictor.failing = {0: [Answer(0, None, again=True)]}
    with closing(OverflowWorker(evictor, monotonic=lambda: now_s[0])) as worker:
        table = table_of()
        worker.relieve(table, {0: 1})
        worker.note(table, np.array([1]))
        assert evictor.has_noted.wait(PATIENCE_S)
        evictor.has_noted.clear()
        worker.note(table, np.array([1]))
        assert evictor.has_noted.wait(PATIENCE_S)  # after a round with nothing due
        assert worker.stats().queued_partitions == 1
        assert len(evictor.steps) == 1
        now_s[0] = 10.0
        worker.note(table, np.array([1]))
        worker.drain()
        assert evictor.rows == {0: GOAL}


def test_numbers_of_uses_are_aged_once_the_target_is_reached(worker, evictor):
    evictor.rows = {0: MARGIN + 1, 1: MARGIN + 1}
    worker.relieve(table_of(policy=OverflowPolicy.EVICT_LEAST_USED), {0: 1, 1: 1})
    worker.drain()
    assert evictor.aged == {0: 3, 1: 3}  # three calls each, until the cursor is 0


def test_a_partition_that_is_full_again_is_relieved_before_it_is_aged(worker, evictor):
    table = table_of(policy=OverflowPolicy.EVICT_LEAST_USED)
    evictor.gate.clear()
    worker.note(table, np.array([1]))
    assert evictor.entered.wait(PATIENCE_S)
    evictor.rows = {0: GOAL + 1}
    worker.relieve(table, {0: 1})  # so that it waits to be aged
    evictor.rows = {0: 2 * MARGIN}
    worker.relieve(table, {0: 1})
    assert worker.stats().queued_partitions == 1
    evictor.gate.set()
    worker.drain()
    assert evictor.rows == {0: GOAL}
    assert evictor.aged == {0: 3}


def test_who_did_not_come_to_the_target_does_not_age(worker, evictor):
    evictor.rows = {0: GOAL}  # another server was faster
    worker.relieve(table_of(policy=OverflowPolicy.EVICT_LEAST_USED), {0: 1})
    worker.drain()
    assert evictor.aged == {}


@pytest.mark.parametrize(
    "policy", [OverflowPolicy.EVICT_OLDEST, OverflowPolicy.EVICT_RANDOM]
)
def test_times_are_not_aged(worker, evictor, policy):
    evictor.rows = {0: MARGIN + 1}
    worker.relieve(table_of(policy=policy), {0: 1})
    worker.drain()
    assert evictor.rows == {0: GOAL}
    assert evictor.aged == {}


def test_a_table_that_is_dropped_leaves_nothing_to_do(worker, evictor):
    table, other = table_of(), table_of("other")
    evictor.gate.clear()
    worker.note(other, np.array([9]))
    assert evictor.entered.wait(PATIENCE_S)
    evictor.rows = {0: 2 * MARGIN}
    worker.relieve(table, {0: 1})
    worker.note(table, np.array([1, 2]))
    worker.note(other, np.array([3]))
    worker.forget(table.spec.tag)
    assert worker.stats() == OverflowStats(0, 1, 0, 0)
    evictor.gate.set()
    worker.drain()
    assert [name for name, _, _ in evictor.noted] == ["other", "other"]
    assert evictor.rows[0] > GOAL


def test_what_killed_the_background_is_told_to_all(worker, evictor, caplog):
    evictor.error = ValueError("planted")
    worker.note(table_of(), np.array([1]))
    for call in (
        worker.drain,
        lambda: worker.note(table_of(), np.array([1])),
    ):
        with pytest.raises(RuntimeError, match="overflow thread died") as caught:
            call()
        assert caught.value.__cause__ is evictor.error
    assert "overflow thread died" in caplog.text


def test_closing_does_not_wait_for_what_is_queued(evictor):
    worker = OverflowWorker(evictor)
    evictor.gate.clear()
    table = table_of()
    worker.note(table, np.array([1]))
    assert evictor.entered.wait(PATIENCE_S)
    evictor.rows = dict.fromkeys(range(4), 100 * MARGIN)
    worker.relieve(table, dict.fromkeys(range(4), 1))
    closer = threading.Thread(target=worker.close)
    closer.start()
    evictor.gate.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert worker.stats().queued_partitions > 0
    worker.drain()
    worker.close()


def test_steps_of_a_dead_server_fail_for_good():
    table = table_of()
    with RedisServer() as server:
        topology = Topology(connect(RedisOptions(server.address, timeout_s=1.0)))
        health = Health(topology)
        exchange = Exchange(health, n_replicas=0, timeout_s=1.0)
        evictor = Evictor(topology, health, exchange)
        try:
            keys, counts = np.arange(5), np.ones(5, np.int64)
            assert evictor.evict(table, [0]) == [Answer(0, Evicted(0, 0))]
            assert evictor.note(table, keys, counts) == 0
            server.kill()
            answers = [evictor.evict(table, [0, 1]) for _ in range(3)]
            assert answers[-1] == [Answer(0, None), Answer(1, None)]
            assert evictor.age(table, {2: b"0"}) == [Answer(2, None)]
            assert evictor.note(table, keys, counts) == 5
            assert [node.name for node in health.down()] == [server.address]
        finally:
            health.close()
            topology.close()
