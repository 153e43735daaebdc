"""One table of a RocksDB database: its live family, and how that changes.

``writing`` serialises writers from the first byte to the last; ``lock`` guards what
readers look at and is held for moments only. Who needs both takes ``writing`` first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hps_numba.tiers.codec import (
    KEY_BYTES,
    decode_keys,
    decode_rows,
    encode_keys,
    encode_rows,
)
from hps_numba.tiers.rocksdb_catalog import Catalog, Entry
from hps_numba.tiers.rocksdb_store import Batch, Family, RocksStore
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, Mask, RowBlock, Rows, TableSpec

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
        Most rows of an atomic batch.
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
        self._write_rows = write_rows
        self.spec = spec
        self.writing = threading.Lock()
        self.lock = threading.Lock()
        self.entry = entry  # replaced under writing and lock
        self.family = (  # replaced under writing and lock
            None if entry.family is None else store.family(entry.family)
        )
        self.stamps = UpdateStamps(catalog.epoch(spec.tag))  # guarded by lock
        self.refused = 0  # guarded by lock

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
            self._add(batch, keys[part], None if rows is None else rows[part])
            self._catalog.put_epoch(batch, self.spec.tag, self.stamps.epoch + 1)
            if offsets and low + step >= keys.size:
                self._catalog.put_offsets(batch, offsets)
            self._store.write(batch)
            with self.lock:
                self.stamps.commit(keys[part])

    def put(self, keys: Keys, rows: Rows | None) -> None:
        """Put or delete keys without telling anyone that they changed."""
        for low in range(0, keys.size, self._write_rows):
            part = slice(low, low + self._write_rows)
            batch = Batch()
            self._add(batch, keys[part], None if rows is None else rows[part])
            entry = replace(self.entry, loaded_epoch=-1)
            self._catalog.put_entry(batch, self.spec.tag, entry)
            self._store.write(batch)
            with self.lock:
                self.entry = entry

    def _add(self, batch: Batch, keys: Keys, rows: Rows | None) -> None:
        if rows is not None and self.family is None:
            self._found_family(batch)
        if self.family is None:
            return
        encoded_keys = encode_keys(keys)
        if rows is None:
            batch.delete_all(self.family, encoded_keys)
        else:
            batch.put_all(self.family, encoded_keys, encode_rows(rows))

    def _found_family(self, batch: Batch) -> None:
        """Create the table's first family; ``batch`` makes it live with its rows."""
        family = self._new_family()
        entry = replace(self.entry, family=family.name)
        self._catalog.put_entry(batch, self.spec.tag, entry)
        with self.lock:
            self.entry, self.family = entry, family

    def _new_family(self) -> Family:
        generation = self.entry.generation
        tag = self.spec.tag
        name = tag if generation == 0 else f"{tag}#{generation + 1}"
        if name in self._store.families():  # left by a load that failed
            self._store.drop_family(name)
        return self._store.create_family(name)

    def replace_rows(
        self,
        files: list[str],
        fingerprint: Mapping[str, Any] | None,
    ) -> None:
        """Make a new family with the rows of sorted files the self."""
        self.entry = replace(
            self.entry, generation=self.entry.generation + bool(self.family)
        )
        family = self._new_family()
        if files:
            family.ingest(files)
        self.switch(family, dict(fingerprint) if fingerprint else None)

    def switch(self, family: Family | None, fingerprint: dict[str, Any] | None) -> None:
        """Make a family (none: no rows) the table, in one write, and drop the old."""
        old = self.family
        generation = self.entry.generation + (family is None)
        entry = replace(
            self.entry,
            generation=generation,
            family=family.name if family else None,
            fingerprint=fingerprint,
            loaded_epoch=self.stamps.epoch + 1 if family else -1,
        )
        batch = Batch()
        self._catalog.put_entry(batch, self.spec.tag, entry)
        self._catalog.put_epoch(batch, self.spec.tag, self.stamps.epoch + 1)
        self._store.write(batch, sync=True)
        with self.lock:
            self.entry, self.family = entry, family
            self.stamps.commit_all()
        if old is not None:
            self._store.drop_family(old.name)

    def known(self, keys: Keys) -> Mask:
        """Return which keys are stored."""
        if self.family is None:
            return np.zeros(keys.size, np.bool_)
        values = self.family.multi_get(encode_keys(keys))
        return np.fromiter((v is not None for v in values), np.bool_, keys.size)

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
                pairs = family.scan(start, block_rows) if family else []
                if not pairs:
                    return
                keys, rows = zip(*pairs, strict=True)
                block = RowBlock(
                    decode_keys(keys), decode_rows(rows, spec.dim, spec.numpy_dtype)
                )
            yield block
            if len(pairs) < block_rows:
                return
            start = keys[-1] + b"\0"
