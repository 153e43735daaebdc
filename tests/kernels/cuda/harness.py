"""A cache that the compiled kernels use on the CPU, with arrays in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.layout import (
    CLOCK,
    DUMP_BYTES,
    DUMPED,
    DUMPED_BUSY,
    EVICTED,
    FLOOR,
    HITS,
    INSERTED,
    KEY_BYTES,
    MISSES,
    REFUSED,
    SCORES,
    SET_BYTES,
    SIZE,
    TABLE_BYTES,
    UPDATED,
    WAYS,
    CacheLayout,
    Policy,
    RowLayout,
    TableLayout,
    WorkLayout,
)
from hps_numba.kernels.cuda.operands import Bags, Batch, Workspace
from tests.kernels.cuda.launcher import Answer, Array, CpuLauncher
from tests.support import cpuexec

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
TOTALS = {
    "clock": CLOCK,
    "floor": FLOOR,
    "size": SIZE,
    "hits": HITS,
    "misses": MISSES,
    "inserted": INSERTED,
    "evicted": EVICTED,
    "refused": REFUSED,
    "updated": UPDATED,
}


class CpuCache:
    """A cache with its memory, for tests.

    Rows are arrays of the stored type, bfloat16 as its bits in uint16.
    """

    def __init__(
        self,
        rows: RowLayout,
        tables: Sequence[TableLayout] = (TableLayout(n_sets=2, n_stamps=64),),
        policy: Policy = Policy.LRU,
        *,
        memory: Any = None,
        launcher: Any = None,
        **options: Any,
    ) -> None:
        self.layout = CacheLayout(rows, tuple(tables))
        self.memory = memory or cpuexec.DeviceMemory()
        self.block = self.memory.array(self.layout.n_bytes, np.uint8)
        self.block[self.layout.n_zero_bytes :] = 0xA5  # what must not be relied on
        base = self.memory.address(self.block)
        header = self.layout.header(base)
        self.block[: header.size] = header
        self.launcher = launcher or CpuLauncher(self.memory, **options)
        self.cache = Cache(self.layout, policy, base=base, launcher=self.launcher)
        self.stored = STORED[rows.stored]
        self.out = np.dtype(np.float32 if rows.out == "float32" else self.stored)
        for i in range(len(tables)):
            self.set_default(i, np.zeros(rows.dim, self.stored))

    # -- what lies in memory ----------------------------------------------------------

    def set_default(self, table: int, row: Array) -> None:
        start = self.layout.default_row(table)
        n_bytes = self.layout.rows.row_bytes
        self.block[start : start + n_bytes] = row.astype(self.stored).view(np.uint8)

    def total(self, name: str, table: int = 0) -> int:
        start = table * TABLE_BYTES + TOTALS[name]
        return int(self.block[start : start + 8].view(np.uint64)[0])

    def part(self, name: str, table: int, n_bytes: int) -> Array:
        start = self.layout.offset(name, table)
        return self.block[start : start + n_bytes]

    def meta(self, table: int = 0) -> Array:
        """Return uint8 (n_sets, 64)."""
        n_sets = self.layout.tables[table].n_sets
        return self.part("meta", table, n_sets * SET_BYTES).reshape(n_sets, SET_BYTES)

    def seqs(self, table: int = 0) -> Array:
        return self.meta(table)[:, :4].copy().view(np.uint32)[:, 0]

    def digests(self, table: int = 0) -> Array:
        return self.meta(table)[:, 4 : 4 + WAYS]

    def scores(self, table: int = 0) -> Array:
        return self.meta(table)[:, SCORES : SCORES + WAYS]

    def stored_keys(self, table: int = 0) -> Array:
        """Return int64 (n_sets, 28); those of empty ways mean nothing."""
        n_sets = self.layout.tables[table].n_sets
        keys = self.part("keys", table, n_sets * WAYS * KEY_BYTES).view(np.int64)
        return keys.reshape(n_sets, WAYS)

    def stored_rows(self, table: int = 0) -> Array:
        """Return (n_sets, 28, dim) of the stored type."""
        rows, n_sets = self.layout.rows, self.layout.tables[table].n_sets
        n_bytes = n_sets * WAYS * rows.stride_bytes
        raw = self.part("rows", table, n_bytes).reshape(n_sets, WAYS, -1)
        return raw[:, :, : rows.row_bytes].copy().view(self.stored)

    def contents(self, table: int = 0) -> dict[int, bytes]:
        """Return the row of each key; fails if a key is there twice."""
        taken = self.digests(table) != 0
        keys = self.stored_keys(table)[taken]
        rows = self.stored_rows(table)[taken]
        found = {int(k): r.tobytes() for k, r in zip(keys, rows, strict=True)}
        assert len(found) == keys.size, "a key is in two ways"
        return found

    # -- operations -------------------------------------------------------------------

    def put(self, array: Array) -> tuple[Array, int]:
        """Copy an array to where kernels may read it; return it and its address."""
        array = np.ascontiguousarray(array)
        if array.size == 0:
            return array, 0
        held = self.memory.copy(array)
        return held, self.memory.address(held)

    def workspace(self, n_keys: int, n_tables: int = 1) -> tuple[Workspace, Array]:
        layout = WorkLayout(max(1, n_keys), n_tables)
        block = self.memory.array(layout.n_bytes, np.uint8)
        base = self.memory.address(block)
        header = layout.header(base)
        block[: header.size] = header
        return Workspace(layout, base), block

    def _output(self, n: int, dtype: Any) -> Array:
        out: Array = self.memory.array((max(1, n), self.layout.rows.dim), dtype)
        out.view(np.uint8)[...] = 0xEE
        return out

    def query(
        self,
        keys: Array | Sequence[Array],
        *,
        work: tuple[Workspace, Array] | None = None,
        out: Array | None = None,
        first_table: int = 0,
        **options: Any,
    ) -> Answer:
        """Look keys up: one table's, or a sequence with one array a table."""
        parts = [keys] if isinstance(keys, np.ndarray) else list(keys)
        lengths = [len(part) for part in parts]
        starts = [0, *np.cumsum(lengths).tolist()]
        n = starts[-1]
        flat, address = self.put(np.concatenate(parts).astype(np.int64))
        keep, offsets = [flat], 0
        if len(parts) > 1:
            held, offsets = self.put(np.array(starts, np.uint64))
            keep.append(held)
        workspace, block = work or self.workspace(n, len(parts))
        out = self._output(n, self.out) if out is None else out
        longest = max(lengths)
        batch = Batch(n, address, offsets, len(parts), longest, first_table)
        self.cache.query(batch, self.memory.address(out), workspace, **options)
        return Answer(out[:n], workspace, block, starts, keep, flat)

    def scatter(
        self, answer: Answer, table: int, values: Array, first: int = 0
    ) -> None:
        """Copy the rows of unique missing keys ``first`` and on to their positions."""
        held, address = self.put(values.astype(self.stored))
        offsets = 0
        if len(answer.starts) > 2:
            offsets = self.memory.address(answer.keep[1])
        batch = Batch(len(answer.out), 0, offsets, len(answer.starts) - 1)
        self.cache.scatter(
            batch,
            table,
            address,
            first=first,
            n_rows=len(values),
            out=self.memory.address(answer.out) if len(answer.out) else 0,
            work=answer.work,
        )
        answer.keep.append(held)

    def insert(
        self,
        keys: Array,
        values: Array,
        *,
        table: int = 0,
        epoch: int = 0,
        selected: Array | None = None,
        stream: Any = None,
        **options: Any,
    ) -> tuple[Array, Array]:
        """Insert rows; return the outcomes, and the keys that made room."""
        n = len(keys)
        _, key_address = self.put(keys.astype(np.int64))
        _, value_address = self.put(values.astype(self.stored))
        outcomes = self.memory.array(max(1, n), np.uint8, fill=0xEE)
        evicted = self.memory.array(max(1, n), np.int64)
        evicted.view(np.uint8)[...] = 0xEE
        mask = 0 if selected is None else self.put(selected.astype(np.uint8))[1]
        self.cache.insert(
            table,
            n,
            keys=key_address,
            values=value_address,
            epoch=epoch,
            selected=mask,
            outcomes=self.memory.address(outcomes),
            evicted=self.memory.address(evicted),
            stream=stream,
            **options,
        )
        return outcomes[:n], evicted[:n]

    def update(
        self,
        keys: Array,
        values: Array,
        *,
        table: int = 0,
        epoch: int = 1,
        stream: Any = None,
    ) -> Array:
        outcomes = self.memory.array(max(1, len(keys)), np.uint8, fill=0xEE)
        self.cache.update(
            table,
            len(keys),
            keys=self.put(keys.astype(np.int64))[1],
            values=self.put(values.astype(self.stored))[1],
            epoch=epoch,
            outcomes=self.memory.address(outcomes),
            stream=stream,
        )
        return outcomes[: len(keys)]

    def evict(
        self, keys: Array, *, table: int = 0, epoch: int = 1, stream: Any = None
    ) -> Array:
        outcomes = self.memory.array(max(1, len(keys)), np.uint8, fill=0xEE)
        self.cache.evict(
            table,
            len(keys),
            keys=self.put(keys.astype(np.int64))[1],
            epoch=epoch,
            outcomes=self.memory.address(outcomes),
            stream=stream,
        )
        return outcomes[: len(keys)]

    def clear(self, *, table: int = 0, epoch: int = 1, stream: Any = None) -> Array:
        n_sets = self.layout.tables[table].n_sets
        busy = self.memory.array(n_sets, np.uint8, fill=0xEE)
        address = self.memory.address(busy)
        self.cache.clear(table, epoch=epoch, busy=address, stream=stream)
        return busy

    def dump(
        self,
        first_set: int = 0,
        n_sets: int | None = None,
        *,
        table: int = 0,
        stream: Any = None,
    ) -> tuple[Array, Array]:
        """Return room for keys and 64 bytes of counts; see ``dumped``."""
        if n_sets is None:
            n_sets = self.layout.tables[table].n_sets - first_set
        keys = self.memory.array(max(1, n_sets * WAYS), np.int64)
        counts = self.memory.array(DUMP_BYTES, np.uint8)
        self.cache.dump(
            table,
            first_set,
            n_sets,
            keys=self.memory.address(keys),
            counts=self.memory.address(counts),
            stream=stream,
        )
        return keys, counts

    def pooled_query(
        self,
        keys: Array,
        begins: Array,
        *,
        weights: Array | None = None,
        mean: bool = False,
        tables: Sequence[int] | None = None,
        work: tuple[Workspace, Array] | None = None,
        out: Array | None = None,
        first_table: int = 0,
        **options: Any,
    ) -> tuple[Answer, Batch, Bags]:
        """Pool bags; ``tables`` are offsets of bags where there are several tables."""
        n_bags = len(begins) - 1
        flat, address = self.put(keys.astype(np.int64))
        held_begins, begins_address = self.put(begins.astype(np.uint64))
        keep = [flat, held_begins]
        weight_address = offsets = 0
        if weights is not None:
            held, weight_address = self.put(weights.astype(np.float32))
            keep.append(held)
        bag_starts = [0, n_bags] if tables is None else list(tables)
        if tables is not None:
            held, offsets = self.put(np.array(tables, np.uint64))
            keep.append(held)
        n_tables = len(bag_starts) - 1
        longest = int(np.diff(bag_starts).max())
        workspace, block = work or self.workspace(len(keys), n_tables)
        out = self._output(n_bags, np.float32) if out is None else out
        batch = Batch(n_bags, address, offsets, n_tables, longest, first_table)
        bags = Bags(begins_address, len(keys), weight_address, mean)
        self.cache.pooled_query(
            batch, bags, self.memory.address(out), workspace, **options
        )
        starts = [int(begins[b]) for b in bag_starts]
        return Answer(out[:n_bags], workspace, block, starts, keep, flat), batch, bags

    def pooled_scatter(
        self,
        answer: tuple[Answer, Batch, Bags],
        table: int,
        values: Array,
        first: int = 0,
    ) -> None:
        result, batch, bags = answer
        held, address = self.put(values.astype(self.stored))
        self.cache.pooled_scatter(
            batch,
            bags,
            table,
            address,
            first=first,
            n_rows=len(values),
            out=self.memory.address(result.out),
            work=result.work,
        )
        result.keep.append(held)


def dumped(answer: tuple[Array, Array]) -> tuple[Array, int]:
    """Return the keys that a dump wrote, and how many sets it left out."""
    keys, counts = answer
    n = int(counts[DUMPED : DUMPED + 8].view(np.uint64)[0])
    busy = int(counts[DUMPED_BUSY : DUMPED_BUSY + 4].view(np.uint32)[0])
    return keys[:n], busy
