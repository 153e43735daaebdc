"""One table in host memory: its partitions, their growth, and their limits.

Invariants
----------
- Writers hold ``lock``; readers take the newest ``snapshot`` and no lock.
- A snapshot keeps alive every array whose address is in it, so memory that a reader may
  touch is freed only after the reader is gone.
- A snapshot is published before its index replaces the old one, and the old index is
  marked retired before any row changes again (see ``kernels.host.table``).
- ``n_bytes`` counts every array of the table and stays within ``max_bytes``, also while
  an index is being rebuilt.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import ConfigError
from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.tiers.arguments import for_kernel
from hps_numba.tiers.host_partition import (
    FIRST_SLOTS,
    FULL_LOAD,
    SEGMENT_OVERHEAD,
    Bytes,
    Partition,
    address,
    index_bytes,
    n_slots,
    slots_for,
)
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, OverflowPolicy, Rows, TableSpec

logger = logging.getLogger(__name__)

_POLICIES = {
    OverflowPolicy.EVICT_RANDOM: kernel.RANDOM,
    OverflowPolicy.EVICT_LEAST_USED: kernel.LEAST_USED,
    OverflowPolicy.EVICT_OLDEST: kernel.OLDEST,
}
_FIXED_BYTES = UpdateStamps.nbytes + 8192  # of a table, its objects among them
_READER_PATIENCE_S = 1.0  # how long a writer waits for readers of an old index
_READER_POLL_S = 50e-6


@dataclass(frozen=True)
class Overflow:
    """What a table partition does when it is full."""

    policy: OverflowPolicy = OverflowPolicy.EVICT_RANDOM
    margin: int | None = None  # most rows per partition
    target: float = 0.8  # share of the margin that eviction leaves


@dataclass(frozen=True)
class Snapshot:
    """What readers see: addresses, and the arrays that they point into."""

    descriptor: NDArray[np.int64]
    arrays: tuple[Bytes, ...]


def bytes_for_rows(
    spec: TableSpec,
    n_rows: int,
    *,
    n_partitions: int,
    overflow: Overflow,
    capped: bool,
) -> int:
    """Return the most bytes that a table of ``n_rows`` takes, growth included.

    A budget of as many bytes holds the rows, however the hash spreads them (within four
    standard deviations). Without a budget, segments double and so may be half empty.
    """
    rows = n_rows / n_partitions
    rows_each = int(rows + 4 * math.sqrt(rows)) + 2
    if overflow.margin is not None:
        rows_each = min(rows_each, overflow.margin + 2)
    per_row = spec.row_bytes + _row_overhead(overflow.policy)
    slots = slots_for(rows_each)
    if not capped:
        n_segments = (-(-rows_each >> kernel.SEGMENT_SHIFT)).bit_length()
        rows_each = ((1 << n_segments) - 1) << kernel.SEGMENT_SHIFT
        if overflow.margin is not None:
            rows_each = min(rows_each, overflow.margin + 1)
        per_row += 2  # the free list is copied when it grows
    each = 2 * index_bytes(slots) + SEGMENT_OVERHEAD + rows_each * per_row
    return _FIXED_BYTES + n_partitions * each


class HostTable:
    """The rows of one table.

    Parameters
    ----------
    spec
        The table.
    n_partitions
        Number of partitions, each with an index and rows of its own.
    overflow
        Eviction policy and bound.
    max_bytes
        Budget of the table, or None.

    Raises
    ------
    ConfigError
        If the budget holds no row per partition.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        n_partitions: int,
        overflow: Overflow,
        max_bytes: int | None,
    ) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.stamps = UpdateStamps()  # guarded by lock
        self.policy = _POLICIES[overflow.policy]
        self.ticks = count(1)  # each use of the table takes the next
        self.evictions = 0  # guarded by lock
        self.refused_backfills = 0  # guarded by lock
        self.max_bytes = max_bytes
        self._overflow = overflow
        self._random = np.random.default_rng(0)
        self._n_partitions = n_partitions
        self.capacity = self._capacity()
        self._partitions = [
            Partition(
                self.margin,
                spec.row_bytes,
                scored=self.policy != kernel.RANDOM,
                capped=max_bytes is not None,
            )
            for _ in range(n_partitions)
        ]
        self._descriptor = np.zeros((n_partitions, kernel.D_FIELDS), np.int64)
        for p, partition in enumerate(self._partitions):
            partition.describe(self._descriptor[p])
        self._retired: list[weakref.ref[Bytes]] = []  # guarded by lock
        self._publish()

    @property
    def margin(self) -> int:
        """Most rows per partition, by configuration or by the budget."""
        margin = self._overflow.margin
        return self.capacity if margin is None else min(margin, self.capacity)

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(int(p.state[writing.S_SIZE]) for p in self._partitions)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays and objects."""
        return _FIXED_BYTES + sum(p.n_bytes for p in self._partitions)

    def clear_locked(self) -> None:
        """Forget all rows. Their memory stays with the table, for new rows."""
        for p, partition in enumerate(self._partitions):
            writing.clear_slots(self._descriptor, p, partition.state)

    def upsert_locked(self, keys: Keys, rows: Rows) -> None:
        """Store rows, growing or evicting where there is no room."""
        keys, rows = for_kernel(keys), for_kernel(rows)
        tick = next(self.ticks)
        order, bounds = group_by_partition(keys, len(self._partitions))
        as_bytes = rows.view(np.uint8)
        for p, partition in enumerate(self._partitions):
            todo = order[bounds[p] : bounds[p + 1]]
            while todo.size:
                reason, done = writing.upsert_rows(
                    self._descriptor,
                    p,
                    partition.state,
                    partition.free,
                    keys,
                    as_bytes,
                    todo,
                    partition.limits,
                    self.policy,
                    tick,
                )
                todo = todo[done:]
                self._make_room(p, reason)

    def remove_locked(self, keys: Keys) -> int:
        """Remove keys and return how many were there."""
        keys = for_kernel(keys)
        order, bounds = group_by_partition(keys, len(self._partitions))
        return sum(
            writing.remove_keys(
                self._descriptor,
                p,
                partition.state,
                partition.free,
                keys,
                order[bounds[p] : bounds[p + 1]],
            )
            for p, partition in enumerate(self._partitions)
        )

    def keys_by_partition(self) -> Iterator[Keys]:
        """Yield the keys of each partition, as they are when it is reached."""
        for p in range(len(self._partitions)):
            with self.lock:
                keys = np.empty(self._partitions[p].state[writing.S_SIZE], np.int64)
                n = kernel.list_keys(self._descriptor, p, keys)
            yield keys[:n]

    def _make_room(self, p: int, reason: int) -> None:
        if reason == writing.NEED_EVICTION:
            self._evict(p)
        elif reason == writing.NEED_ROWS:
            self._partitions[p].add_segment()
            self._partitions[p].describe(self._descriptor[p])
            self._publish()
        elif reason == writing.NEED_INDEX:
            self._rebuild_index(p)

    def _evict(self, p: int) -> None:
        partition = self._partitions[p]
        goal = min(int(self.margin * self._overflow.target), self.margin - 1)
        # Rows used while victims are chosen are spared, so one pass may not do.
        for policy in (self.policy, self.policy, kernel.RANDOM):
            excess = int(partition.state[writing.S_SIZE]) - goal
            if excess <= 0:
                return
            self.evictions += writing.evict_rows(
                self._descriptor,
                p,
                partition.state,
                partition.free,
                excess,
                policy,
                int(self._random.integers(1 << 62)),
            )

    def _rebuild_index(self, p: int) -> None:
        partition = self._partitions[p]
        if self.max_bytes is not None:
            self._await_readers()
        old = partition.index
        index = partition.new_index()
        writing.rebuild_index(
            self._descriptor,
            p,
            partition.state,
            address(index),
            n_slots(index) - 1,
        )
        partition.set_index(index)
        partition.describe(self._descriptor[p])
        self._publish()
        writing.retire_index(address(old))
        self._retired.append(weakref.ref(old))

    def _await_readers(self) -> None:
        """Wait until no reader keeps an old index: the budget has room for one more.

        Readers are in compiled code or on their way out of it, and wait for nothing.
        """
        for _ in range(int(_READER_PATIENCE_S / _READER_POLL_S)):
            self._retired = [old for old in self._retired if old() is not None]
            if not self._retired:
                return
            time.sleep(_READER_POLL_S)
        logger.warning(
            "tag=%s over_budget_indexes=%d: a reader has kept an old index for %.0f s",
            self.spec.tag,
            len(self._retired),
            _READER_PATIENCE_S,
        )

    def _publish(self) -> None:
        arrays = tuple(a for p in self._partitions for a in p.arrays())
        self.snapshot = Snapshot(self._descriptor.copy(), arrays)

    def _capacity(self) -> int:
        """Return the rows per partition that the budget allows, rebuilds included."""
        if self.max_bytes is None:
            return kernel.MAX_ROWS
        n_partitions = self._n_partitions
        budget = (self.max_bytes - _FIXED_BYTES) // n_partitions
        per_row = self.spec.row_bytes + _row_overhead(self._overflow.policy)
        best, slots = 0, FIRST_SLOTS
        while 2 * index_bytes(slots) < budget:
            left = budget - 2 * index_bytes(slots) - SEGMENT_OVERHEAD
            best = max(best, min(int(slots * FULL_LOAD), left // per_row - 1))
            slots *= 2
        if best < 1:
            raise ConfigError(
                f"table {self.spec.tag}: {self.max_bytes} bytes of host memory hold no "
                f"row in each of {n_partitions} partitions (a row takes {per_row} "
                f"bytes, the table {_FIXED_BYTES} more); raise "
                f"volatile_db.max_bytes or lower volatile_db.num_partitions"
            )
        return best


def _row_overhead(policy: OverflowPolicy) -> int:
    """Bytes per row beside the row itself: its place in the free list, its score."""
    return 4 if policy is OverflowPolicy.EVICT_RANDOM else 12
