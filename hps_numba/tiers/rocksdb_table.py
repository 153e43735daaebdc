"""One table of a RocksDB database: its live family, and how that changes.

``writing`` serialises writers from the first byte to the last; ``lock`` guards what
readers look at and is held for moments only. Who needs both takes ``writing`` first.
RocksDB refuses all writes after one to a dropped family, so a table that was dropped is
marked, under ``writing``, and never written again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hps_numba.tiers.codec import KEY_BYTES, decode_keys, encode_keys, encode_rows
from hps_numba.tiers.rocksdb_catalog import Catalog, Entry
from hps_numba.tiers.rocksdb_files import load_directory
from hps_numba.tiers.rocksdb_rows import encoded, rows_of
from hps_numba.tiers.rocksdb_store import Batch, Family, RocksStore
from hps_numba.tiers.sorted_runs import check_ascending, sorted_unique
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, Mask, RowBlock, Rows, TableSpec

_FILE_BYTES = 64 << 20
# rocksdict holds the GIL while a batch is written: one to two milliseconds for these.
_BATCH_ROWS = 1024
_BATCH_BYTES = 256 << 10
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

    def write(
        self,
        keys: Keys,
        rows: Rows | None,
        offsets: Mapping[str, int] | None,
    ) -> None:
        """Put or (without rows) delete keys in atomic batches, in key order."""
        order = np.argsort(keys)
        step = self._write_rows
        for low in range(0, max(keys.size, 1), step):
            part = order[low : low + step]
            batch = Batch()
            if offsets and low + step >= keys.size:
                self._catalog.put_offsets(batch, offsets)
            epoch = self.stamps.epoch + 1
            if part.size:
                self._catalog.put_epoch(batch, self.spec.tag, epoch)
            try:
                self._apply(
                    batch, keys[part], None if rows is None else rows[part], self.entry
                )
                self._stored_epoch = epoch if part.size else self._stored_epoch
            finally:  # a write that failed may have happened
                with self.lock:
                    self.stamps.commit(keys[part])

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
            family = self._new_family()
            entry = replace(entry, family=family.name, generation=entry.generation + 1)
        if entry != self.entry:
            self._catalog.put_entry(batch, self.spec.tag, entry)
        if family is not None and rows is None:
            batch.delete_all(family, encode_keys(keys))
        elif family is not None and rows is not None:
            batch.put_all(family, encode_keys(keys), encode_rows(rows))
        self._store.write(batch)
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
        old, epoch = self.family, self.stamps.epoch + 1
        entry = replace(
            self.entry,
            generation=self.entry.generation + (family is not None),
            family=family.name if family else None,
            fingerprint=fingerprint,
            loaded_epoch=epoch if family else -1,
        )
        batch = Batch()
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
