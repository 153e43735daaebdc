"""What a RocksDB database says about its tables, and about where updates came from.

Entries live in a family of their own and are put into the batch of the rows that they
are about: ``table/<tag>`` (JSON), ``epoch/<tag>`` and ``offset/<source>`` (decimal).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.errors import ConfigError, TierCorruptionError
from hps_numba.tiers.rocksdb_store import NAME, Batch, RocksStore
from hps_numba.types import TableSpec

_TABLE = b"table/"
_EPOCH = b"epoch/"
_OFFSET = b"offset/"
_SCAN_ROWS = 4096


@dataclass(frozen=True)
class Entry:
    """One table: its shape, the family that is live, and the files it came from."""

    model: str
    name: str
    dim: int
    dtype: str
    generation: int = 0
    family: str | None = None  # None: nothing was stored yet
    fingerprint: dict[str, Any] | None = None
    loaded_epoch: int = -1  # the epoch right after the last load

    @classmethod
    def of(cls, spec: TableSpec) -> Entry:
        """Return the entry of a table without rows."""
        return cls(spec.model, spec.name, spec.dim, spec.dtype.value)

    def check_shape(self, spec: TableSpec, path: str) -> None:
        """Refuse a table of another dim or dtype than this."""
        if (self.dim, self.dtype) != (spec.dim, spec.dtype.value):
            raise ConfigError(
                f"table {spec.tag} is stored in {path} with dim {self.dim}, "
                f"{self.dtype}; it cannot be opened with dim {spec.dim}, "
                f"{spec.dtype.value}: correct the configuration, or remove the table"
            )


class Catalog:
    """Reads and writes the metadata of one database. As thread-safe as the store."""

    def __init__(self, store: RocksStore) -> None:
        self._store = store

    def entries(self) -> dict[str, Entry]:
        """Return every table's entry by tag."""
        return {
            tag.decode(): _parsed(self._store.path, tag.decode(), value)
            for tag, value in self._with_prefix(_TABLE)
        }

    def entry(self, tag: str) -> Entry | None:
        """Return a table's entry, or None."""
        if not self._store.has_meta:
            return None
        value = self._store.meta.get(_TABLE + tag.encode())
        return None if value is None else _parsed(self._store.path, tag, value)

    def create(self, spec: TableSpec) -> Entry:
        """Store and return the entry of a new table."""
        self._store.check_writable(spec.tag)
        batch = Batch()
        entry = Entry.of(spec)
        self.put_entry(batch, spec.tag, entry)
        self._store.write(batch)
        return entry

    def epoch(self, tag: str) -> int:
        """Return a table's update epoch."""
        value = self._store.meta.get(_EPOCH + tag.encode())
        return int(value) if value is not None else 0

    def offsets(self) -> dict[str, int]:
        """Return the stored position of every update source."""
        return {
            source.decode(): int(value) for source, value in self._with_prefix(_OFFSET)
        }

    def put_entry(self, batch: Batch, tag: str, entry: Entry) -> None:
        """Add a table's entry to a batch."""
        text = json.dumps(asdict(entry))
        batch.put(self._store.meta, _TABLE + tag.encode(), text.encode())

    def put_epoch(self, batch: Batch, tag: str, epoch: int) -> None:
        """Add a table's epoch to a batch."""
        batch.put(self._store.meta, _EPOCH + tag.encode(), b"%d" % epoch)

    def put_offsets(self, batch: Batch, offsets: Mapping[str, int]) -> None:
        """Add positions of update sources to a batch."""
        for source, offset in offsets.items():
            batch.put(self._store.meta, _OFFSET + source.encode(), b"%d" % offset)

    def remove(self, batch: Batch, tag: str) -> None:
        """Add the removal of a table to a batch."""
        batch.delete(self._store.meta, _TABLE + tag.encode())
        batch.delete(self._store.meta, _EPOCH + tag.encode())

    def _with_prefix(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        start = prefix
        while self._store.has_meta:
            pairs = self._store.meta.scan(start, _SCAN_ROWS)
            ours = [(k, v) for k, v in pairs if k.startswith(prefix)]
            found += [(key[len(prefix) :], value) for key, value in ours]
            if len(ours) < _SCAN_ROWS:
                break
            start = ours[-1][0] + b"\0"
        return found


def _parsed(path: str, tag: str, value: bytes) -> Entry:
    try:
        return Entry(**json.loads(value))
    except (TypeError, ValueError) as exc:
        raise TierCorruptionError(
            f"{path}: the table's metadata cannot be read: {exc}", tier=NAME, tag=tag
        ) from exc
