"""One open table of the Redis tier."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import time
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.layout import Bytes, Layout, Numbers
from hps_numba.tiers.redis.scripts import N_BUCKETS
from hps_numba.tiers.redis.tokens import Tokens, parsed
from hps_numba.tiers.stamps import UpdateStamps
from hps_numba.types import Keys, OverflowPolicy, TableSpec

Seen: TypeAlias = Sequence[bytes]
"""What a script tells of a partition: its number, and positions in the stream."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
_BUCKET_BITS = N_BUCKETS.bit_length() - 1


class RedisTable:
    """What this process knows of a table. ``lock`` serialises its writers.

    Parameters
    ----------
    layout
        Where the table lies.
    slots
        The slot of each partition.
    seen
        Each partition's update number and positions, as the server gave them.
    overflow
        What full partitions do.
    """

    def __init__(
        self, layout: Layout, slots: list[int], seen: list[Seen], overflow: Overflow
    ) -> None:
        self.layout = layout
        self.overflow = overflow
        self.slots = slots
        self.lock = threading.Lock()
        self.load_lock = threading.Lock()  # one load at a time; taken before lock
        self.stamps = UpdateStamps()  # guarded by lock
        self.tokens = Tokens(layout.n_partitions)  # guarded by lock
        self.refused_backfills = 0  # guarded by lock
        self.evictions = 0  # guarded by lock
        self.rows = 0  # when they were last counted
        self.cursors: dict[int, bytes] = {}  # of samples of rows; guarded by lock
        self._too_large: dict[int, int] = {}  # guarded by lock
        for partition, what in enumerate(seen):
            self.see_locked(partition, what)

    @property
    def spec(self) -> TableSpec:
        """The table."""
        return self.layout.spec

    @property
    def epoch(self) -> tuple[int, ...]:
        """The epoch of this process, and each partition's token."""
        return (self.stamps.epoch, *self.tokens.all())

    def held(self, keys: Keys | None) -> AbstractContextManager[None]:
        """Refuse backfills of keys (of all, if None) while the context lasts."""
        return self.stamps.held(self.lock, keys)

    @property
    def limited(self) -> bool:
        """Whether partitions have a margin."""
        return self.overflow.margin is not None

    @property
    def notes_uses(self) -> bool:
        """Whether lookups matter to which rows a full partition gives up."""
        return self.limited and self.overflow.policy is not OverflowPolicy.EVICT_RANDOM

    @property
    def margin(self) -> int:
        """Most rows of a partition."""
        assert self.overflow.margin is not None
        return self.overflow.margin

    @property
    def goal(self) -> int:
        """Rows that eviction leaves in a partition."""
        return max(int(self.margin * self.overflow.target), 1)

    def counted_key(self, partition: int) -> bytes:
        """Return the key of the hash that has a field for each row."""
        layout = self.layout
        if layout.has_hashes:
            return layout.rows_key(partition)
        return layout.uses_key(partition)

    def use(self) -> bytes | None:
        """Return what is noted of a row that is written now; None notes nothing."""
        policy, limited = self.overflow.policy, self.limited
        if limited and policy is OverflowPolicy.EVICT_OLDEST:
            return int(time()).to_bytes(8, "little")
        if limited and policy is OverflowPolicy.EVICT_LEAST_USED:
            return b"0"
        # Strings are not counted by partition but by what is noted of them.
        return b"0" if limited and not self.layout.has_hashes else None

    def see_locked(self, partition: int, seen: Seen) -> None:
        """Note a partition's number and positions, as a script returned them."""
        number, stream = seen
        self.tokens.see(partition, int(number), parsed(stream))

    def see_rows_locked(self, partition: int, n_rows: int, brought: int) -> None:
        """Note how many rows a partition has after a write that brought some."""
        if n_rows > self.margin:
            self._too_large[partition] = self._too_large.get(partition, 0) + brought

    def take_too_large_locked(self) -> dict[int, int]:
        """Return the partitions above the margin, and what was brought to each."""
        found, self._too_large = self._too_large, {}
        return found

    def grouped(self, keys: Keys) -> tuple[Numbers, Numbers]:
        """Return the positions of keys by partition, and each partition's bounds."""
        order, bounds = group_by_partition(keys, self.layout.n_partitions)
        return order, bounds


def buckets_of(keys: Keys) -> Bytes:
    """Return the stamp bucket of each key: two bytes, as fields of the stamps."""
    mixed: NDArray[np.uint64] = keys.view(np.uint64) * _MIX
    buckets = (mixed >> np.uint64(64 - _BUCKET_BITS)).astype("<u2")
    return buckets.view(np.uint8)


def buckets_to_stamp(keys: Keys) -> bytes:
    """Return the buckets of keys, each once; none stands for all."""
    buckets = np.unique(buckets_of(keys).view("<u2"))
    # Stamping each costs the server as much as writing a row.
    return b"" if buckets.size > N_BUCKETS // 2 else buckets.tobytes()
