"""Replays the requests in the order of time and checks each row they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hps_numba.demo.checker import Answer, RowChecker, Tally, VersionLedger
from hps_numba.demo.updater import Updater
from hps_numba.demo.workload import Positions, Workload

if TYPE_CHECKING:
    from hps_numba.runtime.hps import HPS

_SAMPLES = 120

Advance = Callable[[int], None]
"""Called with the number of steps that were done since the last call."""


@dataclass(frozen=True)
class RequestRecord:
    """One request: when it began, how long it took, and what it returned."""

    began_s: float
    took_s: float
    n_keys: int
    n_defaults: int


@dataclass(frozen=True)
class SourceSample:
    """Where the rows of all requests up to one came from, counted per occurrence.

    ``upper_hits`` are of the upper tier, the GPU cache or else host memory: those below
    it count each key of a request once.
    """

    request: int
    keys: int
    upper_hits: int
    defaults: int


@dataclass(frozen=True)
class ReplayResult:
    """What a replay measured and checked."""

    requests: tuple[RequestRecord, ...]
    samples: tuple[SourceSample, ...]
    tally: Tally
    began_s: float
    wall_s: float

    @property
    def latencies_s(self) -> NDArray[np.float64]:
        """Seconds of each request."""
        return np.array([request.took_s for request in self.requests])

    @property
    def n_keys(self) -> int:
        """Number of keys that were looked up."""
        return sum(request.n_keys for request in self.requests)


def replay(
    server: HPS,
    workload: Workload,
    *,
    ledgers: Mapping[str, VersionLedger],
    updater: Updater,
    advance: Advance,
) -> ReplayResult:
    """Look up every request of the workload, one after the other.

    Parameters
    ----------
    server
        The server, ready.
    workload
        The requests.
    ledgers
        Per table, what the updater notes.
    updater
        Told before each request how far the replay is.
    advance
        Told after each request.

    Raises
    ------
    HPSError
        If a lookup fails.
    """
    requests: list[RequestRecord] = []
    samples = [_sample(server, workload, 0)]
    every = max(1, workload.n_requests // _SAMPLES)
    lookups = CheckedLookups(server, workload, ledgers)
    began = monotonic()
    for number in range(workload.n_requests):
        share = (number + 1) / workload.n_requests
        request = workload.request(number)
        requests.append(lookups.send(request, partial(updater.advance, share)))
        if (number + 1) % every == 0:
            samples.append(_sample(server, workload, number + 1))
        advance(1)
    wall_s = monotonic() - began
    return ReplayResult(tuple(requests), tuple(samples), lookups.tally(), began, wall_s)


def sweep(
    server: HPS,
    workload: Workload,
    *,
    ledgers: Mapping[str, VersionLedger],
    advance: Advance,
) -> Tally:
    """Look up every id of every table once, and check it."""
    lookups = CheckedLookups(server, workload, ledgers)
    for table in workload.tables:
        positions = np.arange(len(table.ids), dtype=np.int32)
        n_keys = workload.batch * table.positions.shape[1]
        for begin in range(0, len(positions), n_keys):
            part = positions[begin : begin + n_keys]
            lookups.send({table.name: part})
            advance(len(part))
    return lookups.tally()


class CheckedLookups:
    """Lookups of one thread whose rows are all checked.

    Parameters
    ----------
    server
        The server, ready.
    workload
        The model and its tables.
    ledgers
        Per table, what the updater notes.
    """

    def __init__(
        self, server: HPS, workload: Workload, ledgers: Mapping[str, VersionLedger]
    ) -> None:
        self._session = server.session(workload.model)
        self._tables = {table.name: table for table in workload.tables}
        self._checkers = {
            name: RowChecker(table, ledgers[name])
            for name, table in self._tables.items()
        }

    def send(
        self,
        request: Mapping[str, Positions],
        on_begin: Callable[[], None] | None = None,
    ) -> RequestRecord:
        """Send one request, and check its rows after the clock has stopped.

        ``on_begin`` is called right before the lookup begins.
        """
        keys = {name: self._tables[name].ids[asked] for name, asked in request.items()}
        found = {name: np.zeros(asked.shape, np.bool_) for name, asked in keys.items()}
        oldest = {name: self._checkers[name].oldest(request[name]) for name in request}
        if on_begin is not None:
            on_begin()
        began = monotonic()
        rows = self._session.lookup(keys, found=found)
        took_s = monotonic() - began
        for name, asked in request.items():
            answer = Answer.of(asked, rows[name], found[name])
            self._checkers[name].check(answer, oldest[name])
        n_keys = sum(asked.size for asked in request.values())
        n_found = sum(int(np.count_nonzero(marks)) for marks in found.values())
        return RequestRecord(began, took_s, n_keys, n_keys - n_found)

    def tally(self) -> Tally:
        """Return what was checked so far, over all tables."""
        total = Tally()
        for checker in self._checkers.values():
            total.add(checker.tally)
        return total


def _sample(server: HPS, workload: Workload, request: int) -> SourceSample:
    """Read the server's counters."""
    stats = server.stats()
    tables = [stats.table(workload.model, table.name) for table in workload.tables]
    return SourceSample(
        request=request,
        keys=sum(table.keys for table in tables),
        upper_hits=sum(table.tiers[0].hits for table in tables),
        defaults=sum(table.defaults for table in tables),
    )
