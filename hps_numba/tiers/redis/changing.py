"""Changes of tables by this process: under their locks, and within their margins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hps_numba.tiers.base import Epoch
from hps_numba.tiers.redis.applying import Applier
from hps_numba.tiers.redis.overflow import OverflowWorker
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.writing import Writer
from hps_numba.types import Keys, Position, Rows, StreamSpan


class Changer:
    """Changes rows of tables one after the other. Thread-safe.

    Parameters
    ----------
    writer
        Sends what is to be changed.
    applier
        Sends what the update stream brings.
    overflowing
        Removes rows of partitions that become too large.
    max_keys
        Most keys of one round to the servers.
    """

    def __init__(
        self,
        writer: Writer,
        applier: Applier,
        overflowing: OverflowWorker,
        max_keys: int,
    ) -> None:
        self._writer = writer
        self._applier = applier
        self._overflowing = overflowing
        self._max_keys = max_keys

    def update(self, table: RedisTable, keys: Keys, rows: Rows | None) -> int:
        """Put rows or (without rows) delete keys for good; count the deleted."""
        with self._relieving(table), table.lock:
            try:
                return self._writer.update(table, keys, rows)
            finally:  # a write that failed may have happened
                table.stamps.commit(keys)

    def apply(
        self, table: RedisTable, keys: Keys, rows: Rows | None, span: StreamSpan
    ) -> int:
        """Write a span of the update stream; count the keys that were written."""
        with self._relieving(table), table.lock:
            try:
                return self._applier.apply(table, keys, rows, span)
            finally:
                table.stamps.commit(keys)

    def seek(
        self, table: RedisTable, positions: Mapping[int, Position], *, new: bool
    ) -> None:
        """Set positions in the update stream, for all servers."""
        with table.lock:
            self._applier.seek(table, positions, new=new)

    def put(self, table: RedisTable, keys: Keys, rows: Rows) -> None:
        """Put rows of a load, whose lease refuses backfills."""
        with self._relieving(table), table.lock:
            self._writer.put(table, keys, rows)

    def backfill(self, table: RedisTable, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        """Put rows unless any server wrote their keys since; count them."""
        assert isinstance(epoch, tuple)
        own, *numbers = epoch
        with self._relieving(table), table.lock:
            admitted = table.stamps.admit(keys, own)
            some = keys[admitted]
            stored = 0
            if some.size:
                stored = self._writer.backfill(
                    table, some, rows[admitted], tuple(numbers)
                )
            table.refused_backfills += keys.size - stored
        return stored

    def evict(
        self,
        table: RedisTable,
        keys: Keys,
        step: Callable[[], None] = lambda: None,
    ) -> int:
        """Forget keys round by round; count them. ``step`` is called after each."""
        evicted = 0
        for low in range(0, keys.size, self._max_keys):
            with table.lock:
                evicted += self._writer.evict(table, keys[low : low + self._max_keys])
            step()
        return evicted

    def stamp_all(self, table: RedisTable, lease_us: int) -> None:
        """Refuse backfills that began before, and all for a lease."""
        with table.lock:
            try:
                self._writer.stamp_all(table, lease_us)
            finally:
                table.stamps.commit_all()

    @contextmanager
    def _relieving(self, table: RedisTable) -> Iterator[None]:
        """Let rows go from the partitions that what is written makes too large."""
        yield
        with table.lock:
            brought = table.take_too_large_locked()
        if brought:
            self._overflowing.relieve(table, brought)
