"""What calls cost the host: one small lookup, and many tables at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.gpu.device import Device, Scratch
from bench.gpu.kernels import BLOCK, fill_kernel, row_words
from bench.gpu.tables import build_cache, build_workspace, keys_of
from bench.gpu.works import Stage, check_equal
from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.layout import N_HITS, RowLayout, TableLayout
from hps_numba.kernels.cuda.operands import Batch, Workspace


def small_lookup(stage: Stage) -> None:
    """Queue one lookup of a stage, as a caller does that has its keys on the device."""
    batch = Batch(stage.lookup.n, stage.keys_at(0))
    stage.table.cache.query(batch, stage.out, stage.work, stream=stage.device.stream)


@dataclass(frozen=True)
class ManyTables:
    """Tables of one cache, and keys that are in each of them.

    Table t has the rows numbered from ``t * n_rows`` on.
    """

    device: Device
    cache: Cache
    n_tables: int
    n_keys: int  # of each table
    n_rows: int
    keys: int
    offsets: int
    out: int
    work: Workspace

    @classmethod
    def set_up(
        cls,
        device: Device,
        scratch: Scratch,
        rows: RowLayout,
        *,
        n_tables: int,
        n_keys: int,
        n_rows: int,
    ) -> ManyTables:
        """Fill tables with ``n_rows`` each; ask for the first ``n_keys`` of them."""
        # Twice the room, so that every key has a place.
        layout = TableLayout.for_rows(2 * n_rows)
        cache = build_cache(device, rows, [layout] * n_tables, scratch.block)
        values = scratch.block(n_rows * rows.row_bytes)
        grid = -(-n_rows * (rows.row_bytes // 4) // BLOCK), 1
        for t in range(n_tables):
            args = (values, t * n_rows, n_rows)
            device.gpu.launcher.launch(fill_kernel(rows), grid, args, device.stream)
            keys = scratch.upload(keys_of(t * n_rows + np.arange(n_rows)))
            cache.insert(
                t, n_rows, keys=keys, values=values, epoch=0, stream=device.stream
            )
        numbers = np.arange(n_tables)[:, None] * n_rows + np.arange(n_keys)
        n = n_tables * n_keys
        return cls(
            device,
            cache,
            n_tables,
            n_keys,
            n_rows,
            scratch.upload(keys_of(numbers.ravel())),
            scratch.upload(
                np.arange(n_tables + 1, dtype=np.uint64) * np.uint64(n_keys)
            ),
            scratch.block(n * rows.out_bytes),
            build_workspace(device, n, scratch.block, n_tables=n_tables),
        )

    def together(self) -> None:
        """Queue one launch for all tables."""
        n = self.n_tables * self.n_keys
        batch = Batch(n, self.keys, self.offsets, self.n_tables, self.n_keys)
        self.cache.query(batch, self.out, self.work, stream=self.device.stream)

    def one_by_one(self) -> None:
        """Queue a launch for each table."""
        out_bytes = self.n_keys * self.cache.layout.rows.out_bytes
        for t in range(self.n_tables):
            batch = Batch(self.n_keys, self.keys + 8 * t * self.n_keys, first_table=t)
            out = self.out + t * out_bytes
            self.cache.query(batch, out, self.work, stream=self.device.stream)

    def check(self) -> None:
        """Fail if the rows of any table are not there."""
        rows, n = self.cache.layout.rows, self.n_tables * self.n_keys
        got = self.device.read(self.out, (n, rows.dim), rows.out)
        numbers = np.arange(self.n_tables)[:, None] * self.n_rows
        numbers = (numbers + np.arange(self.n_keys)).ravel()
        wanted = row_words(rows, numbers).view(rows.stored).astype(rows.out)
        check_equal(got, wanted)

    def hits(self, n_tables: int) -> int:
        """Return the hits of the last launch, which was for so many tables."""
        address = self.work.base + self.work.layout.results
        results = self.device.read(address, (n_tables, 4), np.uint32)
        return int(results[:, N_HITS // 4].sum())
