"""A RocksDB database: column families, atomic batches, sorted files, errors.

This file and ``rocksdb_family`` alone know rocksdict. They move bytes; keys, rows and
tables are the business of ``hps_numba.tiers.rocksdb``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from weakref import WeakSet

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    SstFileWriter,
    WriteOptions,
)

from hps_numba.errors import (
    ClosedError,
    HPSError,
    TierCorruptionError,
    TierUnavailableError,
)
from hps_numba.tiers.rocksdb_errors import NAME, tier_error
from hps_numba.tiers.rocksdb_family import Batch, Family, call_all
from hps_numba.tiers.rocksdb_files import remove_leftovers

META_FAMILY = "hps_meta"

_BLOOM_BITS = 10
_BLOCK_BYTES = 16 << 10
# Small memtables are quick to insert into, and a batch is written under the GIL: 1024
# rows of dim 32 take 1.1 ms instead of 2.0 ms. Several go to one file, so there are no
# more files to compact; filters keep reads from searching each (decision 0012).
_MEMTABLE_BYTES = 8 << 20
_MEMTABLES_PER_FILE = 8
_MEMTABLES = 12  # when all are full, writes wait
_MEMTABLE_FILTER = 0.02  # of its bytes

_CONGESTION = ("rocksdb.actual-delayed-write-rate", "rocksdb.is-write-stopped")
_WAIT_S = 0.001
_LONGEST_WAIT_S = 10.0


class RocksStore:
    """An open database, used inside ``using`` only.

    The last user who leaves after ``close`` closes the files.

    Parameters
    ----------
    path
        Directory of the database; created if missing, unless read-only.
    read_only
        Refuse writes; another process may have the database open.
    cache_bytes
        Block cache, shared by all families.
    direct_reads
        Read around the operating system's page cache.
    on_close
        Called when the last user has left after ``close``.

    Raises
    ------
    TierUnavailableError
        If the path cannot be used or another process holds the database.
    TierCorruptionError
        If the files are damaged.
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool,
        cache_bytes: int,
        direct_reads: bool,
        on_close: Callable[[], None],
    ) -> None:
        self.path = path
        self.read_only = read_only
        self._on_close = on_close
        self._options = _options(cache_bytes, direct_reads=direct_reads)
        self._lock = threading.Lock()
        self._users = 0  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._families: dict[str, Family] = {}  # guarded by _lock
        self._dropped: WeakSet[Family] = WeakSet()  # guarded by _lock
        with map_exceptions(path):
            self._db = self._open()
            for name in self._stored_families():
                self._families[name] = Family(self._db, name)

    @contextmanager
    def using(self, tag: str = "") -> Iterator[None]:
        """Keep the database open and translate its errors.

        Raises
        ------
        ClosedError
            If ``close`` was called before.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{NAME}: the database {self.path} is closed")
            self._users += 1
        try:
            with map_exceptions(self.path, tag):
                yield
        finally:
            self._leave()

    def check_writable(self, tag: str) -> None:
        """Refuse to write to a database that is open read-only."""
        if self.read_only:
            raise TierUnavailableError(
                f"{self.path} is open read-only; set persistent_db.read_only to false "
                f"to create or change tables",
                tier=NAME,
                tag=tag,
            )

    def family(self, name: str) -> Family:
        """Return a family that the metadata names."""
        with self._lock:
            family = self._families.get(name)
        if family is None:
            raise TierCorruptionError(
                f"{self.path}: the column family {name} is missing; restore the "
                "database, or remove it and deploy again",
                tier=NAME,
            )
        return family

    def families(self) -> list[str]:
        """Return the names of all families."""
        with self._lock:
            return list(self._families)

    def create_family(self, name: str) -> Family:
        """Create an empty family."""
        self._db.create_column_family(name, self._options)
        family = Family(self._db, name)
        with self._lock:
            self._families[name] = family
        return family

    def drop_family(self, name: str) -> None:
        """Drop a family; readers that hold it may finish."""
        with self._lock:
            self._dropped.add(self._families.pop(name))
        self._db.drop_column_family(name)

    def write(self, batch: Batch, *, sync: bool = False) -> None:
        """Apply a batch; it survives the end of this process.

        Parameters
        ----------
        batch
            Consumed by the call.
        sync
            Wait until the disk has it, so that it survives a power failure too.
        """
        options = WriteOptions()
        options.sync = sync
        self._wait_for_room()
        self._db.write(batch.pending, options)

    def _wait_for_room(self) -> None:
        """Wait while RocksDB lets writes wait: it would do so with the GIL held."""
        deadline = monotonic() + _LONGEST_WAIT_S
        while self.is_congested() and monotonic() < deadline:
            sleep(_WAIT_S)

    def is_congested(self) -> bool:
        """Return whether compaction is so far behind that writes are slowed down."""
        return any(self._db.property_int_value(name) for name in _CONGESTION)

    def write_files(
        self,
        directory: Path,
        pairs: Iterable[tuple[list[bytes], list[bytes] | None]],
        *,
        file_bytes: int,
    ) -> list[str]:
        """Write ascending pairs, or removals, to files and return their paths."""
        files: list[str] = []
        writer = None
        for keys, values in pairs:
            if writer is None:
                files.append(str(directory / f"{len(files):06d}.sst"))
                writer = SstFileWriter(self._options)
                writer.open(files[-1])
            if values is None:
                call_all(writer.__delitem__, keys)
            else:
                call_all(writer.__setitem__, keys, values)
            if writer.file_size() >= file_bytes:
                writer.finish()
                writer = None
        if writer is not None:
            writer.finish()
        return files

    def close(self) -> None:
        """Refuse further use; the last user closes the files."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and self._users == 0
        if last:
            self._on_close()
            with map_exceptions(self.path):
                self._close_files()

    def _close_files(self) -> None:
        with ExitStack() as closing:  # all of it, also where the disk refuses writes
            closing.callback(self._db.close)
            closing.callback(self._families.clear)
            for family in self._dropped:  # somebody may still name it
                closing.callback(family.forget)
            for family in self._families.values():
                closing.callback(family.close)

    def _open(self) -> Rdict:
        access = AccessType.read_only(False)
        if not self.read_only:
            access = AccessType.read_write()
            os.makedirs(self.path, exist_ok=True)
        families = dict.fromkeys(self._stored_families(), self._options)
        db = Rdict(self.path, self._options, families, access)
        if not self.read_only:
            remove_leftovers(self.path)  # now that nobody else can be loading
        return db

    def _stored_families(self) -> list[str]:
        if not self.read_only and not (Path(self.path) / "CURRENT").exists():
            return []
        stored = Rdict.list_cf(self.path, self._options)
        return [name for name in stored if name != "default"]


