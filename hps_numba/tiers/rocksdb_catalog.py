"""What a RocksDB database says about its tables.

Entries live in a family of their own and are put into the batch of the rows that they
are about: ``table/<tag>`` (JSON) and ``epoch/<tag>`` (decimal).
``format`` marks the database as this package's, so that no other is written to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.errors import ConfigError, TierCorruptionError
from hps_numba.tiers.rocksdb_errors import NAME
from hps_numba.tiers.rocksdb_family import Batch
from hps_numba.tiers.rocksdb_store import META_FAMILY, RocksStore
from hps_numba.types import TableSpec

_FORMAT = b"format"
_VERSION = b"1"
_TABLE = b"table/"
_EPOCH = b"epoch/"
_SCAN_ROWS = 4096


@dataclass(frozen=True)
class Entry:
    """One table: its shape, the family that is live, and the files it came from."""

    model: str
    name: str
    dim: int
    dtype: str
    generation: int = 0  # families that the table has had
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
    """Reads and writes the metadata of one database. As thread-safe as the store.

    Raises
    ------
    ConfigError
        If the database is another program's, or has another format.
    TierUnavailableError
        If it is empty and open read-only.
    """

    def __init__(self, store: RocksStore) -> None:
        self._store = store
        if META_FAMILY in store.families():
            self._meta = store.family(META_FAMILY)
        else:
            self._check_new()
            self._meta = store.create_family(META_FAMILY)
        self._check_format()

    def entries(self) -> dict[str, Entry]:
        """Return every table's entry by tag."""
        return {
            tag.decode(): self._entry(tag.decode(), value)
            for tag, value in self._with_prefix(_TABLE)
        }

    def entry(self, tag: str) -> Entry | None:
        """Return a table's entry, or None."""
        value = self._meta.get(_TABLE + tag.encode())
        return None if value is None else self._entry(tag, value)

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
        value = self._meta.get(_EPOCH + tag.encode())
        return 0 if value is None else self._number(tag, value)

    def put_entry(self, batch: Batch, tag: str, entry: Entry) -> None:
        """Add a table's entry to a batch."""
        text = json.dumps(asdict(entry))
        batch.put(self._meta, _TABLE + tag.encode(), text.encode())

    def put_epoch(self, batch: Batch, tag: str, epoch: int) -> None:
        """Add a table's epoch to a batch."""
        batch.put(self._meta, _EPOCH + tag.encode(), b"%d" % epoch)

    def remove(self, batch: Batch, tag: str) -> None:
        """Add the removal of a table to a batch."""
        batch.delete(self._meta, _TABLE + tag.encode())
        batch.delete(self._meta, _EPOCH + tag.encode())

    def _with_prefix(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        start = prefix
        while True:
            pairs = zip(*self._meta.scan(start, _SCAN_ROWS), strict=True)
            ours = [(key, value) for key, value in pairs if key.startswith(prefix)]
            found += [(key[len(prefix) :], value) for key, value in ours]
            if len(ours) < _SCAN_ROWS:
                return found
            start = ours[-1][0] + b"\0"

    def _check_new(self) -> None:
        path, families = self._store.path, self._store.families()
        if families:
            raise ConfigError(
                f"{NAME}: {path} is the database of another program, with column "
                f"families {', '.join(sorted(families)[:3])}: use another path"
            )
        self._store.check_writable("")

    def _check_format(self) -> None:
        version = self._meta.get(_FORMAT)
        if version is None and not self.entries():  # new, or killed when it was
            self._store.check_writable("")
            batch = Batch()
            batch.put(self._meta, _FORMAT, _VERSION)
            self._store.write(batch)
        elif version != _VERSION:
            raise ConfigError(
                f"{NAME}: {self._store.path} has format {version!r}; this version "
                f"of hps_numba reads {_VERSION!r}: deploy to another path"
            )

    def _entry(self, tag: str, value: bytes) -> Entry:
        try:
            return Entry(**json.loads(value))
        except (TypeError, ValueError) as exc:
            raise self._unreadable(tag, value) from exc

    def _number(self, tag: str, value: bytes) -> int:
        try:
            return int(value)
        except ValueError as exc:
            raise self._unreadable(tag, value) from exc

    def _unreadable(self, tag: str, value: bytes) -> TierCorruptionError:
        return TierCorruptionError(
            f"{self._store.path}: metadata {value!r} cannot be read; restore the "
            "database, or remove it and deploy again",
            tier=NAME,
            tag=tag,
        )
