"""One table of a RocksDB database: its live family, and how that changes.

``writing`` serialises writers from the first byte to the last; ``lock`` guards what
readers look at and is held for moments only. Who needs both takes ``writing`` first.
RocksDB refuses all writes after one to a dropped family, so a table that was dropped is
marked, under ``writing``, and never written again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from hps_numba.tiers.codec import KEY_BYTES, decode_keys, encode_keys
from hps_numba.tiers.rocksdb_catalog import Catalog, Entry
from hps_numba.tiers.rocksdb_family import Batch, Family
from hps_numba.tiers.rocksdb_files import load_directory
from hps_numba.tiers.rocksdb_positions import (
    is_due,
    pair_of,
    put_positions,
    read_position,
    read_positions,
)
from hps_numba.tiers.rocksdb_rows import (
    EncodedPairs,
    encoded,
    encoded_span,
    fill,
    rows_of,
)
from hps_numba.tiers.rocksdb_store import RocksStore
from hps_numba.tiers.sorted_runs import check_ascending, sorted_unique
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, Mask, Position, RowBlock, Rows, StreamSpan, TableSpec

_FILE_BYTES = 64 << 20
# rocksdict holds the GIL while a batch is written: one to two milliseconds for these.
_BATCH_ROWS = 1024
_BATCH_BYTES = 256 << 10
# From here on, sorted files take less time than a batch, and no long hold of the GIL.
_BURST_ROWS = 8192
_BURST_BYTES = 8 << 20
_SCAN_ROWS = 8192
_FIRST_KEY = bytes(KEY_BYTES)


class RocksTable:
    """An open table. Methods that change it are called under ``writing``.

    Parameters
    ----------
    store, catalog
        The database and its metadata.
    spec, entry
        The table, and what the metadata says about it.
    write_rows
        Most rows of an atomic batch, if batches may be so large.
    """

    def __init__(
        self,
        store: RocksStore,
        catalog: Catalog,
        spec: TableSpec,
        entry: Entry,
        *,
        write_rows: int,
    ) -> None:
        self._store = store
        self._catalog = catalog
        row_bytes = KEY_BYTES + spec.row_bytes
        self._write_rows = min(write_rows, _BATCH_ROWS, -(-_BATCH_BYTES // row_bytes))
        self.spec = spec
        self.writing = threading.Lock()
        self.lock = threading.Lock()
        self.entry = entry  # replaced under writing and lock
        self.family = (  # replaced under writing and lock
            None if entry.family is None else store.family(entry.family)
        )
        self._stored_epoch = catalog.epoch(spec.tag)  # replaced under writing
        self.stamps = UpdateStamps(self._stored_epoch)  # guarded by lock
        self.refused = 0  # guarded by lock
        self.dropped = False  # guarded by writing

    @property
    def untouched(self) -> bool:
        """Whether nothing was written since the last load."""
        return self._stored_epoch == self.entry.loaded_epoch

    def write(self, keys: Keys, rows: Rows | None) -> None:
        """Put or (without rows) delete keys in atomic batches, in key order."""
        order = np.argsort(keys)
        for low in range(0, keys.size, self._write_rows):
            part = order[low : low + self._write_rows]
            batch = Batch()
            with self._changing(batch, keys[part]):
                some = None if rows is None else rows[part]
                self._apply(batch, keys[part], some, self.entry)

    def apply(self, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        """Put or delete the keys of a span, with its position; count them."""
        tag = self.spec.tag
        if not is_due(read_position(self.family, span.partition, tag), span, tag):
            return 0
        order = np.argsort(keys)
        n_bytes = rows.nbytes if rows is not None else 0
        if keys.size >= _BURST_ROWS or n_bytes >= _BURST_BYTES:
            self._ingest(encoded_span(keys, rows, order, span), keys)
            return keys.size
        batch = Batch()
        family, entry = self._living()
        batch.put(family, *pair_of(span.partition, span.until))
        fill(batch, family, keys[order], None if rows is None else rows[order])
        if not keys.size:
            self._commit(batch, family, entry)
            return 0
        with self._changing(batch, keys):
            self._commit(batch, family, entry)
        return keys.size

    def _ingest(self, pairs: EncodedPairs, keys: Keys) -> None:
        """Take over ascending pairs of these keys as sorted files, all at once."""
        with load_directory(self._store.path) as directory:
            files = self._store.write_files(directory, pairs, file_bytes=_FILE_BYTES)
            # A batch of its own, before: the files are no part of any batch.
            batch = Batch()
            family, entry = self._living()
            entry = replace(entry, loaded_epoch=-1)
            with self._changing(batch, keys):
                self._commit(batch, family, entry, sync=entry != self.entry)
                family.ingest(files)

    def positions(self) -> dict[int, Position]:
        """Return how far each partition of the stream was applied."""
        return read_positions(self.family, self.spec.tag)

    def seek(self, positions: Mapping[int, Position]) -> None:
        """Set the positions of these partitions."""
        if not positions:
            return
        batch = Batch()
        family, entry = self._living()
        put_positions(batch, family, positions)
        self._commit(batch, family, entry)

    @contextmanager
    def _changing(self, batch: Batch, keys: Keys) -> Iterator[None]:
        """Raise the epoch in the batch, and tell all that the keys changed."""
        epoch = self.stamps.epoch + 1
        self._catalog.put_epoch(batch, self.spec.tag, epoch)
        try:
            yield
            self._stored_epoch = epoch
        finally:  # a write that failed may have happened
            with self.lock:
                self.stamps.commit(keys)

    def backfill(self, keys: Keys, rows: Rows, epoch: int) -> int:
        """Put the rows whose keys did not change since ``epoch``; count them."""
        with self.lock:
            admitted = self.stamps.admit(keys, epoch)
            n_admitted = int(np.count_nonzero(admitted))
            self.refused += keys.size - n_admitted
        self.put(keys[admitted], rows[admitted])
        return n_admitted

    def put(self, keys: Keys, rows: Rows | None) -> None:
        """Put or delete keys without telling anyone that they changed."""
        entry = replace(self.entry, loaded_epoch=-1)
        for low in range(0, keys.size, self._write_rows):
            part = slice(low, low + self._write_rows)
            self._apply(
                Batch(), keys[part], None if rows is None else rows[part], entry
            )
            entry = self.entry

    def _apply(self, batch: Batch, keys: Keys, rows: Rows | None, entry: Entry) -> None:
        """Write the batch with these keys and this entry; then show what is new."""
        family = self.family
        if family is None and rows is not None and keys.size:
            family, entry = self._living(entry)
        if family is not None:
            fill(batch, family, keys, rows)
        self._commit(batch, family, entry)

    def _living(self, entry: Entry | None = None) -> tuple[Family, Entry]:
        """Return the family, made now if there is none, and the entry that names it."""
        entry = entry or self.entry
        if self.family is not None:
            return self.family, entry
        family = self._new_family()
        return family, replace(
            entry, family=family.name, generation=entry.generation + 1
        )

    def _commit(
        self, batch: Batch, family: Family | None, entry: Entry, *, sync: bool = False
    ) -> None:
        """Write the batch, and the entry if it is new; then show both."""
        if entry != self.entry:
            self._catalog.put_entry(batch, self.spec.tag, entry)
        self._store.write(batch, sync=sync)
        with self.lock:
            self.entry, self.family = entry, family

    def _new_family(self) -> Family:
        n_before = self.entry.generation
        tag = self.spec.tag
        name = f"{tag}#{n_before + 1}" if n_before else tag
        if name in self._store.families():  # left by a write that failed
            self._store.drop_family(name)
        return self._store.create_family(name)

    def load(
        self,
        blocks: Iterable[RowBlock],
        *,
        ascending: bool,
        fingerprint: Mapping[str, Any] | None,
    ) -> None:
        """Make these rows the table, by way of sorted files."""
        with load_directory(self._store.path) as directory:
            ordered = (
                check_ascending(blocks)
                if ascending
                else sorted_unique(blocks, directory)
            )
            files = self._store.write_files(
                directory, encoded(ordered), file_bytes=_FILE_BYTES
            )
            family = self._new_family()
            if files:
                family.ingest(files)
            self._switch(family, dict(fingerprint) if fingerprint else None)

    def clear(self) -> int:
        """Remove all rows without telling anyone, and return how many there were."""
        n_rows = self.count()
        self._switch(None, None)  # so that a restart loads the files again
        return n_rows

    def _switch(
        self, family: Family | None, fingerprint: dict[str, Any] | None
    ) -> None:
        """Make a family (none: no rows) the table, in one write, and drop the old."""
        old, epoch, loaded = self.family, self.stamps.epoch + 1, family is not None
        positions = self.positions()
        if positions and family is None:
            family = self._new_family()
        entry = replace(
            self.entry,
            generation=self.entry.generation + (family is not None),
            family=family.name if family else None,
            fingerprint=fingerprint,
            loaded_epoch=epoch if loaded else -1,
        )
        batch = Batch()
        if family is not None:
            put_positions(batch, family, positions)
        self._catalog.put_entry(batch, self.spec.tag, entry)
        self._catalog.put_epoch(batch, self.spec.tag, epoch)
        self._store.write(batch, sync=True)
        self._stored_epoch = epoch
        with self.lock:
            self.entry, self.family = entry, family
            self.stamps.commit_all()
        if old is not None:
            self._store.drop_family(old.name)

    def known(self, keys: Keys) -> Mask:
        """Return which keys are stored."""
        known = np.zeros(keys.size, np.bool_)
        family = self.family
        if family is None:
            return known
        for low in range(0, keys.size, _SCAN_ROWS):
            piece = slice(low, low + _SCAN_ROWS)
            values = family.multi_get(encode_keys(keys[piece]))
            known[piece] = [value is not None for value in values]
        return known

    def count(self) -> int:
        """Return the number of rows, by a scan of the keys."""
        family, start, n_rows = self.family, _FIRST_KEY, 0
        while family is not None:
            keys = family.scan_keys(start, _SCAN_ROWS)
            n_rows += len(keys)
            if len(keys) < _SCAN_ROWS:
                break
            start = keys[-1] + b"\0"
        return n_rows

    def iterate(self, block_rows: int) -> Iterator[RowBlock]:
        """Yield the rows in key order."""
        spec, start = self.spec, _FIRST_KEY
        while True:
            with self._store.using(spec.tag):
                family = self.family
                if family is None:
                    return
                keys, values = family.scan(start, block_rows)
                if not keys:
                    return
                block = RowBlock(decode_keys(keys), rows_of(spec, keys, values))
            yield block
            if len(keys) < block_rows:
                return
            start = keys[-1] + b"\0"
