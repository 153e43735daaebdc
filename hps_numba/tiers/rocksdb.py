"""The persistent tier: tables in a RocksDB database on this machine.

Each table is a column family, named as its tag (``tag#2`` and so on after the table was
replaced). The family ``hps_meta`` says for every table which family is live, its shape
and the files it was loaded from, and holds its update epoch. Metadata is written in the
same batch as the rows that it is about, and the step from one family to the next is one
write: a process killed at any instant leaves each batch whole or absent, and a table
before or after a load. A family that no table names was left by a killed load; it is
dropped at the next start.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import monotonic
from typing import Any

import numpy as np

from hps_numba.errors import UnknownTableError
from hps_numba.tiers.arguments import check_keys, check_output, check_rows
from hps_numba.tiers.base import Epoch, PersistentTier, TierStats
from hps_numba.tiers.rocksdb_catalog import Catalog
from hps_numba.tiers.rocksdb_errors import NAME
from hps_numba.tiers.rocksdb_family import Batch
from hps_numba.tiers.rocksdb_rows import CountedBlocks, Fetch
from hps_numba.tiers.rocksdb_store import META_FAMILY, RocksStore
from hps_numba.tiers.rocksdb_table import RocksTable
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


class RocksDBTier(PersistentTier):
    """Tables in a RocksDB database.

    Parameters
    ----------
    path
        Directory of the database; created if missing, unless ``read_only``.
    num_threads
        Threads that read a large batch together.
    read_only
        Refuse everything that writes. The database is seen as it was when opened.
    max_batch_size
        Most rows that are written in one atomic batch.
    cache_bytes
        Block cache for all tables.
    direct_reads
        Read around the operating system's page cache.

    Raises
    ------
    ConfigError
        If the database is another program's.
    TierUnavailableError
        If the path cannot be used, or another process has the database open.
    TierCorruptionError
        If the files are damaged.

    Notes
    -----
    Written rows survive the end of the process at any instant. They survive a power
    failure as soon as the operating system has written its page cache.

    ``insert`` and ``delete`` write batches in key order, of ``max_batch_size`` rows but
    at most 1024 and 256 KiB, since no other thread runs while rocksdict writes a batch.
    Each batch is atomic; a call with more rows is not.
    """

    name = NAME
    local = False

    def __init__(
        self,
        path: str,
        *,
        num_threads: int = 16,
        read_only: bool = False,
        max_batch_size: int = 65_536,
        cache_bytes: int = 256 << 20,
        direct_reads: bool = False,
    ) -> None:
        self._threads = num_threads
        self._write_rows = max_batch_size
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="hps-rocksdb")
        self._opening = threading.Lock()  # one table is opened or dropped at a time
        self._tables: dict[str, RocksTable] = {}  # written under _opening
        self._store = RocksStore(
            path,
            read_only=read_only,
            cache_bytes=cache_bytes,
            direct_reads=direct_reads,
            on_close=partial(self._pool.shutdown, wait=False),
        )
        try:
            with self._store.using():
                self._catalog = Catalog(self._store)
                if not read_only:
                    self._drop_orphans()
        except BaseException:
            self._store.close()
            raise

    def open_table(self, spec: TableSpec, *, max_bytes: int | None = None) -> None:
        """Create the table, or open what an earlier process left.

        Parameters
        ----------
        spec
            The table.
        max_bytes
            Ignored: this tier has no budget.

        Raises
        ------
        ConfigError
            If the database holds the table with another dim or dtype.
        TierUnavailableError
            If the database is read-only and does not hold the table.
        """
        with self._store.using(spec.tag), self._opening:
            table = self._tables.get(spec.tag)
            entry = table.entry if table else self._catalog.entry(spec.tag)
            if entry is None:
                entry = self._catalog.create(spec)
            entry.check_shape(spec, self._store.path)
            if table is None:
                self._tables[spec.tag] = RocksTable(
                    self._store,
                    self._catalog,
                    spec,
                    entry,
                    write_rows=self._write_rows,
                )

    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,
    ) -> int:
        """Copy the rows of known keys to ``out`` and mark them in ``found``.

        See ``Tier.fetch``. The keys are read in key order, a large batch by several
        threads. The budget is looked at between pieces of 4096 keys.

        Raises
        ------
        TierCorruptionError
            If a stored row has another width than the table's rows.
        """
        deadline = monotonic() + budget_s
        with self._store.using(tag):
            table = self._table(tag)
            check_rows(table.spec, keys, out)
            check_output(table.spec, out, found)
            family = table.family
            if family is None:
                return 0
            wanted = np.flatnonzero(~found)
            order = wanted[np.argsort(keys[wanted])]
            fetch = Fetch(table.spec, family, keys, out, found, deadline)
            return fetch.run(order, self._pool, self._threads)

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        """Store the newest rows of keys, replacing what is there.

        Raises
        ------
        TierUnavailableError
            If it cannot be written; some batches may have been.
        """
        with self._writing(tag) as table:
            check_rows(table.spec, keys, rows)
            table.write(keys, rows)

    def delete(self, tag: str, keys: Keys) -> int:
        """Remove keys for good and return how many were there; see ``insert``."""
        with self._writing(tag) as table:
            check_keys(table.spec, keys)
            known = table.known(keys)
            table.write(keys, None)
        return int(known.sum())

    def apply(self, tag: str, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        """Write what a span of the table's update stream brings, exactly once.

        See ``LastingTier.apply``. Rows and position are one batch, or sorted files that
        are taken over in one step: a span is applied as a whole or not at all.
        """
        with self._writing(tag) as table:
            if rows is None:
                check_keys(table.spec, keys)
            else:
                check_rows(table.spec, keys, rows)
            return table.apply(keys, rows, span)

    def positions(self, tag: str) -> dict[int, Position]:
        """Return how far each partition of the table's update stream was applied."""
        with self._store.using(tag):
            return self._table(tag).positions()

    def seek(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Set positions, forwards or backwards; rows, and other partitions, stay."""
        with self._writing(tag) as table:
            table.seek(positions)

    def load(
        self,
        tag: str,
        blocks: Iterable[RowBlock],
        *,
        progress: Progress | None = None,
        ascending: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> int:
        """Replace all rows of the table; of a repeated key the last row wins.

        The rows are sorted, written to files, and taken over by a family of their own,
        which then becomes the table in one write. Other writers of the table wait.

        Parameters
        ----------
        tag
            Tag of an open table.
        blocks
            Rows, in any order unless ``ascending``.
        progress
            Called with rows read since the last call.
        ascending
            The keys ascend over all blocks and none repeats: nothing is sorted.
        fingerprint
            Describes the origin of the rows, as JSON; see ``fingerprint``.

        Returns
        -------
        int
            Number of rows given.

        Raises
        ------
        ValueError
            If keys do not ascend as promised; the table is as it was.

        Notes
        -----
        Memory: 300 MB at most. Disk: the rows once more, twice if they are not
        ascending and over 128 MB, until the old family is gone.
        """
        with self._writing(tag) as table:
            given = CountedBlocks(table.spec, blocks, progress)
            table.load(given, ascending=ascending, fingerprint=fingerprint)
        return given.n_rows

    def fingerprint(self, tag: str) -> dict[str, Any] | None:
        """Return what the last ``load`` of the table was given, or None."""
        with self._store.using(tag):
            return self._table(tag).entry.fingerprint

    def untouched(self, tag: str) -> bool:
        """Return whether the table holds just the rows of its last ``load``."""
        with self._store.using(tag):
            return self._table(tag).untouched

    def epoch(self, tag: str) -> int:
        """Return the table's update epoch; it is stored with the rows."""
        with self._store.using(tag):
            # A write that runs stamps its keys after this number, so that a backfill
            # that begins now is refused: the lock would only add waiting.
            return self._table(tag).stamps.epoch

    def hold(self, tag: str, keys: Keys | None = None) -> AbstractContextManager[None]:
        """Refuse backfills of these keys (of all, if None) while the context lasts."""
        with self._store.using(tag):
            table = self._table(tag)
        if keys is not None:
            check_keys(table.spec, keys)
        return table.stamps.held(table.lock, keys)

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        """Store rows that a lower tier gave, unless their keys changed since."""
        with self._writing(tag) as table:
            check_rows(table.spec, keys, rows)
            assert isinstance(epoch, int)  # one of its own
            return table.backfill(keys, rows, epoch)

    def evict(self, tag: str, keys: Keys | None = None) -> int:
        """Remove keys (all, if None); a lower tier may bring them back."""
        with self._writing(tag) as table:
            if keys is None:
                return table.clear()
            check_keys(table.spec, keys)
            known = table.known(keys)
            table.put(keys[known], None)
        return int(np.count_nonzero(known))

    def iterate(self, tag: str, *, block_rows: int = 65_536) -> Iterator[RowBlock]:
        """Yield the rows in blocks, in key order.

        A table that is replaced meanwhile is continued with its new rows.
        """
        with self._store.using(tag):
            table = self._table(tag)
        return table.iterate(block_rows)

    def tables(self, model: str) -> list[str]:
        """Return the sorted names of the model's tables, open or not."""
        with self._store.using():
            entries = self._catalog.entries().values()
        return sorted(entry.name for entry in entries if entry.model == model)

    def size(self, tag: str) -> int:
        """Return the exact number of rows, by a scan of the keys."""
        with self._store.using(tag):
            return self._table(tag).count()

    def stats(self, tag: str) -> TierStats:
        """Return the table's counters; rows and bytes are RocksDB's estimates."""
        with self._store.using(tag):
            table = self._table(tag)
            family = table.family
            return TierStats(
                rows=family.estimate_keys() if family else 0,
                bytes=family.estimate_bytes() if family else 0,
                refused_backfills=table.refused,
            )

    def drop_table(self, tag: str) -> None:
        """Remove the table, open or not, and its rows; unknown tables are ignored."""
        with self._store.using(tag), self._opening:
            entry = self._catalog.entry(tag)
            if entry is None:
                return
            self._store.check_writable(tag)
            table = self._tables.pop(tag, None)
            with table.writing if table else nullcontext():
                batch = Batch()
                self._catalog.remove(batch, tag)
                self._store.write(batch)
                if table is not None:
                    table.dropped = True
                    entry = table.entry
                if entry.family is not None:
                    self._store.drop_family(entry.family)

    def close(self) -> None:
        """Close the database; the second call does nothing.

        Returns at once: calls that are running finish, and the last one of them
        releases the files.
        """
        self._store.close()

    @property
    def read_only(self) -> bool:  # type: ignore[override]  # settled at the start
        """Whether every write is refused."""
        return self._store.read_only

    @contextmanager
    def _writing(self, tag: str) -> Iterator[RocksTable]:
        """Be the table's only writer."""
        with self._store.using(tag):
            table = self._table(tag)
            self._store.check_writable(tag)
            with table.writing:
                if table.dropped:
                    raise self._unknown(tag)
                yield table

    def _table(self, tag: str) -> RocksTable:
        table = self._tables.get(tag)
        if table is None:
            raise self._unknown(tag)
        return table

    def _unknown(self, tag: str) -> UnknownTableError:
        return UnknownTableError(f"no table {tag} is open in {self._store.path}")

    def _drop_orphans(self) -> None:
        """Drop families that no table names: what killed loads left."""
        named = {entry.family for entry in self._catalog.entries().values()}
        for name in set(self._store.families()) - named - {META_FAMILY}:
            self._store.drop_family(name)
