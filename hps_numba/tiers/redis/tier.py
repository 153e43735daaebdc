"""The Redis tier: tables in a Redis Cluster or a single server, shared by servers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import (
    ClosedError,
    ConfigError,
    TierError,
    TierUnavailableError,
    UnknownTableError,
)
from hps_numba.tiers.arguments import check_keys, check_output, check_rows, for_kernel
from hps_numba.tiers.base import Epoch, LastingTier, TierStats
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis import scanning
from hps_numba.tiers.redis.applying import Applier
from hps_numba.tiers.redis.changing import Changer
from hps_numba.tiers.redis.client import RedisOptions, connect
from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.evicting import Evictor
from hps_numba.tiers.redis.exchange import Exchange
from hps_numba.tiers.redis.health import Health, NodeState
from hps_numba.tiers.redis.lane import Lanes
from hps_numba.tiers.redis.layout import Layout
from hps_numba.tiers.redis.lease import Lease
from hps_numba.tiers.redis.overflow import OverflowStats, OverflowWorker
from hps_numba.tiers.redis.reading import Asking, Reader
from hps_numba.tiers.redis.registry import Registry
from hps_numba.tiers.redis.scripts import OPEN
from hps_numba.tiers.redis.sizes import row_bytes
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.topology import Topology
from hps_numba.tiers.redis.writing import Writer
from hps_numba.types import (
    Keys,
    Mask,
    Position,
    Progress,
    RowBlock,
    Rows,
    StreamSpan,
    TableSpec,
)


class RedisTier(LastingTier):
    """Tables in Redis.

    Parameters
    ----------
    options
        Where the servers are, and how to reach them.
    num_partitions
        Partitions per table; part of the names of keys, so all servers agree on it.
    layout
        Strings, or HugeCTR's hashes.
    max_batch_size
        Most keys of one round to the servers.
    overflow
        Which rows a partition gives up that has more than a margin.
    wait_replicas
        Replicas of each server that have to confirm a write before it is acknowledged.

    Raises
    ------
    ConfigError
        If the servers refuse the user, or the certificate is not theirs.
    TierUnavailableError
        If no server answers.

    Notes
    -----
    Thread-safe. See ``scripts`` for what keeps servers from undoing each other's
    updates. ``fetch`` reads what the servers that answer have, and raises after that if
    others did not.
    """

    name = "redis"
    local = False
    in_turn = True

    def __init__(
        self,
        options: RedisOptions,
        *,
        num_partitions: int = 16,
        layout: RedisLayout = RedisLayout.STRINGS,
        max_batch_size: int = 65_536,
        overflow: Overflow | None = None,
        wait_replicas: int = 0,
    ) -> None:
        if num_partitions < 1 or max_batch_size < 1:
            raise ConfigError("redis: num_partitions and max_batch_size are 1 or more")
        self._num_partitions = num_partitions
        self._kind = RedisLayout(layout)
        self._overflow = overflow or Overflow()
        self._topology = Topology(connect(options))
        self._registry = Registry(self._topology.client)
        self._health = Health(self._topology)
        self._lanes = Lanes(options.max_connections, options.timeout_s)
        self._reader = Reader(self._topology, self._health, self._lanes, max_batch_size)
        exchange = Exchange(
            self._health, n_replicas=wait_replicas, timeout_s=options.timeout_s
        )
        evictor = Evictor(self._topology, self._health, exchange)
        self._overflowing = OverflowWorker(evictor)
        writer = Writer(self._topology, self._health, exchange)
        self._applier = Applier(self._topology, writer)
        changer = Changer(writer, self._applier, self._overflowing, max_batch_size)
        self._changer = changer
        self._lock = threading.Lock()
        self._tables: dict[str, RedisTable] = {}  # written under _lock
        self._closed = False

    def open_table(self, spec: TableSpec, *, max_bytes: int | None = None) -> None:
        """Enter the table; Redis has one memory limit for all, so it has no share."""
        self._check_open()
        layout = Layout(spec, self._kind, self._num_partitions)
        self._registry.add(layout)
        keys = [layout.stamps_key(p) for p in range(layout.n_partitions)]
        with map_exceptions(spec.tag):
            seen: list[Any] = [self._topology.client.eval(OPEN, 1, key) for key in keys]
        slots = [self._topology.slot(key) for key in keys]
        with self._lock:
            if spec.tag not in self._tables:
                table = RedisTable(layout, slots, seen, self._overflow)
                self._tables[spec.tag] = table

    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,
    ) -> int:
        """Copy known rows; raises if a server fails, after those of the others."""
        with self._using(tag) as table:
            return self._fetch(table, keys, out, found, Asking(monotonic() + budget_s))

    def fetch_and_tell(
        self, tag: str, keys: Keys, out: Rows, found: Mask, asked: Callable[[], None]
    ) -> int:
        """Fetch; call ``asked`` when all commands are on their way to the servers."""
        with self._using(tag) as table:
            return self._fetch(table, keys, out, found, Asking(asked=asked))

    def arrange(self, tag: str, keys: Keys) -> NDArray[np.int64] | None:
        """Return the keys partition by partition: rows come in this order."""
        return self._table(tag).grouped(keys)[0]

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        """Store the newest rows of keys."""
        with self._using(tag) as table:
            check_rows(table.spec, keys, rows)
            self._changer.update(table, keys, rows)

    def delete(self, tag: str, keys: Keys) -> int:
        """Remove keys for good."""
        with self._using(tag) as table:
            check_keys(table.spec, keys)
            return self._changer.update(table, keys, None)

    def apply(self, tag: str, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        """Write a span, partition by partition; any number of servers may do so."""
        with self._using(tag) as table:
            check_keys(table.spec, keys)
            if rows is not None:
                check_rows(table.spec, keys, rows)
            return self._changer.apply(table, keys, rows, span)

    def positions(self, tag: str) -> dict[int, Position]:
        """Return the least of the table's partitions; one without data has none."""
        with self._using(tag) as table:
            return self._applier.positions(table)

    def seek(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Set positions for all servers."""
        with self._using(tag) as table:
            self._changer.seek(table, positions, new=False)

    def begin_stream(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Set positions for all servers, in those partitions that have none."""
        with self._using(tag) as table:
            self._changer.seek(table, positions, new=True)

    def lower_positions(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Note where the tier below is in the update stream."""
        table = self._table(tag)
        with table.lock:
            table.tokens.seek(positions)

    def load(
        self,
        tag: str,
        blocks: Iterable[RowBlock],
        *,
        progress: Progress | None = None,
        ascending: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> int:
        """Replace all rows, key by key; ``ascending`` makes no difference.

        An update of another server meanwhile is one more write: of it and the row that
        is loaded the later one stays.
        """
        with self._using(tag) as table, table.load_lock:
            begun = self._registry.begin_load(tag)
            lease = Lease(
                lambda lease_us: self._changer.stamp_all(table, lease_us), tag
            )
            lease.begin()
            before = scanning.all_keys(self._topology, table.layout, lease.keep)
            loaded: list[Keys] = []
            n_rows = 0
            for block in blocks:
                check_rows(table.spec, block.keys, block.rows)
                self._changer.put(table, block.keys, block.rows)
                if before.size:
                    loaded.append(block.keys.copy())
                n_rows += len(block)
                if progress is not None:
                    progress(len(block))
                lease.keep()
            gone = np.setdiff1d(before, np.concatenate([before[:0], *loaded]))
            self._changer.evict(table, gone, lease.keep)
            lease.end()
            self._registry.end_load(tag, begun, fingerprint)
            return n_rows

    def fingerprint(self, tag: str) -> dict[str, Any] | None:
        """Return what the last ``load`` of the table by any server was given."""
        with self._using(tag):
            entry = self._registry.entry(tag)
            return None if entry is None else entry.fingerprint

    def loading(self, tag: str) -> AbstractContextManager[None]:
        """Let no other server load the table while the context lasts."""
        return self._registry.loading(self._table(tag).spec)

    def epoch(self, tag: str) -> Epoch:
        """Return the table's update epoch here, and as last seen in Redis."""
        return self._table(tag).epoch

    def hold(self, tag: str, keys: Keys | None = None) -> AbstractContextManager[None]:
        """Refuse backfills of these keys by this process while the context lasts.

        Those of other servers are refused once the keys are written.
        """
        table = self._table(tag)
        if keys is not None:
            check_keys(table.spec, keys)
        return table.held(keys)

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        """Store rows that a lower tier gave, unless any server wrote them since."""
        with self._using(tag) as table:
            check_rows(table.spec, keys, rows)
            return self._changer.backfill(table, keys, rows, epoch)

    def evict(self, tag: str, keys: Keys | None = None) -> int:
        """Forget keys (all, if None)."""
        with self._using(tag) as table:
            if keys is not None:
                check_keys(table.spec, keys)
            else:
                keys = scanning.all_keys(self._topology, table.layout)
            return self._changer.evict(table, keys)

    def iterate(self, tag: str, *, block_rows: int = 65_536) -> Iterator[RowBlock]:
        """Yield the rows; keys are listed first, see ``scanning``."""
        with self._using(tag) as table:
            spec = table.spec
            for keys in scanning.keys_of(self._topology, table.layout):
                for low in range(0, keys.size, block_rows):
                    block = keys[low : low + block_rows]
                    rows = np.empty((block.size, spec.dim), spec.numpy_dtype)
                    found = np.zeros(block.size, np.bool_)
                    self._reader.fetch(table, block, rows.view(np.uint8), found)
                    if found.any():
                        yield RowBlock(block[found], rows[found])

    def tables(self, model: str) -> list[str]:
        """Return the model's table names."""
        self._check_open()
        return self._registry.names(model)

    def size(self, tag: str) -> int:
        """Return the number of rows; reads the names of all strings."""
        with self._using(tag) as table:
            return scanning.count(self._topology, table.layout)

    def stats(self, tag: str) -> TierStats:
        """Return the table's counters; of strings the rows are estimated."""
        with self._using(tag) as table:
            down = tuple(state.name for state in self.down())
            if not down:  # else nobody waits for it, and it keeps the last number
                with suppress(TierError, ConfigError):
                    table.rows = scanning.estimate(self._topology, table.layout)
            noted = table.use() is not None
            return TierStats(
                rows=table.rows,
                bytes=table.rows * row_bytes(table.spec, self._kind, notes_uses=noted),
                evictions=table.evictions,
                refused_backfills=table.refused_backfills,
                down=down,
            )

    def overflow_stats(self) -> OverflowStats:
        """Return what overflow handling has to do, and what it left out."""
        return self._overflowing.stats()

    def drain(self) -> None:
        """Wait until overflow handling has nothing left to do."""
        self._overflowing.drain()

    def down(self) -> list[NodeState]:
        """Return the servers that do not answer now."""
        return self._health.down()

    def drop_table(self, tag: str) -> None:
        """Remove the table for all servers."""
        self._check_open()
        with self._lock:
            table = self._tables.pop(tag, None)
        if table is None:
            return
        self._overflowing.forget(tag)
        self._changer.evict(table, scanning.all_keys(self._topology, table.layout))
        self._registry.remove(tag)
        layout = table.layout
        with map_exceptions(tag):
            for p in range(layout.n_partitions):
                for key in (layout.stamps_key(p), layout.uses_key(p)):
                    self._topology.client.delete(key)

    def close(self) -> None:
        """Release all connections; those that are in use when they are given back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tables.clear()
        self._overflowing.close()
        self._lanes.close()
        self._health.close()
        self._topology.close()

    def _fetch(
        self, table: RedisTable, keys: Keys, out: Rows, found: Mask, asking: Asking
    ) -> int:
        check_rows(table.spec, keys, out)
        check_output(table.spec, out, found)
        known = found.copy()
        try:
            as_bytes = out.view(np.uint8)
            self._reader.fetch_all(table, for_kernel(keys), as_bytes, found, asking)
        finally:
            if table.notes_uses:
                self._overflowing.note(table, keys[found & ~known])
        return int(np.count_nonzero(found)) - int(np.count_nonzero(known))

    @contextmanager
    def _using(self, tag: str) -> Iterator[RedisTable]:
        """Yield an open table; what fails since the tier was closed says so."""
        table = self._table(tag)
        try:
            yield table
        except (TierError, ConfigError) as exc:
            if self._closed:
                raise ClosedError("the Redis tier is closed") from exc
            if isinstance(exc, ConfigError):  # it was right when the tier was opened
                raise TierUnavailableError(str(exc), tier=self.name, tag=tag) from exc
            raise
        finally:
            if self._closed:  # redis-py has kept what was in use
                self._topology.close()

    def _table(self, tag: str) -> RedisTable:
        table = self._tables.get(tag)
        if table is None:
            self._check_open()
            raise UnknownTableError(f"no table {tag} is open in Redis")
        return table

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the Redis tier is closed")
