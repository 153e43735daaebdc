from __future__ import annotations

import numpy as np
import pytest

from hps_numba.runtime.inflight import _REGISTER, Boarding, InFlight, Part, deliver
from hps_numba.types import Keys, TableSpec

SPEC = TableSpec("model", "table", 4)
EXTREMES = [0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max]


@pytest.fixture
def register() -> InFlight:
    return InFlight(SPEC)


def keys_of(*values: int) -> Keys:
    return np.array(values, np.int64)


def left_in(register: InFlight) -> int:
    return len(register._flights) + register._register.size(_REGISTER.tag)


def bring(boarding: Boarding) -> None:
    """Do the flight's fetch: each row holds its key."""
    boarding.flight.rows[:] = boarding.flight.keys[:, None]
    boarding.flight.found[:] = True


def test_the_first_to_ask_fetches_all_keys(register: InFlight) -> None:
    boarding = register.board(keys_of(5, 7, *EXTREMES))
    assert boarding.flight.keys.tolist() == [5, 7, *EXTREMES]
    assert boarding.mine.tolist() == list(range(6))
    assert boarding.waits == ()
    assert boarding.flight.rows.shape == (6, 4)
    assert boarding.flight.rows.dtype == np.float32
    assert not boarding.flight.found.any()


def test_keys_on_their_way_become_waits(register: InFlight) -> None:
    first = register.board(keys_of(1, 2, 3))
    second = register.board(keys_of(4, 5))
    third = register.board(keys_of(5, 9, 3, 1))
    assert third.flight.keys.tolist() == [9]
    assert third.mine.tolist() == [1]
    waits = {wait.flight.number: wait for wait in third.waits}
    assert set(waits) == {first.flight.number, second.flight.number}
    assert waits[first.flight.number].mine.tolist() == [2, 3]
    assert waits[first.flight.number].theirs.tolist() == [2, 0]
    assert waits[second.flight.number].mine.tolist() == [0]
    assert waits[second.flight.number].theirs.tolist() == [1]


def test_every_int64_can_be_in_flight(register: InFlight) -> None:
    first = register.board(keys_of(*EXTREMES))
    second = register.board(keys_of(*EXTREMES[::-1]))
    assert second.flight.keys.size == 0
    assert second.waits[0].theirs.tolist() == [3, 2, 1, 0]
    register.land(second.flight)
    register.land(first.flight)
    assert left_in(register) == 0


def test_a_landed_flight_gives_its_rows_and_is_forgotten(register: InFlight) -> None:
    first = register.board(keys_of(1, 2))
    second = register.board(keys_of(2))
    assert not first.flight.landed.is_set()
    bring(first)
    register.land(first.flight)
    (wait,) = second.waits
    assert wait.flight.landed.is_set()
    assert not wait.flight.failed
    assert wait.flight.rows[wait.theirs].tolist() == [[2.0] * 4]
    assert register.board(keys_of(1, 2)).waits == ()


def test_a_failed_flight_tells_those_who_wait(register: InFlight) -> None:
    first = register.board(keys_of(1))
    (wait,) = register.board(keys_of(1)).waits
    register.land(first.flight, failed=True)
    assert wait.flight.landed.is_set()
    assert wait.flight.failed


def test_invalidated_keys_are_fetched_again(register: InFlight) -> None:
    first = register.board(keys_of(1, 2))
    register.invalidate(keys_of(2, 3))
    second = register.board(keys_of(1, 2))
    assert second.flight.keys.tolist() == [2]
    (wait,) = second.waits
    assert (wait.mine.tolist(), wait.theirs.tolist()) == ([0], [0])
    assert wait.flight is first.flight


def test_invalidating_everything_leaves_nobody_to_join(register: InFlight) -> None:
    register.board(keys_of(1, 2))
    register.invalidate(None)
    assert register.board(keys_of(1, 2)).waits == ()


def test_an_old_flight_does_not_take_a_new_one_off_the_register(
    register: InFlight,
) -> None:
    old = register.board(keys_of(1))
    register.invalidate(keys_of(1))
    new = register.board(keys_of(1))
    register.land(old.flight)
    assert register.board(keys_of(1)).waits[0].flight is new.flight


def test_a_flight_of_no_keys_lands(register: InFlight) -> None:
    boarding = register.board(keys_of())
    register.land(boarding.flight)
    assert boarding.flight.landed.is_set()
    assert left_in(register) == 0


def test_nothing_is_left_on_the_register(register: InFlight) -> None:
    rng = np.random.default_rng(3)
    flying = []
    for turn in range(300):
        keys = np.unique(rng.integers(-40, 40, size=12))
        flying.append(register.board(keys).flight)
        if turn % 7 == 0:
            register.invalidate(np.unique(rng.integers(-40, 40, size=5)))
        if turn % 50 == 49:
            register.invalidate(None)
        while len(flying) > 5:
            flight = flying.pop(int(rng.integers(len(flying))))
            register.land(flight, failed=bool(rng.integers(2)))
    for flight in flying:
        register.land(flight)
    assert left_in(register) == 0


def test_an_interrupted_boarding_leaves_nothing_behind(
    register: InFlight, monkeypatch: pytest.MonkeyPatch
) -> None:
    flight = register.new_flight()
    with monkeypatch.context() as patch:
        patch.setattr(register._register, "insert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            register.board(keys_of(1, 2), flight)
    register.land(flight, failed=True)
    assert left_in(register) == 0
    assert register.board(keys_of(1, 2)).waits == ()


def test_an_interrupted_landing_keeps_nobody_waiting(
    register: InFlight, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register.board(keys_of(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(register._register, "evict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            register.land(first.flight, failed=True)
    assert first.flight.landed.is_set()
    second = register.board(keys_of(2, 3))
    assert second.waits == ()
    assert second.flight.keys.tolist() == [2, 3]


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_rows_of_several_flights_are_delivered_wherever_they_are_wanted() -> None:
    """Of unique keys 0 to 4, the rows of 1 and 3 come apart; 3 is nowhere."""
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    parts: list[Part] = [
        (np.array([0, 2, 4]), rows[[0, 2, 4]], np.array([True, True, True])),
        (np.array([1, 3]), rows[[1, 3]], np.array([True, False])),
    ]
    inverse, targets = np.array([4, 1, 1, 3, 0]), np.array([6, 0, 2, 3, 5])
    out, found = np.full((7, 2), -1, np.float32), np.zeros(7, np.bool_)
    assert deliver(parts, inverse, targets, out, found) == 4
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 2, 5, 6])
    np.testing.assert_array_equal(out[[6, 0, 2, 5]], rows[[4, 1, 1, 0]])
    assert (out[[1, 3, 4]] == -1).all()