@contextmanager
def map_exceptions(path: str, tag: str = "") -> Iterator[None]:
    """Translate what rocksdict and the file system raise to this package's errors."""
    try:
        yield
    except HPSError:
        raise
    except DbClosedError as exc:
        raise ClosedError(f"{NAME}: the database {path} is closed") from exc
    except OSError as exc:
        raise TierUnavailableError(
            f"{path}: {exc.strerror or exc}; check the path and its permissions",
            tier=NAME,
            tag=tag,
        ) from exc
    except Exception as exc:
        # rocksdict raises plain Exception with the text of RocksDB's status.
        if type(exc) is not Exception:
            raise
        raise tier_error(path, tag, str(exc)) from exc


def _options(cache_bytes: int, *, direct_reads: bool) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(Cache(cache_bytes))
    table.set_block_size(_BLOCK_BYTES)
    table.set_bloom_filter(_BLOOM_BITS, False)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())
    options.set_write_buffer_size(_MEMTABLE_BYTES)
    options.set_min_write_buffer_number_to_merge(_MEMTABLES_PER_FILE)
    options.set_max_write_buffer_number(_MEMTABLES)
    options.set_memtable_prefix_bloom_ratio(_MEMTABLE_FILTER)
    options.set_memtable_whole_key_filtering(True)
    options.set_use_direct_reads(direct_reads)
    options.set_keep_log_file_num(4)
    return options
