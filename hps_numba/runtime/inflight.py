"""Which keys are being fetched now, so that none is fetched twice at once.

Invariant: an entry of the register names the flight that fetches its key, and that
flight began after the last write to the key that was acknowledged. A writer therefore
takes the entries of its keys out before it acknowledges; the flight goes on for those
who boarded.

The register is a host table whose 16-byte rows are (flight number, position in it).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.host.scatter import scatter_rows
from hps_numba.tiers.host import HostTier
from hps_numba.types import Keys, Mask, Rows, TableSpec

_ENTRY_DIM = 4  # float32 values: two int64 words
_REGISTER = TableSpec("runtime", "in_flight", _ENTRY_DIM)


@dataclass
class Flight:
    """One fetch from the lower tiers. ``rows`` and ``found`` are valid once landed."""

    number: int
    keys: Keys
    rows: Rows
    found: Mask
    landed: threading.Event = field(default_factory=threading.Event)
    failed: bool = False
    degraded: bool = False  # a tier failed, and its rows may be missing


@dataclass(frozen=True)
class Wait:
    """Keys of one caller that another caller's flight brings."""

    flight: Flight
    mine: NDArray[np.int64]  # positions in the caller's keys
    theirs: NDArray[np.int64]  # positions in the flight


@dataclass(frozen=True)
class Boarding:
    """Who fetches what: ``flight`` is the caller's own, with the keys at ``mine``."""

    flight: Flight
    mine: NDArray[np.int64]
    waits: tuple[Wait, ...]


Part = tuple[NDArray[np.int64], Rows, Mask]
"""Positions among unique keys, their rows, and which of these there are."""


def deliver(
    parts: Sequence[Part],
    inverse: NDArray[np.int64],
    targets: NDArray[np.int64],
    out: Rows,
    found: Mask,
) -> int:
    """Copy rows of unique keys to all places where they are wanted; count these.

    Parameters
    ----------
    parts
        Each unique key is in one of them.
    inverse, targets
        Of each place: the position of its key among the unique ones, and its row.
    out, found
        Rows that are written, and marked if there was one.
    """
    n = 0
    for positions, rows, there in parts:
        sources, wanted = inverse, targets
        if len(parts) > 1:
            place = np.full(sum(p.size for p, _, _ in parts), -1)
            place[positions] = np.arange(positions.size)
            sources = place[inverse]
            mine = sources >= 0
            sources, wanted = sources[mine], targets[mine]
        as_bytes = rows.view(np.uint8)
        n += scatter_rows(as_bytes, there, sources, wanted, out.view(np.uint8), found)
    return n


class InFlight:
    """The register of one table. Thread-safe.

    Parameters
    ----------
    spec
        The table, for the shape of rows.
    """

    def __init__(self, spec: TableSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._register = HostTier(num_partitions=1)  # guarded by _lock
        self._register.open_table(_REGISTER)
        self._flights: dict[int, Flight] = {}  # guarded by _lock
        self._numbers = count(1)

    def warm_up(self) -> None:
        """Compile what the first flight would otherwise wait for."""
        flight = self.board(np.zeros(1, np.int64)).flight
        self.land(flight, failed=True)
        rows, nowhere = flight.rows.view(np.uint8), np.zeros(0, np.int64)
        scatter_rows(rows, flight.found, nowhere, nowhere, rows, flight.found)

    def new_flight(self) -> Flight:
        """Return a flight without keys, to be boarded and, in any case, landed."""
        none = np.zeros(0, np.int64)
        rows = np.empty((0, self._spec.dim), self._spec.numpy_dtype)
        return Flight(next(self._numbers), none, rows, np.zeros(0, np.bool_))

    def board(self, keys: Keys, flight: Flight | None = None) -> Boarding:
        """Register unique keys; those that are on their way become waits.

        The caller fetches the keys of its own flight and calls ``land``, whatever
        happens, before it waits for others: so nobody waits for a flight that waits.
        """
        flight = flight or self.new_flight()
        with self._lock:
            entries, known = self._entries_locked(keys)
            waits = []
            for number in np.unique(entries[known, 0]).tolist():
                mine, theirs = _members(entries, known, number)
                other = self._flights.get(number)
                if other is None or other.landed.is_set():
                    known[mine] = False  # left by a caller that was interrupted
                else:
                    waits.append(Wait(other, mine, theirs))
            mine = np.flatnonzero(~known)
            self._take_off_locked(flight, keys[mine])
        return Boarding(flight, mine, tuple(waits))

    def land(self, flight: Flight, *, failed: bool = False) -> None:
        """Let those who wait go on, and take the flight off the register."""
        flight.failed = failed
        try:
            with self._lock:
                entries, known = self._entries_locked(flight.keys)
                still = known & (entries[:, 0] == flight.number)
                self._register.evict(_REGISTER.tag, flight.keys[still])
                self._flights.pop(flight.number, None)
        finally:
            flight.landed.set()

    def invalidate(self, keys: Keys | None) -> None:
        """Let nobody else board the present flights of these keys (of all, if None)."""
        with self._lock:
            if self._flights:
                self._register.evict(_REGISTER.tag, keys)

    def _take_off_locked(self, flight: Flight, keys: Keys) -> None:
        n = keys.size
        flight.rows = np.empty((n, self._spec.dim), self._spec.numpy_dtype)
        flight.found = np.zeros(n, np.bool_)
        flight.keys = keys
        self._flights[flight.number] = flight
        entries = np.empty((n, 2), np.int64)
        entries[:, 0] = flight.number
        entries[:, 1] = np.arange(n)
        self._register.insert(_REGISTER.tag, keys, entries.view(np.float32))

    def _entries_locked(self, keys: Keys) -> tuple[NDArray[np.int64], Mask]:
        entries = np.zeros((keys.size, 2), np.int64)
        known = np.zeros(keys.size, np.bool_)
        if self._flights:
            self._register.fetch(_REGISTER.tag, keys, entries.view(np.float32), known)
        return entries, known


def _members(
    entries: NDArray[np.int64], known: Mask, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    mine = np.flatnonzero(known & (entries[:, 0] == number))
    return mine, entries[mine, 1]
