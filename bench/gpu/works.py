"""The operations of a cache on one set of keys, and what each is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.gpu.device import POISON, Array, Device, Scratch
from bench.gpu.kernels import BLOCK, gather_kernel
from bench.gpu.tables import Lookup, Table, build_workspace, keys_of, numbers_of
from bench.gpu.timing import Work
from hps_numba.kernels.cuda.layout import (
    DUMP_BYTES,
    DUMPED,
    EVICTED,
    MAX_KEYS,
    N_HITS,
    WAYS,
)
from hps_numba.kernels.cuda.operands import Batch, Workspace

SAMPLE = 2048  # rows at either end of an output that are looked at
MAX_LAUNCHES = 512


@dataclass(frozen=True)
class Stage:
    """A table, keys for some launches, and where rows go."""

    device: Device
    scratch: Scratch
    table: Table
    lookup: Lookup
    out: int
    work: Workspace

    @classmethod
    def set_up(
        cls,
        device: Device,
        scratch: Scratch,
        table: Table,
        *,
        n: int,
        pool: int,
        hit_rate: float = 1.0,
        zipf: float | None = None,
    ) -> Stage:
        """Draw about ``pool`` keys for launches of ``n``."""
        total = min(max(pool, n), MAX_LAUNCHES * n)
        if zipf is None:
            total = min(total, len(table.resident))
        n = min(n, total)
        lookup = table.lookup(
            n, total // n, block=scratch.upload, hit_rate=hit_rate, zipf=zipf
        )
        out = scratch.block(len(lookup.numbers) * table.rows.out_bytes)
        work = build_workspace(device, min(n, MAX_KEYS), scratch.block)
        return cls(device, scratch, table, lookup, out, work)

    @property
    def rows_written(self) -> tuple[tuple[int, int], ...]:
        """The output, as a work names it."""
        return ((self.out, len(self.lookup.numbers) * self.table.rows.out_bytes),)

    def out_at(self, i: int) -> int:
        """Return the address of the rows of launch ``i``."""
        return self.out + i * self.lookup.n * self.table.rows.out_bytes

    def keys_at(self, i: int) -> int:
        """Return the address of the keys of launch ``i``."""
        return self.lookup.keys + 8 * i * self.lookup.n

    def check_rows(self) -> None:
        """Fail if rows at either end of the output are not those of their keys."""
        numbers, absent = self.lookup.numbers, self.lookup.absent
        total, rows = len(numbers), self.table.rows
        for part in (slice(0, SAMPLE), slice(max(0, total - SAMPLE), total)):
            wanted = self.table.expected(numbers[part])
            address = self.out + part.start * rows.out_bytes
            got = self.device.read(address, wanted.shape, rows.out)
            check_equal(got[~absent[part]], wanted[~absent[part]])


def check_equal(got: Array, wanted: Array) -> None:
    """Fail if two arrays differ in any byte."""
    if got.tobytes() != wanted.tobytes():
        wrong = np.flatnonzero((got != wanted).reshape(len(got), -1).any(1))
        raise AssertionError(f"{len(wrong)} rows of {len(got)} are wrong: {wrong[:5]}")


def query(stage: Stage) -> Work:
    """Return the look-up itself."""
    lookup, cache = stage.lookup, stage.table.cache

    def call(i: int) -> None:
        batch = Batch(lookup.n, stage.keys_at(i))
        cache.query(batch, stage.out_at(i), stage.work, stream=stage.device.stream)

    def check() -> None:
        stage.check_rows()
        address = stage.work.base + stage.work.layout.results + N_HITS
        n_hits = int(stage.device.read(address, 1, np.uint32)[0])
        expected = lookup.n - int(lookup.absent[lookup.at(lookup.n_launches - 1)].sum())
        assert n_hits == expected, f"{n_hits} hits, not {expected}"

    return Work("query", call, lookup.n_launches, lookup.n, check, stage.rows_written)


def gather(stage: Stage) -> Work:
    """Return a gather of the same rows by number, in a kernel of ours."""
    lookup, table = stage.lookup, stage.table
    spec = gather_kernel(table.rows)
    launch = stage.device.gpu.launcher.launch
    grid = -(-lookup.n // BLOCK), 1

    def call(i: int) -> None:
        indices = lookup.indices + 8 * i * lookup.n
        args = (table.dense, indices, lookup.n, stage.out_at(i))
        launch(spec, grid, args, stage.device.stream)

    name, written = "gather kernel", stage.rows_written
    return Work(name, call, lookup.n_launches, lookup.n, stage.check_rows, written)


def update(stage: Stage) -> Work:
    """Return an update of keys that are there, with the rows that they have."""
    lookup, table, device = stage.lookup, stage.table, stage.device
    values = stage.scratch.block(len(lookup.numbers) * table.rows.row_bytes)
    outcomes = stage.scratch.block(lookup.n)
    rows = gather(stage)
    rows.queue()
    device.gpu.copy(values, *stage.rows_written[0], device.stream)

    def call(i: int) -> None:
        table.cache.update(
            0,
            lookup.n,
            keys=stage.keys_at(i),
            values=values + i * lookup.n * table.rows.row_bytes,
            epoch=1,
            outcomes=outcomes,
            stream=device.stream,
        )

    def check() -> None:
        # Each row is what it was: a query shows that none was torn or misplaced.
        device.poison(*stage.rows_written[0])
        query(stage).queue()
        device.wait()
        stage.check_rows()

    return Work("update", call, lookup.n_launches, lookup.n, check)


def scatter(stage: Stage) -> Work:
    """Return the copy of fetched rows to where a query missed them."""
    lookup, table, device = stage.lookup, stage.table, stage.device
    absent = np.flatnonzero(lookup.absent[lookup.at(0)])
    batch = Batch(lookup.n, lookup.keys)
    table.cache.query(batch, stage.out, stage.work, stream=device.stream)
    layout = stage.work.layout
    unique = device.read(stage.work.base + layout.unique, len(absent), np.int64)
    # Row u is that of the u-th missing key.
    rows = table.expected(numbers_of(unique)).astype(table.rows.stored)
    values = stage.scratch.upload(rows)

    def call(i: int) -> None:
        table.cache.scatter(
            batch,
            0,
            values,
            first=0,
            n_rows=len(absent),
            out=stage.out,
            work=stage.work,
            stream=device.stream,
        )

    def check() -> None:
        got = device.read(stage.out, (lookup.n, table.rows.dim), table.rows.out)
        wanted = table.expected(lookup.numbers[lookup.at(0)][absent])
        check_equal(got[absent], wanted)

    return Work("scatter", call, 1, len(absent), check, stage.rows_written)


def dump(stage: Stage) -> Work:
    """Return a dump of the whole table; its items are the keys that it has."""
    table, device = stage.table, stage.device
    n_sets, n = table.cache.layout.tables[0].n_sets, len(table.resident)
    keys = stage.scratch.block(n_sets * WAYS * 8)
    counts = stage.scratch.block(DUMP_BYTES)
    device.gpu.zero(counts, DUMP_BYTES, device.stream)

    def call(i: int) -> None:
        table.cache.dump(0, 0, n_sets, keys=keys, counts=counts, stream=device.stream)

    def check() -> None:
        assert int(device.read(counts + DUMPED, 1, np.uint64)[0]) == n
        got = np.sort(numbers_of(device.read(keys, n, np.int64)))
        check_equal(got, np.sort(table.resident))

    return Work("dump", call, 1, n, check, ((keys, n_sets * WAYS * 8),))


def insert(
    device: Device, scratch: Scratch, table: Table, *, n: int, pool: int, evicting: bool
) -> Work:
    """Return an insert of keys that are not there, into room or in others' place.

    Without evictions the table is cleared before each timing.
    """
    n_launches = max(1, pool // n)
    first = 2 * table.n_rows
    numbers = first + np.arange(n * n_launches)
    keys = scratch.upload(keys_of(numbers))
    values = scratch.block(len(numbers) * table.rows.row_bytes)
    table.fill(values, first, len(numbers))
    busy = scratch.block(table.cache.layout.tables[0].n_sets)
    out = scratch.block(n * table.rows.out_bytes)
    work = build_workspace(device, n, scratch.block)
    last, before = n_launches - 1, _evicted(device, table)

    def call(i: int) -> None:
        table.cache.insert(
            0,
            n,
            keys=keys + 8 * i * n,
            values=values + i * n * table.rows.row_bytes,
            epoch=1,
            stream=device.stream,
        )

    def check() -> None:
        batch = Batch(n, keys + 8 * last * n)
        device.poison(out, n * table.rows.out_bytes)
        table.cache.query(batch, out, work, stream=device.stream)
        got = device.read(out, (n, table.rows.dim), table.rows.out)
        _check_inserted(got, table.expected(numbers[last * n :]))
        share = (_evicted(device, table) - before) / len(numbers)
        assert share > 0.98 if evicting else share < 0.02, f"evictions: {share:.1%}"

    def clear() -> None:
        table.cache.clear(0, epoch=0, busy=busy, stream=device.stream)

    name = "insert, evicting" if evicting else "insert"
    reset = None if evicting else clear
    return Work(name, call, n_launches, n, check, reset=reset)


def _check_inserted(got: Array, expected: Array) -> None:
    # A few sets have had more keys than ways, and not all are still there.
    gone = (got.view(np.uint8) == POISON).all(1)
    check_equal(got[~gone], expected[~gone])
    assert gone.mean() < 0.02, f"{gone.mean():.1%} of the keys are not there"


def _evicted(device: Device, table: Table) -> int:
    return int(device.read(table.cache.base + EVICTED, 1, np.uint64)[0])
