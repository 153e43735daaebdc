"""One table of a GPU cache, and the group of tables whose rows are like its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import CacheError, DeviceError
from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.kernels.cuda.layout import (
    EVICTED,
    HITS,
    INSERTED,
    MISSES,
    REFUSED,
    SIZE,
    TABLE_BYTES,
    UPDATED,
    WAYS,
    CacheLayout,
    Outcome,
)
from hps_numba.runtime.gpu.errors import device_errors
from hps_numba.runtime.gpu.recent import Recent
from hps_numba.runtime.gpu.sizing import GroupPlan
from hps_numba.runtime.gpu.writer import Writer
from hps_numba.runtime.stats import TierUse
from hps_numba.types import Keys, Rows

logger = logging.getLogger(__name__)

_STORED = (Outcome.REPLACED, Outcome.INSERTED, Outcome.EVICTED)
_PATIENCE_S = 10.0  # for sets that are held by others


@dataclass(frozen=True)
class CacheTotals:
    """What the device has counted of one table; keys count per occurrence."""

    rows: int
    hits: int
    misses: int
    inserted: int
    evicted: int
    refused: int  # rows that were updated while they were being fetched
    updated: int


class Group:
    """Tables of one type of row, in one block of device memory.

    Attributes
    ----------
    cache
        The operations, with rows that are handed out as float32.
    stored
        The same, with rows that are handed out as they are stored.
    """

    def __init__(self, gpu: Gpu, plan: GroupPlan) -> None:
        self.plan = plan
        layout = plan.layout
        self._block = Block(gpu, layout.n_bytes)
        base, launcher = self._block.address, gpu.launcher
        as_stored = replace(layout, rows=replace(layout.rows, out=layout.rows.stored))
        self.cache = Cache(layout, plan.policy, base=base, launcher=launcher)
        self.stored = Cache(as_stored, plan.policy, base=base, launcher=launcher)

    @property
    def base(self) -> int:
        """The device's address of the block."""
        return self._block.address

    @property
    def tags(self) -> frozenset[str]:
        """Tags of its tables."""
        return frozenset(spec.tag for spec in self.plan.specs)

    def prepare(self, gpu: Gpu, stream: int) -> None:
        """Empty the tables and write their default rows."""
        layout = self.plan.layout
        gpu.zero(self.base, layout.n_zero_bytes, stream)
        parts = [(0, layout.header(self.base))]
        for i, spec in enumerate(self.plan.specs):
            row = np.full(spec.dim, spec.default_value, spec.numpy_dtype)
            parts.append((layout.default_row(i), row.view(np.uint8)))
        for offset, part in parts:
            gpu.copy(self.base + offset, int(part.ctypes.data), part.nbytes, stream)
        gpu.wait(stream)

    def output(self, dtype: np.dtype[Any]) -> Cache:
        """Return the operations that hand rows out as a dtype."""
        return self.cache if dtype == np.float32 else self.stored

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()


