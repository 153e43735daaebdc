"""A column family of a RocksDB database, and batches of writes to several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from time import sleep
from typing import Any

from rocksdict import IngestExternalFileOptions, Rdict, ReadOptions, WriteBatch

END_OF_ROWS = b"\xff" * 8 + b"\0"
"""Sorts after the key of every row; what lies beyond is not seen by scans."""

# rocksdict keeps the GIL while it fills a batch or a file, or reads on: other threads
# get it back after this many rows, which is below one millisecond.
_ROWS_PER_GIL = 1024


class Family:
    """One column family: a sorted map from bytes to bytes.

    Safe for several threads. A family that was dropped stays readable as long as a
    reader keeps this object; nothing may be written to it.
    """

    def __init__(self, db: Rdict, name: str) -> None:
        self.name = name
        self.handle = db.get_column_family_handle(name)
        self._map = db.get_column_family(name)
        self._scan_options = ReadOptions()
        self._scan_options.fill_cache(False)
        self._scan_options.set_iterate_upper_bound(END_OF_ROWS)

    def multi_get(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the value of each key, None where there is none."""
        values: list[bytes | None] = self._map.get(keys)
        return values

    def get(self, key: bytes) -> bytes | None:
        """Return the value of one key, or None."""
        value: bytes | None = self._map.get(key)
        return value

    def scan(self, start: bytes, limit: int) -> tuple[list[bytes], list[bytes]]:
        """Return up to ``limit`` keys from ``start`` on, in order, and their values."""
        items = self._map.items(from_key=start, read_opt=self._scan_options)
        keys: list[bytes] = []
        values: list[bytes] = []
        for pairs in _pieces(items, limit):
            some_keys, some_values = zip(*pairs, strict=True)
            keys += some_keys
            values += some_values
        if len(keys) < limit:
            self._check_end(keys[-1] + b"\0" if keys else start)
        return keys, values

    def scan_keys(self, start: bytes, limit: int) -> list[bytes]:
        """Return up to ``limit`` keys from ``start`` on, in order."""
        items = self._map.keys(from_key=start, read_opt=self._scan_options)
        keys: list[bytes] = [key for some in _pieces(items, limit) for key in some]
        if len(keys) < limit:
            self._check_end(keys[-1] + b"\0" if keys else start)
        return keys

    def beyond_rows(self) -> list[tuple[bytes, bytes]]:
        """Return all pairs from ``END_OF_ROWS`` on: there are few."""
        options = ReadOptions()
        pairs = list(self._map.items(from_key=END_OF_ROWS, read_opt=options))
        cursor = self._map.iter(options)
        cursor.seek(pairs[-1][0] + b"\0" if pairs else END_OF_ROWS)
        cursor.status()
        return pairs

    def _check_end(self, start: bytes) -> None:
        """Raise if rows from ``start`` on cannot be read: iteration stops silently."""
        cursor = self._map.iter(self._scan_options)
        cursor.seek(start)
        cursor.status()

    def estimate_keys(self) -> int:
        """Return RocksDB's estimate of the number of keys."""
        return self._property("rocksdb.estimate-num-keys")

    def estimate_bytes(self) -> int:
        """Return the bytes of the family's files and memtables."""
        return self._property("rocksdb.live-sst-files-size") + self._property(
            "rocksdb.size-all-mem-tables"
        )

    def ingest(self, files: Sequence[str]) -> None:
        """Take over sorted files, all in one step."""
        options = IngestExternalFileOptions()
        options.set_move_files(True)
        self._map.ingest_external_file(list(files), options)

    def close(self) -> None:
        """Write what is in memory to files and let go of the database."""
        try:
            self._map.close()
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of the database; a family that was dropped cannot be closed."""
        del self.handle, self._map

    def _property(self, name: str) -> int:
        return int(self._map.property_int_value(name) or 0)


class Batch:
    """Writes that are applied together or not at all."""

    def __init__(self) -> None:
        self.pending = WriteBatch(raw_mode=True)

    def put_all(
        self, family: Family, keys: Sequence[bytes], values: Sequence[bytes]
    ) -> None:
        """Add one pair per key."""
        self.pending.set_default_column_family(family.handle)
        call_all(self.pending.__setitem__, keys, values)

    def delete_all(self, family: Family, keys: Sequence[bytes]) -> None:
        """Add one removal per key."""
        self.pending.set_default_column_family(family.handle)
        call_all(self.pending.__delitem__, keys)

    def put(self, family: Family, key: bytes, value: bytes) -> None:
        """Add one pair."""
        self.pending.put(key, value, family.handle)

    def delete(self, family: Family, key: bytes) -> None:
        """Add one removal."""
        self.pending.delete(key, family.handle)


def _pieces(items: Iterator[Any], limit: int) -> Iterator[list[Any]]:
    """Yield the first ``limit`` items in lists."""
    for start in range(0, limit, _ROWS_PER_GIL):
        piece = list(islice(items, min(_ROWS_PER_GIL, limit - start)))
        if not piece:
            return
        yield piece


def call_all(method: object, *columns: Sequence[bytes]) -> None:
    """Call a method for each row of the columns, without a Python loop per row."""
    for start in range(0, len(columns[0]), _ROWS_PER_GIL):
        rows = (column[start : start + _ROWS_PER_GIL] for column in columns)
        deque(map(method, *rows), maxlen=0)  # type: ignore[call-overload]
        sleep(0)  # or the GIL changes hands after 5 ms
