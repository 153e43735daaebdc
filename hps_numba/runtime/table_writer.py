"""Writing the rows of one table: to every tier, in the order that keeps rows fresh."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import CacheError, DeviceError, TierError, UpdateError
from hps_numba.runtime.changes import Change, StreamChange
from hps_numba.runtime.inflight import InFlight
from hps_numba.runtime.stats import TableCounters
from hps_numba.runtime.upper import UpperCache, evict_in_any_case, replace_rows
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Mask, Rows, StreamSpan, TableSpec


class TableWriter:
    """The writers of one table, one at a time.

    Parameters
    ----------
    spec
        The table, open in every tier.
    tiers
        From the fastest to the slowest; the last one is written first.
    in_flight
        Register of what lookups fetch from the remote tiers, if there are any.
    write_rows
        Most rows of an update that become visible together.

    Notes
    -----
    Thread-safe. *No resurrection:* a write holds its keys in every upper tier, writes
    upwards, and takes them off the in-flight register after each tier; caches above the
    tiers come last. So a row read before the write can neither be backfilled nor be
    handed to a lookup that begins after the write was acknowledged.

    Once one lookup below the caches returned the new row, none that begins later
    returns an old one: a lookup that read keys of a change from a lower tier waits
    until upper tiers have it, and flights that began before are off the register.
    """

    def __init__(
        self,
        spec: TableSpec,
        tiers: Sequence[Tier],
        in_flight: InFlight | None,
        write_rows: int,
    ) -> None:
        self.spec = spec
        self.tiers = tuple(tiers)
        self.counters = TableCounters(tier.name for tier in tiers)
        self.caches: tuple[UpperCache, ...] = ()  # above the tiers, one a device
        self._in_flight = in_flight
        self._write_rows = write_rows
        self._write_lock = threading.Lock()  # one update at a time, in all tiers
        self._changing: tuple[Keys, threading.Event] | None = None

    def update(self, keys: Keys, rows: Rows) -> None:
        """Write the newest rows of unique keys to all tiers, the last one first.

        Raises
        ------
        UpdateError
            If a tier refused; the message says how many rows were applied before.
        """
        self._write(keys, rows)
        self._count_updated(rows)

    def delete(self, keys: Keys) -> None:
        """Remove unique keys from all tiers; raises as ``update``."""
        self._write(keys, None)
        self.counters.add(deleted_keys=keys.size)

    def apply(
        self, keys: Keys, rows: Rows | None, span: StreamSpan, into: Collection[Tier]
    ) -> None:
        """Write what a span of the update stream brings, in one piece.

        Parameters
        ----------
        keys, rows
            Unique keys and their rows; None deletes them.
        span
            Records of the stream. Tiers that have them already skip them.
        into
            The tiers that follow the stream. Those above them that do not lose the
            keys.

        Raises
        ------
        StreamGapError
            If a tier lacks records before the span.
        TierError, CacheError, DeviceError
            If it could not be written everywhere; the call may be repeated.
        """
        with self._write_lock, self._announced(keys):
            self._write_part(StreamChange(keys, rows, span, into))
        if rows is None:
            self.counters.add(deleted_keys=keys.size)
        else:
            self._count_updated(rows)

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

    def forget_flights(self, keys: Keys | None = None) -> None:
        """Let no lookup join a fetch of keys (any, if None) that is under way now."""
        if self._in_flight is not None:
            self._in_flight.invalidate(keys)

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

    def refresh_keys(self, keys: Keys) -> int:
        """Read the rows of unique keys again where upper tiers or caches hold them.

        Returns how many rows were replaced in caches.
        """
        with self._write_lock, ExitStack() as holds:
            for tier in self.tiers[:-1]:
                holds.enter_context(tier.hold(self.spec.tag, keys))
                tier.evict(self.spec.tag, keys)
            self.forget_flights(keys)
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

    def _write(self, keys: Keys, rows: Rows | None) -> None:
        step = self._write_rows
        with self._write_lock:
            for low in range(0, keys.size, step):
                part = slice(low, low + step)
                try:
                    change = Change(keys[part], None if rows is None else rows[part])
                    with self._announced(keys[part]):
                        self._write_part(change)
                except (TierError, CacheError, DeviceError) as exc:
                    raise UpdateError(
                        f"table {self.spec.tag}: {low} of {keys.size} keys were "
                        f"written, then {exc}; send the rest when the tier is back"
                    ) from exc

    def _write_part(self, change: Change) -> None:
        tag, keys = self.spec.tag, change.keys
        with ExitStack() as stack:
            for cache in self.caches:
                # Taken off once all is written: lookups must not stay with old rows.
                stack.callback(evict_in_any_case, cache, keys)
            newest = True
            with ExitStack() as holds:
                for tier in self.tiers[:-1]:
                    holds.enter_context(tier.hold(tag, keys))
                    if change.evicts_first(tier):
                        tier.evict(tag, keys)
                    elif tier.local:  # or old rows would stay above new ones
                        stack.callback(tier.evict, tag, keys)
                for tier in reversed(self.tiers):
                    newest = change.write(tier, tag, newest=newest)
                    self.forget_flights(keys)
            for cache in self.caches:
                if change.rows is None or not newest:
                    cache.evict(keys)
                else:
                    cache.update(keys, change.rows)
            stack.pop_all()

    @contextmanager
    def _announced(self, keys: Keys) -> Iterator[None]:
        """Let lookups wait that find new rows of these keys before all tiers do."""
        done = self._new_event()
        self._changing = keys, done
        try:
            yield
        finally:
            done.set()
            self._changing = None

    def _wait_for_change(self, keys: Keys) -> None:
        """Wait until a change of one of these keys, if there is one, is everywhere.

        For who has read them from a tier that others lie above.
        """
        changing = self._changing
        if changing is not None and np.isin(keys, changing[0]).any():
            changing[1].wait()

    def _new_event(self) -> threading.Event:
        return threading.Event()

    def _count_updated(self, rows: Rows) -> None:
        finite = np.isfinite(rows).all(axis=1)
        self.counters.add(
            updated_rows=len(rows),
            non_finite_rows=len(rows) - int(np.count_nonzero(finite)),
        )

    def _blank(self, n: int) -> tuple[NDArray[Any], Mask]:
        rows = np.empty((n, self.spec.dim), self.spec.numpy_dtype)
        return rows, np.zeros(n, np.bool_)
