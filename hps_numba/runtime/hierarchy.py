"""One table's way through its tiers, from the fastest to the slowest.

Tiers that answer faster than one can ask what is in flight are asked in the caller's
thread, with the keys as they come. Below them keys are made unique, keys that another
lookup is fetching are waited for, and what is found is backfilled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import TierError
from hps_numba.runtime.backfill import Backfill, BackfillQueue
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.inflight import Flight, InFlight, Part, deliver
from hps_numba.runtime.stats import TableStats
from hps_numba.runtime.table_writer import TableWriter
from hps_numba.runtime.turns import Turns
from hps_numba.tiers.base import Tier
from hps_numba.tiers.model_files import Fingerprint
from hps_numba.types import FailureMode, Keys, Mask, Rows, TableSpec

logger = logging.getLogger(__name__)


class Hierarchy(TableWriter):
    """The tiers of one table.

    Parameters
    ----------
    spec
        The table, open in every tier.
    tiers
        From the fastest to the slowest; the last one is written first.
    backfills
        Queue for rows that an upper tier lacks; None leaves upper tiers as they are.
    on_failure
        Whether a failing tier fails the lookup.
    write_rows
        Most rows of an update that become visible together.
    failures
        Where warnings of failing tiers go; one of its own if None.

    Notes
    -----
    Thread-safe. Writing is ``TableWriter``'s.
    """

    def __init__(
        self,
        spec: TableSpec,
        tiers: Sequence[Tier],
        *,
        backfills: BackfillQueue | None,
        on_failure: FailureMode,
        write_rows: int,
        failures: FailureLog | None = None,
    ) -> None:
        n_local = sum(tier.local for tier in tiers)
        in_flight = InFlight(spec) if n_local < len(tiers) else None
        super().__init__(spec, tiers, in_flight, write_rows)
        self.origin: Fingerprint | None = None  # files in memory, if no tier knows
        self._backfills = backfills
        self._on_failure = on_failure
        self._failures = failures or FailureLog(logger)
        self._local, self._remote = self.tiers[:n_local], self.tiers[n_local:]
        self._turns = Turns(self.tiers)

    def warm_up(self) -> None:
        """Compile what the first lookup would otherwise wait for; counts nothing."""
        key = np.zeros(1, np.int64)
        self.locate(key)
        if self._in_flight is not None:
            self._in_flight.warm_up()

    def ask_local(self, chunk: Chunk) -> None:
        """Resolve what the tiers in this process's memory know."""
        n_keys = chunk.keys.size
        for tier in self._local:
            asked = n_keys - chunk.resolved
            if asked == 0:
                return
            hits = self._ask(tier, chunk, chunk.out, asked, chunk)
            chunk.resolved += hits
            self.counters.add_use(tier.name, asked, hits)

    def ask_remote(self, chunk: Chunk) -> None:
        """Resolve what is left from the other tiers, each unique key once.

        Raises
        ------
        TierError
            If a tier fails and failures are to be raised.
        """
        if self._in_flight is None or chunk.done:
            return
        missing = np.flatnonzero(~chunk.found)
        unique, inverse = self._arranged(chunk.keys[missing])
        parts = self._fetch_unique(self._in_flight, unique, chunk)
        chunk.resolved += deliver(parts, inverse, missing, chunk.out, chunk.found)

    def fetch(self, keys: Keys) -> tuple[Rows, Mask]:
        """Return the rows of unique keys (others unspecified), and which were found.

        Raises
        ------
        TierError
            If a tier fails and failures are to be raised.
        """
        chunk = Chunk(keys, *self._blank(keys.size))
        self.ask_local(chunk)
        self.ask_remote(chunk)
        return chunk.out, chunk.found

    def locate(self, keys: Keys) -> list[str]:
        """Return the name of the first tier that holds each key, or ``default``."""
        out, found = self._blank(keys.size)
        names = np.full(keys.size, "default", dtype=object)
        for tier in self.tiers:
            before = found.copy()
            tier.fetch(self.spec.tag, keys, out, found)
            names[found & ~before] = tier.name
        return [str(name) for name in names]

    def stats(self) -> TableStats:
        """Return the table's counters."""
        tiers = [(tier.name, tier.stats(self.spec.tag)) for tier in self.tiers]
        return self.counters.snapshot(
            self.spec.model, self.spec.name, tiers, [c.use() for c in self.caches]
        )

    def _arranged(self, keys: Keys) -> tuple[Keys, NDArray[np.int64]]:
        """Return the unique keys, and where in them each key is.

        They come in the order in which the first remote tier answers them, so that it
        writes row after row. Restoring the order of the lookup costs nothing on top:
        rows of repeated keys are scattered anyway.
        """
        unique, inverse = np.unique(keys, return_inverse=True)
        order = self._remote[0].arrange(self.spec.tag, unique)
        if order is None:
            return unique, inverse
        ranks = np.empty_like(order)
        ranks[order] = np.arange(order.size)
        return unique[order], ranks[inverse]

    def _fetch_unique(
        self, in_flight: InFlight, keys: Keys, chunk: Chunk
    ) -> list[Part]:
        flight = in_flight.new_flight()
        failed = True
        try:
            boarding = in_flight.board(keys, flight)
            self._fly(flight, chunk)
            failed = False
        finally:
            in_flight.land(flight, failed=failed)
        chunk.degraded |= flight.degraded
        parts: list[Part] = [(boarding.mine, flight.rows, flight.found)]
        for wait in boarding.waits:
            wait.flight.landed.wait()
            if wait.flight.failed:
                own = Flight(0, keys[wait.mine], *self._blank(wait.mine.size))
                self._fly(own, chunk)
                parts.append((wait.mine, own.rows, own.found))
                chunk.degraded |= own.degraded
            else:
                rows, found = wait.flight.rows, wait.flight.found
                parts.append((wait.mine, rows[wait.theirs], found[wait.theirs]))
                chunk.degraded |= wait.flight.degraded
                chunk.joined += wait.mine.size
        return parts

    def _fly(self, flight: Flight, chunk: Chunk) -> None:
        """Fetch the keys of a flight from tier to tier and backfill what was found."""
        tag = self.spec.tag
        # Read before the rows are: see "No resurrection" in tiers.base.
        epochs = [tier.epoch(tag) for tier in self.tiers[:-1]]
        n_found = 0
        for level, tier in enumerate(self._remote, start=len(self._local)):
            asked = flight.keys.size - n_found
            if asked == 0:
                return
            before = flight.found.copy()
            with self._turns.of(tier, chunk):
                hits = self._ask(tier, flight, flight.rows, asked, chunk)
            self._turns.note(tier, asked, hits)
            if level:
                self._wait_for_change(flight.keys)
            n_found += hits
            self.counters.add_use(tier.name, asked, hits)
            if hits and self._backfills is not None:
                new = flight.found & ~before
                keys, rows = flight.keys, flight.rows
                if hits < flight.keys.size:
                    keys, rows = keys[new], rows[new]
                for upper, epoch in zip(self.tiers[:level], epochs, strict=False):
                    self._backfills.put(Backfill(upper, tag, keys, rows, epoch))

    def _ask(
        self,
        tier: Tier,
        part: Chunk | Flight,
        rows: Rows,
        asked: int,
        chunk: Chunk,
    ) -> int:
        """Fetch the ``asked`` keys that are not found yet; return how many it had."""
        tag, watch, done = self.spec.tag, chunk.watch, chunk.turn.pass_on
        begin_s = perf_counter() if watch else 0.0
        try:
            return tier.fetch_and_tell(tag, part.keys, rows, part.found, done)
        except TierError as exc:
            self.counters.add_failure(tier.name)
            if self._on_failure is FailureMode.RAISE:
                raise
            part.degraded = True
            self._failures.report("lookup degraded", self.spec.tag, exc)
            return int(np.count_nonzero(part.found)) - (part.keys.size - asked)
        finally:
            if watch:
                watch(tier.name, begin_s, perf_counter())
