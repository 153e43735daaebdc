"""Keys that a GPU cache lacks: fetched, copied, scattered to the output, inserted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.lane import Lane
from hps_numba.runtime.gpu.staging import Staged
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.types import Keys, Mask

if TYPE_CHECKING:
    from hps_numba.runtime.gpu.requests import GroupQuery, Part

_NO_KEYS = np.zeros(0, np.int64)


class Missing:
    """What one table of a lookup lacks.

    Attributes
    ----------
    keys
        Unique missing keys, int64 (n_unique,), once they were read.
    found
        Which of them a tier had.
    """

    def __init__(
        self,
        query: GroupQuery,
        part: Part,
        n_missing: int,
        n_unique: int,
        n_unique_hits: int,
    ) -> None:
        self.query, self.part = query, part
        self.n_missing, self.n_unique = n_missing, n_unique
        self.n_unique_hits = n_unique_hits
        self.keys: Keys = _NO_KEYS
        self.found: Mask = np.zeros(n_unique, np.bool_)

    @property
    def cache(self) -> TableCache:
        """The table's cache."""
        return self.part.cache

    @property
    def table(self) -> Hierarchy:
        """The tiers below it."""
        return self.part.asked.table

    @property
    def hit_rate(self) -> float:
        """Share of the lookup's unique keys that hit; 0 if hits were not counted."""
        return self.n_unique_hits / (self.n_unique_hits + self.n_unique)

    def read_keys(self, stream: int) -> None:
        """Queue the copy of the unique missing keys to the host."""
        lane = self.query.lane
        self.keys = lane.read_unique(self.part.start, self.n_unique, stream)

    def defer(self) -> None:
        """Count the keys as deferred; they keep their default rows."""
        self.part.n_deferred = self.n_missing

    def mark_found(self, stream: int) -> None:
        """Count default rows, and say of each occurrence whether it was found."""
        part = self.part
        if self.found.all() or (part.n_deferred and part.found is None):
            return
        positions, numbers = self.query.lane.read_missing(
            part.start, part.n_keys, self.n_missing, stream
        )
        found = self.found[numbers]
        if part.found is not None:
            part.found[positions] = found
        if not part.n_deferred:
            part.n_defaults = self.n_missing - int(np.count_nonzero(found))


class Misses:
    """The blocks through which the rows of missing keys reach the device.

    Parameters
    ----------
    cache
        The cache.
    lane
        The lookup's buffers.
    missing
        What is missing, with its keys.
    stream
        The lookup's stream.

    Attributes
    ----------
    work
        The chunks, in order, for a pipeline whose blocks this object is.
    """

    def __init__(
        self, cache: GpuCache, lane: Lane, missing: Sequence[Missing], stream: int
    ) -> None:
        self._gpu: Gpu = cache.gpu
        self._lane = lane
        self._stream = stream
        self._chunks: list[tuple[Missing, int, Chunk, Staged]] = []
        for one in missing:
            for first in range(0, one.n_unique, cache.block_rows):
                keys = one.keys[first : first + cache.block_rows]
                staging = lane.staging[len(self._chunks) % 2]
                staged = staging.lay_out(keys.size, one.cache.spec)
                found = one.found[first : first + keys.size]
                chunk = Chunk(keys, staged.rows, found)
                self._chunks.append((one, first, chunk, staged))
        self._epochs = [0] * len(self._chunks)
        self.work = [(one.table, chunk) for one, _, chunk, _ in self._chunks]

    def take(self, number: int) -> None:
        """Wait until the block of a chunk is free."""
        self._lane.staging[number % 2].wait()
        # Before the rows are read: see "No resurrection" in cache.
        self._epochs[number] = self._chunks[number][0].cache.epoch

    def give(self, number: int) -> None:
        """Queue the way of a chunk's rows to the output and into the cache."""
        one, first, chunk, staged = self._chunks[number]
        spec, n, lane, side = (
            one.cache.spec,
            chunk.keys.size,
            self._lane,
            self._lane.side,
        )
        one.part.n_joined += chunk.joined
        one.part.degraded |= chunk.degraded
        if not chunk.done:
            staged.rows[~chunk.found] = spec.default_value
            staged.selected[:] = chunk.found
            self._send(staged, staged.selected_offset, n)
        self._send(staged, 0, staged.rows.nbytes)
        lane.copied.record(side)
        lane.copied.hold_up(self._stream)
        query = one.query
        query.cache.scatter(
            query.batch,
            one.cache.index - query.first_table,
            staged.base,
            first=first,
            n_rows=n,
            out=query.out,
            work=query.lane.workspace,
            stream=self._stream,
        )
        # The block is free when both are done, so one comes after the other.
        lane.copied.record(self._stream)
        lane.copied.hold_up(side)
        query.cache.insert(
            one.cache.index,
            n if chunk.resolved else 0,
            keys=query.lane.unique(one.part.start + first),
            values=staged.base,
            epoch=self._epochs[number],
            selected=0 if chunk.done else staged.selected_address,
            stream=side,
        )
        lane.staging[number % 2].used_until_now(side)

    def _send(self, staged: Staged, offset: int, n_bytes: int) -> None:
        source = staged.host + offset
        self._gpu.copy(staged.base + offset, source, n_bytes, self._lane.side)
