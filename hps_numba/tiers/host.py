"""The host memory tier: hash tables in this process.

Lookups take no lock and hold no GIL while rows move; see ``kernels.host.table``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np

from hps_numba.errors import ClosedError, ConfigError, UnknownTableError
from hps_numba.kernels.host import table as kernel
from hps_numba.tiers.arguments import check_keys, check_output, check_rows, for_kernel
from hps_numba.tiers.base import Epoch, Tier, TierStats
from hps_numba.tiers.host_table import HostTable, Overflow
from hps_numba.types import (
    Keys,
    Mask,
    OverflowPolicy,
    Progress,
    RowBlock,
    Rows,
    TableSpec,
)

_MIN_KEYS_PER_THREAD = 16_384
_SNAPSHOT_ATTEMPTS = 32
_UNCOUNTED = 0  # the tick of a fetch that is no use of the rows

_FetchArgs = tuple[HostTable, Keys, Rows, Mask, int]


class HostTier(Tier):
    """Tables in host memory.

    Parameters
    ----------
    num_partitions
        Partitions per table, each with an index and rows of its own.
    max_bytes
        Budget of all tables together, or None. It is never exceeded: a table that has
        used its share evicts.
    overflow_margin
        Most rows per partition, or None.
    overflow_policy
        Which rows a full partition gives up. ``evict_random`` costs a lookup nothing;
        the others write a score per hit. A batch that is stored is used, too.
    overflow_resolution_target
        Share of the margin that eviction leaves.
    num_threads
        Threads that a large ``fetch`` is spread over, the caller's among them.

    Raises
    ------
    ConfigError
        If there is no partition, no thread, or no row in a partition.

    Notes
    -----
    Thread-safe. Readers of a table never wait for writers; writers wait for each other.
    ``evict_least_used`` counts uses without locks, so simultaneous uses of one row may
    count once.
    """

    name = "host"
    local = True

    def __init__(
        self,
        *,
        num_partitions: int = 2,
        max_bytes: int | None = None,
        overflow_margin: int | None = None,
        overflow_policy: OverflowPolicy = OverflowPolicy.EVICT_RANDOM,
        overflow_resolution_target: float = 0.8,
        num_threads: int = 1,
    ) -> None:
        for option, value in (
            ("num_partitions", num_partitions),
            ("num_threads", num_threads),
            ("overflow_margin", 1 if overflow_margin is None else overflow_margin),
        ):
            if value < 1:
                raise ConfigError(f"host memory: {option}={value}; it is 1 or more")
        if not 0 <= overflow_resolution_target <= 1:
            raise ConfigError(
                f"host memory: overflow_resolution_target="
                f"{overflow_resolution_target}; it is between 0 and 1"
            )
        self._num_partitions = num_partitions
        self._max_bytes = max_bytes
        self._overflow = Overflow(
            OverflowPolicy(overflow_policy), overflow_margin, overflow_resolution_target
        )
        self._num_threads = num_threads
        self._pool = (
            ThreadPoolExecutor(num_threads - 1, thread_name_prefix="hps-host")
            if num_threads > 1
            else None
        )
        self._lock = threading.Lock()
        self._tables: dict[str, HostTable] = {}  # written under _lock
        self._closed = False

    def open_table(self, spec: TableSpec, *, max_bytes: int | None = None) -> None:
        """Create the table. Without ``max_bytes`` it gets what the budget has left."""
        with self._lock:
            if self._closed:
                raise ClosedError("the host memory tier is closed")
            known = self._tables.get(spec.tag)
            if known is None:
                self._tables[spec.tag] = HostTable(
                    spec,
                    n_partitions=self._num_partitions,
                    overflow=self._overflow,
                    max_bytes=self._grant(spec, max_bytes),
                )
            elif (known.spec.dim, known.spec.dtype) != (spec.dim, spec.dtype):
                raise ConfigError(
                    f"table {spec.tag} is open in host memory with dim "
                    f"{known.spec.dim}, {known.spec.dtype.value}; it cannot be opened "
                    f"with dim {spec.dim}, {spec.dtype.value}"
                )

    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,  # a fetch takes microseconds
    ) -> int:
        """Copy known rows; see ``Tier.fetch``. Takes no lock."""
        table = self._table(tag)
        n = keys.shape[0]
        check_rows(table.spec, keys, out)
        check_output(table.spec, out, found)
        if n == 0:
            return 0
        if not keys.flags.writeable or not keys.flags.aligned:
            keys = for_kernel(keys)
        tick = next(table.ticks)
        n_threads = min(self._num_threads, n // _MIN_KEYS_PER_THREAD)
        if n_threads <= 1 or self._pool is None:
            return _fetch(table, keys, out, found, tick)
        edges = [n * k // n_threads for k in range(n_threads + 1)]
        first, *others = (
            (table, keys[low:high], out[low:high], found[low:high], tick)
            for low, high in pairwise(edges)
        )
        parts = [self._submit(part) for part in others]
        return _fetch(*first) + sum(part.result() for part in parts)

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        """Store the newest rows of keys."""
        table = self._table(tag)
        check_rows(table.spec, keys, rows)
        with table.lock:
            try:
                table.upsert_locked(keys, rows)
            finally:
                table.stamps.commit(keys)

    def delete(self, tag: str, keys: Keys) -> int:
        """Remove keys for good."""
        table = self._table(tag)
        check_keys(table.spec, keys)
        with table.lock:
            removed = table.remove_locked(keys)
            table.stamps.commit(keys)
        return removed

    def load(
        self,
        tag: str,
        blocks: Iterable[RowBlock],
        *,
        progress: Progress | None = None,
    ) -> int:
        """Replace all rows, key by key, within the budget."""
        table = self._table(tag)
        fresh = table.size == 0
        loaded: list[Keys] = []
        n_rows = 0
        for block in blocks:
            check_rows(table.spec, block.keys, block.rows)
            with table.lock:
                try:
                    table.upsert_locked(block.keys, block.rows)
                finally:
                    table.stamps.commit_all()
            if not fresh:
                loaded.append(block.keys.copy())
            n_rows += len(block)
            if progress is not None:
                progress(len(block))
        if not fresh:
            keep = np.concatenate(loaded) if loaded else np.empty(0, np.int64)
            for keys in table.keys_by_partition():
                self.delete(tag, keys[~np.isin(keys, keep)])
        with table.lock:
            table.stamps.commit_all()
        return n_rows

    def epoch(self, tag: str) -> int:
        """Return the table's update epoch."""
        return self._table(tag).stamps.epoch

    def hold(self, tag: str, keys: Keys | None = None) -> AbstractContextManager[None]:
        """Refuse backfills of these keys while the context lasts."""
        table = self._table(tag)
        if keys is not None:
            check_keys(table.spec, keys)
        return table.stamps.held(table.lock, keys)

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        """Store rows that a lower tier gave, unless their keys changed since."""
        table = self._table(tag)
        check_rows(table.spec, keys, rows)
        with table.lock:
            assert isinstance(epoch, int)  # one of its own
            admitted = table.stamps.admit(keys, epoch)
            n_admitted = int(np.count_nonzero(admitted))
            if n_admitted < keys.size:
                table.refused_backfills += keys.size - n_admitted
                keys, rows = keys[admitted], rows[admitted]
            table.upsert_locked(keys, rows)
        return n_admitted

    def evict(self, tag: str, keys: Keys | None = None) -> int:
        """Forget keys (all, if None)."""
        table = self._table(tag)
        if keys is not None:
            check_keys(table.spec, keys)
        with table.lock:
            if keys is not None:
                return table.remove_locked(keys)
            size = table.size
            table.clear_locked()
            return size

    def iterate(self, tag: str, *, block_rows: int = 65_536) -> Iterator[RowBlock]:
        """Yield the rows; the keys of one partition are listed at a time."""
        table = self._table(tag)
        spec = table.spec
        for keys in table.keys_by_partition():
            for low in range(0, keys.size, block_rows):
                block = keys[low : low + block_rows]
                rows = np.empty((block.size, spec.dim), spec.numpy_dtype)
                found = np.zeros(block.size, np.bool_)
                _fetch(table, block, rows, found, _UNCOUNTED)
                yield RowBlock(block[found], rows[found])

    def tables(self, model: str) -> list[str]:
        """Return the model's table names."""
        self._check_open()
        return sorted(t.spec.name for t in self._opened() if t.spec.model == model)

    def size(self, tag: str) -> int:
        """Return the number of rows."""
        return self._table(tag).size

    def stats(self, tag: str) -> TierStats:
        """Return the table's counters."""
        table = self._table(tag)
        return TierStats(
            rows=table.size,
            bytes=table.n_bytes,
            evictions=table.evictions,
            refused_backfills=table.refused_backfills,
        )

    def drop_table(self, tag: str) -> None:
        """Remove the table; its memory goes when the last reader is done."""
        self._check_open()
        with self._lock:
            self._tables.pop(tag, None)

    def close(self) -> None:
        """Release all tables and threads."""
        with self._lock:
            self._closed = True
            self._tables.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def _submit(self, part: _FetchArgs) -> Future[int]:
        assert self._pool is not None
        try:
            return self._pool.submit(_fetch, *part)
        except RuntimeError as exc:  # the pool was shut down meanwhile
            raise ClosedError("the host memory tier is closed") from exc

    def _table(self, tag: str) -> HostTable:
        table = self._tables.get(tag)
        if table is None:
            self._check_open()
            raise UnknownTableError(f"no table {tag} is open in host memory")
        return table

    def _opened(self) -> list[HostTable]:
        with self._lock:
            return list(self._tables.values())

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the host memory tier is closed")

    def _grant(self, spec: TableSpec, max_bytes: int | None) -> int | None:
        if self._max_bytes is None:
            return max_bytes
        left = self._max_bytes - sum(t.max_bytes or 0 for t in self._tables.values())
        if max_bytes is not None and max_bytes > left:
            raise ConfigError(
                f"table {spec.tag} asks for {max_bytes} bytes of host memory; {left} "
                f"of volatile_db.max_bytes={self._max_bytes} are left"
            )
        return left if max_bytes is None else max_bytes


def _fetch(table: HostTable, keys: Keys, out: Rows, found: Mask, tick: int) -> int:
    policy = kernel.RANDOM if tick == _UNCOUNTED else table.policy
    as_bytes = out.view(np.uint8)
    hits, low, high = 0, 0, keys.shape[0]
    for _ in range(_SNAPSHOT_ATTEMPTS):
        snapshot = table.snapshot
        n, low = kernel.fetch_rows(
            snapshot.descriptor, keys, as_bytes, found, low, high, policy, tick
        )
        hits += n
        if low == high:
            return int(hits)
    # Writers keep changing what is read: shut them out once. One of them may be waiting
    # for the snapshot to go.
    del snapshot
    with table.lock:
        snapshot = table.snapshot
        n, _ = kernel.fetch_rows(
            snapshot.descriptor, keys, as_bytes, found, low, high, policy, tick
        )
    return int(hits + n)
