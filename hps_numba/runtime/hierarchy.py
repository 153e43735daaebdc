"""One table's way through its tiers, from the fastest to the slowest.

Tiers that answer faster than one can ask what is in flight are asked in the caller's
thread, with the keys as they come. Below them keys are made unique, keys that another
lookup is fetching are waited for, and what is found is backfilled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import CacheError, DeviceError, TierError, UpdateError
from hps_numba.runtime.backfill import Backfill, BackfillQueue
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.inflight import Flight, InFlight, Part, deliver
from hps_numba.runtime.stats import TableCounters, TableStats
from hps_numba.runtime.turns import Turns
from hps_numba.runtime.upper import UpperCache, evict_in_any_case, replace_rows
from hps_numba.tiers.base import Tier
from hps_numba.tiers.model_files import Fingerprint
from hps_numba.types import FailureMode, Keys, Mask, Rows, TableSpec

logger = logging.getLogger(__name__)


class Hierarchy:
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
    Thread-safe. *No resurrection:* an update holds its keys in every upper tier and
    evicts them there, writes upwards, and takes them off the in-flight register after
    each tier; caches above the tiers come last. So a row read before the update can
    neither be backfilled nor be handed to a lookup that begins after the update was
    acknowledged; and once one lookup below the caches returned the new row, none that
    begins later returns an old one.
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
        self.spec = spec
        self.tiers = tuple(tiers)
        self.counters = TableCounters(tier.name for tier in tiers)
        self.origin: Fingerprint | None = None  # files in memory, if no tier knows
        self.caches: tuple[UpperCache, ...] = ()  # above the tiers, one a device
        self._backfills = backfills
        self._on_failure = on_failure
        self._write_rows = write_rows
        self._failures = failures or FailureLog(logger)
        n_local = sum(tier.local for tier in tiers)
        self._local, self._remote = self.tiers[:n_local], self.tiers[n_local:]
        self._in_flight = InFlight(spec) if self._remote else None
        self._turns = Turns(self.tiers)
        self._write_lock = threading.Lock()  # one update at a time, in all tiers

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

    def update(self, keys: Keys, rows: Rows) -> None:
        """Write the newest rows of unique keys to all tiers, the last one first.

        Raises
        ------
        UpdateError
            If a tier refused; the message says how many rows were applied before.
        """
        finite = np.isfinite(rows).all(axis=1)
        self._write(keys, rows)
        self.counters.add(
            updated_rows=keys.size,
            non_finite_rows=keys.size - int(np.count_nonzero(finite)),
        )

    def delete(self, keys: Keys) -> None:
        """Remove unique keys from all tiers; raises as ``update``."""
        self._write(keys, None)
        self.counters.add(deleted_keys=keys.size)

    def replacing(self) -> ExitStack:
        """Return a context in which all rows may be replaced, tier by tier.

        ``forget_flights`` is to be called whenever a tier has its new rows. Caches are
        empty when the context ends.
        """
        with ExitStack() as stack:
            stack.enter_context(self._write_lock)
            for cache in self.caches:
                stack.callback(cache.clear)
            for tier in self.tiers[:-1]:
                stack.enter_context(tier.hold(self.spec.tag))
            self.forget_flights()
            return stack.pop_all()

    def forget_flights(self) -> None:
        """Let no lookup join a fetch that is under way now."""
        if self._in_flight is not None:
            self._in_flight.invalidate(None)

    def refresh(self, block_rows: int) -> int:
        """Read every row that an upper tier holds again from the last tier.

        What is gone there is evicted. Returns the number of rows that were read.
        """
        self._refuse_earlier_reads()
        last, tag = self.tiers[-1], self.spec.tag
        refreshed = 0
        for tier in self.tiers[:-1]:
            blocks = tier.iterate(tag, block_rows=block_rows)
            while (block := next(blocks, None)) is not None:
                epoch = tier.epoch(tag)
                rows, found = np.empty_like(block.rows), np.zeros(len(block), np.bool_)
                last.fetch(tag, block.keys, rows, found)
                refreshed += tier.backfill(tag, block.keys[found], rows[found], epoch)
                tier.evict(tag, block.keys[~found])
        return refreshed

    def _refuse_earlier_reads(self) -> None:
        """Let no row be backfilled or joined that was read before now."""
        with self._write_lock:
            for tier in self.tiers[:-1]:
                with tier.hold(self.spec.tag):
                    pass  # its end refuses what began before
            self.forget_flights()

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

    def refresh_keys(self, keys: Keys) -> int:
        """Read the rows of unique keys again where upper tiers or caches hold them.

        Returns how many rows were replaced in caches.
        """
        with self._write_lock, ExitStack() as holds:
            for tier in self.tiers[:-1]:
                holds.enter_context(tier.hold(self.spec.tag, keys))
                tier.evict(self.spec.tag, keys)
            if self._in_flight is not None:
                self._in_flight.invalidate(keys)
            rows, found = self.read(keys)
            return sum(replace_rows(cache, keys, rows, found) for cache in self.caches)

    def refresh_sets(self, cache: UpperCache, first_set: int, n_sets: int) -> int:
        """Read the rows that a part of a cache holds again from the tiers.

        What is gone there is evicted. Returns how many rows were replaced.
        """
        # As a writer: no update comes between the reading and the replacing.
        with self._write_lock:
            keys = cache.keys_of(first_set, n_sets)
            return replace_rows(cache, keys, *self.read(keys))

    def read(self, keys: Keys) -> tuple[Rows, Mask]:
        """Return the rows of unique keys, and which were found; counts nothing.

        Raises
        ------
        TierError
            If a tier fails.
        """
        rows, found = self._blank(keys.size)
        for tier in self.tiers:
            tier.fetch(self.spec.tag, keys, rows, found)
        return rows, found

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

    def _write(self, keys: Keys, rows: Rows | None) -> None:
        step = self._write_rows
        with self._write_lock:
            for low in range(0, keys.size, step):
                part = slice(low, low + step)
                try:
                    self._write_part(keys[part], None if rows is None else rows[part])
                except (TierError, CacheError, DeviceError) as exc:
                    raise UpdateError(
                        f"table {self.spec.tag}: {low} of {keys.size} keys were "
                        f"written, then {exc}; send the rest when the tier is back"
                    ) from exc

    def _write_part(self, keys: Keys, rows: Rows | None) -> None:
        tag = self.spec.tag
        with ExitStack() as stack:
            for cache in self.caches:
                # Taken off once all is written: lookups must not stay with old rows.
                stack.callback(evict_in_any_case, cache, keys)
            with ExitStack() as holds:
                for tier in self.tiers[:-1]:
                    holds.enter_context(tier.hold(tag, keys))
                    # From here on lookups of tiers get these rows from the last one, so
                    # that none sees an old row after another saw the new one.
                    tier.evict(tag, keys)
                for tier in reversed(self.tiers):
                    if rows is None:
                        tier.delete(tag, keys)
                    else:
                        tier.insert(tag, keys, rows)
                    if self._in_flight is not None:
                        self._in_flight.invalidate(keys)
            for cache in self.caches:
                if rows is None:
                    cache.evict(keys)
                else:
                    cache.update(keys, rows)
            stack.pop_all()

    def _blank(self, n: int) -> tuple[NDArray[Any], Mask]:
        rows = np.empty((n, self.spec.dim), self.spec.numpy_dtype)
        return rows, np.zeros(n, np.bool_)
