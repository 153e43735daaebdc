"""The search for orders finds all of them, and what waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import comb

import pytest

from tests.support.gates import Scheduler, SteppedEvent, SteppedLock
from tests.support.orders import Footprint, explore


class Counter:
    """Two tasks that raise a number, reading it first and writing it later."""

    def __init__(self, threads: ThreadPoolExecutor, lock: bool = False) -> None:
        self.scheduler = Scheduler(threads)
        self.value = 0
        self._lock = SteppedLock(self.scheduler, "lock") if lock else None
        for name in ("a", "b"):
            self.scheduler.spawn(name, self._raise, label="begin")

    def check(self) -> str | None:
        return None if self.value == 2 else f"the value is {self.value}"

    def _raise(self) -> None:
        if self._lock is None:
            self._read_and_write()
            return
        with self._lock:
            self._read_and_write()

    def _read_and_write(self) -> None:
        self.scheduler.point("read")
        value = self.value
        self.scheduler.point("write")
        self.value = value + 1


def footprint(label: str) -> Footprint:
    return {
        "read": Footprint(reads=frozenset({"value"})),
        "write": Footprint(writes=frozenset({"value"})),
        "lock": Footprint(writes=frozenset({"lock"})),
    }.get(label, Footprint())


def everything_conflicts(label: str) -> Footprint:
    return Footprint(writes=frozenset({"all"}))


def nothing_conflicts(label: str) -> Footprint:
    return Footprint()


@pytest.mark.parametrize(
    ("of", "reduce", "orders"),
    [
        pytest.param(nothing_conflicts, True, 1, id="all commute"),
        pytest.param(everything_conflicts, True, comb(6, 3), id="none commute"),
        pytest.param(nothing_conflicts, False, comb(6, 3), id="all orders"),
        # Of two reads and two writes, two orders are equal if the reads change places.
        pytest.param(footprint, True, 4, id="reads commute"),
    ],
)
def test_orders_are_counted_right(
    of: Callable[[str], Footprint],
    reduce: bool,
    orders: int,
    threads: ThreadPoolExecutor,
) -> None:
    seen = explore(lambda: Counter(threads), of, reduce=reduce)
    assert seen.schedules == orders
    assert seen.cut_short == 0


def test_a_lost_update_is_found(threads: ThreadPoolExecutor) -> None:
    seen = explore(lambda: Counter(threads), footprint)
    assert {v.reason for v in seen.violations} == {"the value is 1"}
    assert len(seen.violations) == 2  # either write may be the last


def test_a_lock_prevents_it(threads: ThreadPoolExecutor) -> None:
    seen = explore(lambda: Counter(threads, lock=True), footprint)
    assert seen.schedules == 2
    assert seen.violations == []


def test_tasks_that_wait_for_each_other_are_found(threads: ThreadPoolExecutor) -> None:
    class Deadlock:
        def __init__(self) -> None:
            self.scheduler = Scheduler(threads)
            locks = [SteppedLock(self.scheduler, f"lock {i}") for i in range(2)]
            for name, (first, second) in {"a": locks, "b": locks[::-1]}.items():
                self.scheduler.spawn(
                    name, lambda x=first, y=second: self._lock(x, y), label="begin"
                )

        def check(self) -> str | None:
            return None

        def _lock(self, first: SteppedLock, second: SteppedLock) -> None:
            with first, second:
                pass

    def both(label: str) -> Footprint:
        return Footprint(writes=frozenset({label} - {"begin"}))

    with pytest.raises(AssertionError, match="all tasks wait"):
        explore(Deadlock, both)


def test_an_event_is_waited_for(threads: ThreadPoolExecutor) -> None:
    class Waiting:
        def __init__(self) -> None:
            self.scheduler = Scheduler(threads)
            self._event = SteppedEvent(self.scheduler, "wait")
            self._seen: list[str] = []
            self.scheduler.spawn("waits", self._wait, label="begin")
            self.scheduler.spawn("sets", self._set, label="set")

        def check(self) -> str | None:
            return None if self._seen == ["set", "waited"] else str(self._seen)

        def _wait(self) -> None:
            self._event.wait()
            self._seen.append("waited")

        def _set(self) -> None:
            self._seen.append("set")
            self._event.set()

    seen = explore(Waiting, nothing_conflicts)
    assert seen.schedules == 1
    assert seen.violations == []


def test_what_a_task_raises_comes_out(threads: ThreadPoolExecutor) -> None:
    class Raising:
        def __init__(self) -> None:
            self.scheduler = Scheduler(threads)
            self.scheduler.spawn("a", self._fail, label="begin")

        def check(self) -> str | None:
            return None

        def _fail(self) -> None:
            raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        explore(Raising, nothing_conflicts)