class TableCache:
    """One table of a GPU cache: what the tiers below it and lookups do to it.

    Notes
    -----
    Thread-safe, but updates, evictions and clears of one table come one after the
    other: the caller sees to that.
    """

    def __init__(self, group: Group, index: int, gpu: Gpu, writer: Writer) -> None:
        self.spec = group.plan.specs[index]
        self.group = group
        self.index = index
        layout = group.plan.layout
        self.n_bytes = CacheLayout(layout.rows, (layout.tables[index],)).n_bytes
        self.name = f"gpu:{gpu.ordinal}"
        self._gpu = gpu
        self._writer = writer
        self._epoch = 0
        self.recent = Recent()  # of the thread that brings deferred keys

    @property
    def epoch(self) -> int:
        """The update epoch; read it before the rows that are to be inserted."""
        return self._epoch

    @property
    def block_rows(self) -> int:
        """Rows of one write at most."""
        return self._writer.n_rows

    @property
    def n_sets(self) -> int:
        """Sets of the table."""
        return self.group.plan.layout.tables[self.index].n_sets

    @property
    def n_slots(self) -> int:
        """Rows that the table holds at most."""
        return self.n_sets * WAYS

    def insert(
        self, keys: Keys, rows: Rows, epoch: int, *, make_room: bool = True
    ) -> int:
        """Insert unique keys; return how many are in the cache with these rows.

        Parameters
        ----------
        keys, rows
            Unique keys, and their rows as they are stored.
        epoch
            The epoch from before the rows were read; later updates win.
        make_room
            Whether other rows may have to leave. If not, what finds no room is left
            out.
        """
        stored = 0
        for part in self._parts(keys):
            outcomes = self._write(
                keys[part],
                rows[part],
                lambda staged, stream, n: self.group.cache.insert(
                    self.index,
                    n,
                    keys=staged.keys_address,
                    values=staged.base,
                    epoch=epoch,
                    outcomes=staged.outcomes_address,
                    make_room=make_room,
                    stream=stream,
                ),
            )
            stored += int(np.isin(outcomes, _STORED).sum())
        return stored

    def update(self, keys: Keys, rows: Rows) -> int:
        """Replace the rows of those of the unique keys that are cached.

        Returns
        -------
        int
            How many were.

        Raises
        ------
        CacheError
            If a set stays held; the rows of its keys are unknown then.
        DeviceError
            If the device fails.
        """
        self._epoch += 1
        return self._until_done(keys, rows, self._launch_update, Outcome.REPLACED)

    def evict(self, keys: Keys) -> int:
        """Remove unique keys; return how many were cached. Raises as ``update``."""
        self._epoch += 1
        return self._until_done(keys, None, self._launch_evict, Outcome.EVICTED)

    def clear(self) -> None:
        """Remove all keys. Raises as ``update``."""
        self._epoch += 1
        deadline = monotonic() + _PATIENCE_S
        with device_errors(self._what("clearing")), self._writer as stream:
            busy = Block(self._gpu, self.n_sets)
            flags = np.empty(self.n_sets, np.uint8)
            try:
                while True:
                    self.group.cache.clear(
                        self.index, epoch=self._epoch, busy=busy.address, stream=stream
                    )
                    target = int(flags.ctypes.data)
                    self._gpu.copy(target, busy.address, flags.nbytes, stream)
                    self._gpu.wait(stream)
                    if not flags.any():
                        return
                    self._check_patience(deadline, int(flags.sum()), "sets")
            finally:
                busy.close()

    def keys_of(self, first_set: int, n_sets: int) -> Keys:
        """Return the keys in a range of sets, ``max_sets`` at most."""
        deadline = monotonic() + _PATIENCE_S
        with device_errors(self._what("a dump")), self._writer as stream:
            while True:
                keys, n_busy = self._writer.dump(
                    self.group.cache, self.index, first_set, n_sets, stream
                )
                if not n_busy:
                    return keys
                self._check_patience(deadline, n_busy, "sets")

    @property
    def max_sets(self) -> int:
        """Sets of one ``keys_of`` at most."""
        return self._writer.n_rows // WAYS

    def use(self) -> TierUse:
        """Return the device's counters as a tier's; zeros if the device fails."""
        try:
            totals = self.totals()
        except DeviceError as exc:  # the tiers below have theirs still
            logger.warning("%s", exc)
            totals = CacheTotals(0, 0, 0, 0, 0, 0, 0)
        return TierUse(
            tier=self.name,
            asked=totals.hits + totals.misses,
            hits=totals.hits,
            rows=totals.rows,
            bytes=self.n_bytes,
            evictions=totals.evicted,
            refused_backfills=totals.refused,
            dropped_rows=0,
        )

    def totals(self) -> CacheTotals:
        """Return the device's counters."""
        with device_errors(self._what("counters")), self._writer as stream:
            raw = np.empty(TABLE_BYTES // 8, np.uint64)
            source = self.group.base + self.index * TABLE_BYTES
            self._gpu.copy(int(raw.ctypes.data), source, TABLE_BYTES, stream)
            self._gpu.wait(stream)
        words = (SIZE, HITS, MISSES, INSERTED, EVICTED, REFUSED, UPDATED)
        return CacheTotals(*(int(raw[word // 8]) for word in words))

    def _launch_update(self, staged: Any, stream: int, n: int) -> None:
        self.group.cache.update(
            self.index,
            n,
            keys=staged.keys_address,
            values=staged.base,
            epoch=self._epoch,
            outcomes=staged.outcomes_address,
            stream=stream,
        )

    def _launch_evict(self, staged: Any, stream: int, n: int) -> None:
        self.group.cache.evict(
            self.index,
            n,
            keys=staged.keys_address,
            epoch=self._epoch,
            outcomes=staged.outcomes_address,
            stream=stream,
        )

    def _until_done(
        self,
        keys: Keys,
        rows: Rows | None,
        launch: Callable[[Any, int, int], None],
        wanted: Outcome,
    ) -> int:
        """Write keys, those of sets that were held again; return the wanted ones."""
        deadline, n_wanted = monotonic() + _PATIENCE_S, 0
        for part in self._parts(keys):
            left, given = keys[part], None if rows is None else rows[part]
            while left.size:
                outcomes = self._write(left, given, launch)
                n_wanted += int((outcomes == wanted).sum())
                busy = outcomes == Outcome.BUSY
                if busy.any():
                    self._check_patience(deadline, int(busy.sum()), "keys")
                left = left[busy]
                given = None if given is None else given[busy]
        return n_wanted

    def _write(
        self, keys: Keys, rows: Rows | None, launch: Callable[[Any, int, int], None]
    ) -> NDArray[np.uint8]:
        with device_errors(self._what("a write")), self._writer as stream:
            staged = self._writer.send(keys, rows, self.spec, stream)
            launch(staged, stream, keys.size)
            return self._writer.outcomes(staged, stream)

    def _parts(self, keys: Keys) -> Iterator[slice]:
        step = self._writer.n_rows
        for low in range(0, keys.size, step):
            yield slice(low, low + step)

    def _check_patience(self, deadline: float, n: int, what: str) -> None:
        if monotonic() > deadline:
            raise CacheError(
                f"table {self.spec.tag}, {self.name}: {n} {what} stay held after "
                f"{_PATIENCE_S:g} s; the device may hang, start the server again"
            )

    def _what(self, what: str) -> str:
        return f"table {self.spec.tag}, {self.name}: {what}"
