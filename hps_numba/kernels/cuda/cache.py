"""A cache in device memory: which kernel each operation launches, and on what grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hps_numba.kernels.cuda import dump, evict, insert, pooled, query, scatter, update
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.insert import ADMIT, FREE_ONLY
from hps_numba.kernels.cuda.layout import (
    TABLE_BYTES,
    CacheLayout,
    Policy,
    RowLayout,
    widest,
)
from hps_numba.kernels.cuda.misses import UNCOUNTED
from hps_numba.kernels.cuda.operands import (
    WARP,
    Bags,
    Batch,
    Launcher,
    Workspace,
    check_aligned,
    warps,
)
from hps_numba.kernels.cuda.pooled import MEAN
from hps_numba.kernels.cuda.query import COUNT_UNIQUE, FILL


class Cache:
    """The operations of a cache, each of them one launch.

    Addresses are device addresses, aligned as their type asks. Nothing is checked that
    only the device knows; sizes that are known here are.

    Parameters
    ----------
    layout
        How the block is laid out; ``layout.rows.out`` is what queries give.
    policy
        Which way of a full set makes room.
    base
        Address of the block, prepared as ``layout`` says.
    launcher
        Runs the kernels.

    Notes
    -----
    Safe from several threads and streams at once, but for updates and evictions of one
    table, which come one after the other.

    Caches may share a block if their layouts differ in ``rows.out`` only, and their
    policies are the same: what inserts of one policy leave as scores means something
    else to another, and only ``STATIC`` looks into second sets. Rows that must push
    nobody out, as in a warm-up, are inserted with ``make_room=False``.
    """

    def __init__(
        self, layout: CacheLayout, policy: Policy, *, base: int, launcher: Launcher
    ) -> None:
        self.layout = layout
        self.policy = policy
        self.base = base
        self._launcher = launcher
        self._query = query.query_kernel(layout.rows, policy)

    def kernels(self, *, every_one: bool = True) -> Iterator[KernelSpec]:
        """Yield what the operations launch, to be compiled ahead.

        Outputs that are less aligned than a unit of the rows have kernels of their own,
        which are compiled when they are first used. Without ``every_one`` so are those
        of pooled queries, and of queries that do not touch.
        """
        rows = self.layout.rows
        yield query.query_kernel(rows, self.policy)
        yield scatter.scatter_kernel(rows)
        yield insert.insert_kernel(rows, self.policy)
        yield update.update_kernel(rows, self.policy)
        yield evict.evict_kernel(self.policy)
        yield evict.clear_kernel()
        yield dump.dump_kernel()
        if not every_one:
            return
        if not self.policy.two_sets:
            yield query.query_kernel(rows, self.policy, touch=False)
        if rows.out == "float32":
            yield pooled.pooled_query_kernel(rows, self.policy)
            yield pooled.pooled_scatter_kernel(rows)

    def query(
        self,
        batch: Batch,
        out: int,
        work: Workspace,
        *,
        fill: bool = False,
        count_unique: bool = False,
        touch: bool = True,
        stream: Any = None,
    ) -> None:
        """Copy the rows of keys that are there; leave the others in the workspace.

        Parameters
        ----------
        batch
            The keys.
        out
            Address of the output, (n, dim).
        work
            Takes the misses and the results.
        fill
            Give misses their table's default row.
        count_unique
            Count unique hits too; a little slower.
        touch
            Let the launch count: in scores, in the totals, on the clock.
        stream
            Where the launch is queued.

        Raises
        ------
        ValueError
            If there are more keys or tables than the workspace or the cache has.
        """
        batch.check(batch.n, work, len(self.layout.tables))
        rows = self._rows_for(out)
        if touch and rows is self.layout.rows:
            spec = self._query
        else:
            spec = query.query_kernel(rows, self.policy, touch=touch)
        flags = FILL * fill | COUNT_UNIQUE * count_unique | UNCOUNTED * (not touch)
        base = self.base + TABLE_BYTES * batch.first_table
        args = (base, batch.offsets, batch.n, batch.keys, out, work.base, flags)
        self._launcher.launch(spec, batch.grid(spec.block), args, stream)

    def scatter(
        self,
        batch: Batch,
        table: int,
        values: int,
        *,
        first: int,
        n_rows: int,
        out: int,
        work: Workspace,
        stream: Any = None,
    ) -> None:
        """Copy fetched rows to where the last query missed them.

        Parameters
        ----------
        batch
            That of the query.
        table
            Whose missing keys were fetched, counted from the query's first table.
        values
            Address of the rows, (n_rows, dim) of the stored type.
        first, n_rows
            Which of the table's unique missing keys they are.
        out, work, stream
            Those of the query.
        """
        rows = self._rows_for(out)
        batch.check_table(table)
        check_aligned(values, rows.load_bytes)
        spec = scatter.scatter_kernel(rows)
        grid = batch.grid(spec.block)[0], 1
        args = (work.base, table, batch.offsets, values, first, n_rows, out)
        self._launcher.launch(spec, grid if n_rows else (0, 1), args, stream)

    def insert(
        self,
        table: int,
        n: int,
        *,
        keys: int,
        values: int,
        epoch: int,
        selected: int = 0,
        outcomes: int = 0,
        evicted: int = 0,
        admit: bool = False,
        make_room: bool = True,
        stream: Any = None,
    ) -> None:
        """Give keys a place, if need be another one's.

        Parameters
        ----------
        table
            Index of the table.
        n, keys, values
            Unique keys int64 (n,), and rows (n, dim) of the stored type.
        epoch
            The table's update epoch from before the rows were read.
        selected
            Address of uint8 (n,), 1 for keys to insert, or 0 for all.
        outcomes
            Address of uint8 (n,) that gets an ``Outcome`` a key, or 0.
        evicted
            Address of int64 (n,) that gets the key that made room, or 0.
        admit
            Take a new key into a full set at its second sight only.
        make_room
            Let keys of a full set yield; otherwise new ones of it are FULL.
        stream
            Where the launch is queued.

        Raises
        ------
        ValueError
            If there is no such table, ``admit`` is asked of one without doorkeeper, or
            ``values`` are less aligned than the widest access that divides a row.
        """
        self._check_table(table)
        check_aligned(values, widest(self.layout.rows.row_bytes))
        if admit and not self.layout.tables[table].n_door:
            raise ValueError(f"table {table} has no doorkeeper to admit keys")
        spec = insert.insert_kernel(self.layout.rows, self.policy)
        args = (
            *(self.base, table, keys, values, n, epoch),
            *(selected, outcomes, evicted, ADMIT * admit | FREE_ONLY * (not make_room)),
        )
        self._launcher.launch(spec, warps(spec, n), args, stream)

    def update(
        self,
        table: int,
        n: int,
        *,
        keys: int,
        values: int,
        epoch: int,
        outcomes: int,
        stream: Any = None,
    ) -> None:
        """Replace the rows of keys that are there; see :meth:`insert`.

        Rows that were read before ``epoch`` are refused from now on, also those of keys
        that are not there. So ``epoch`` becomes the table's only when the rows are in
        place below the cache. ``outcomes`` says which keys were BUSY: they are to be
        updated again.
        """
        self._check_table(table)
        check_aligned(values, widest(self.layout.rows.row_bytes))
        spec = update.update_kernel(self.layout.rows, self.policy)
        args = (self.base, table, keys, values, n, epoch, outcomes)
        self._launcher.launch(spec, warps(spec, n), args, stream)

    def evict(
        self,
        table: int,
        n: int,
        *,
        keys: int,
        epoch: int,
        outcomes: int,
        stream: Any = None,
    ) -> None:
        """Remove keys; rows of before ``epoch`` are refused; see :meth:`update`."""
        self._check_table(table)
        spec = evict.evict_kernel(self.policy)
        args = (self.base, table, keys, n, epoch, outcomes)
        self._launcher.launch(spec, warps(spec, n), args, stream)

    def clear(self, table: int, *, epoch: int, busy: int, stream: Any = None) -> None:
        """Remove all keys of a table; rows of before ``epoch`` are refused from now on.

        ``busy`` is the address of uint8 (n_sets,) that gets a 1 for each set that could
        not be cleared.
        """
        self._check_table(table)
        spec = evict.clear_kernel()
        grid = warps(spec, self.layout.tables[table].n_sets)
        self._launcher.launch(spec, grid, (self.base, table, epoch, busy), stream)

    def dump(
        self,
        table: int,
        first_set: int,
        n_sets: int,
        *,
        keys: int,
        counts: int,
        stream: Any = None,
    ) -> None:
        """Write the keys of a range of sets.

        Parameters
        ----------
        table
            Index of the table.
        first_set, n_sets
            The range.
        keys
            Address of int64 (28 * n_sets,).
        counts
            Address of 64 bytes, zero before their first use. As ``offsets`` of a batch
            they tell a query of these keys how many there are.
        stream
            Where the launch is queued.

        Raises
        ------
        ValueError
            If the range exceeds the table.
        """
        self._check_table(table)
        held = self.layout.tables[table].n_sets
        if not 0 <= first_set <= first_set + n_sets <= held:
            raise ValueError(
                f"sets {first_set} to {first_set + n_sets} exceed the {held} of "
                f"table {table}"
            )
        spec = dump.dump_kernel()
        args = (self.base, table, first_set, n_sets, keys, counts)
        grid = max(1, warps(spec, n_sets)[0]), 1
        self._launcher.launch(spec, grid, args, stream)

    def pooled_query(
        self,
        batch: Batch,
        bags: Bags,
        out: int,
        work: Workspace,
        *,
        fill: bool = False,
        stream: Any = None,
    ) -> None:
        """Sum or average the rows of each bag; ``batch.n`` counts bags.

        Raises
        ------
        ValueError
            If rows are not given out as float32, or as :meth:`query`.
        """
        batch.check(bags.n_keys, work, len(self.layout.tables))
        spec = pooled.pooled_query_kernel(self._rows_for(out), self.policy)
        args = (
            *(self.base + TABLE_BYTES * batch.first_table, batch.offsets, batch.n),
            *(bags.begins, batch.keys, bags.n_keys, bags.weights),
            *(out, work.base, FILL * fill | MEAN * bags.mean),
        )
        grid = batch.grid(spec.block // WARP)
        self._launcher.launch(spec, grid, args, stream)

    def pooled_scatter(
        self,
        batch: Batch,
        bags: Bags,
        table: int,
        values: int,
        *,
        first: int,
        n_rows: int,
        out: int,
        work: Workspace,
        stream: Any = None,
    ) -> None:
        """Add fetched rows to the bags that missed them; see :meth:`scatter`."""
        rows = self._rows_for(out)
        batch.check_table(table)
        check_aligned(values, rows.load_bytes)
        spec = pooled.pooled_scatter_kernel(rows)
        args = (
            *(work.base, table, batch.offsets, bags.begins, bags.weights),
            *(values, first, n_rows, out, MEAN * bags.mean),
        )
        grid = batch.grid(spec.block // WARP)[0], 1
        self._launcher.launch(spec, grid if n_rows else (0, 1), args, stream)

    def _rows_for(self, out: int) -> RowLayout:
        """Return the rows' layout for an output at this address."""
        rows = self.layout.rows
        if out % 16 == 0 or out % rows.store_bytes == 0:
            return rows
        alignment = next(a for a in (8, 4, 2, 1) if out % a == 0)
        if alignment < rows.out_item_bytes:
            raise ValueError(f"out={out:#x} is not aligned to {rows.out} values")
        return replace(rows, alignment=alignment)

    def _check_table(self, table: int) -> None:
        if not 0 <= table < len(self.layout.tables):
            raise ValueError(
                f"table {table} is none of the cache's {len(self.layout.tables)}"
            )
