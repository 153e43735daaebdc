"""Scatter: rows that were fetched once go to every position that asked for them."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import start_of
from hps_numba.kernels.cuda.layout import (
    COUNTER_BYTES,
    FIRSTS,
    MISSING,
    N_MISSING,
    RESULTS,
    RowLayout,
)
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    load_const_u64,
    load_u32,
    load_u64,
)
from hps_numba.kernels.cuda.rows import gather_rows

u32, u64 = np.uint32, np.uint64

BLOCK = 256


@cache
def scatter_kernel(rows: RowLayout) -> KernelSpec:
    """Return the scatter of fetched rows.

    Launch   a thread per missing occurrence of one table, 256 threads, no shared
             memory; a warp copies the rows of its 32
    Reads    the misses of the last query in this workspace; rows of the stored type
             (n_rows, dim) without gaps: those of unique keys ``first`` and following
    Writes   out (n, dim) of that query, at every position that missed one of these keys
    Races    none: it follows the query on its stream
    Cost     a position reads 12 bytes and its row, and writes its row
    Oracle   tests/kernels/cuda/oracle.py: scatter
    """
    gather = gather_rows(rows, rows.row_bytes, contiguous=False)
    out_bytes = rows.out_bytes

    def scatter(work, n_table, offsets, values, first, n_rows, out):
        lane = u32(cuda.laneid)
        start = start_of(offsets, u64(n_table))
        results = load_const_u64(work + u64(RESULTS))
        results += u64(n_table) * u64(COUNTER_BYTES)
        n_missing = u64(load_u32(results + u64(N_MISSING)))
        i = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        mine = False
        number = u32(0)
        target = out
        if i < n_missing:
            entry = load_u64(load_const_u64(work + u64(MISSING)) + (start + i) * u64(8))
            position = entry & u64(0xFFFFFFFF)
            firsts = load_const_u64(work + u64(FIRSTS))
            unique = load_u32(firsts + (entry >> u64(32)) * u64(4))
            if unique >= first and u32(unique - first) < n_rows:
                mine = True
                number = u32(unique - first)
                target = out + position * u64(out_bytes)
        wanted = u32(cuda.ballot_sync(FULL_WARP, mine))
        if wanted != u32(0):
            gather(values, number, target, wanted, lane)

    return KernelSpec(f"scatter_{rows.name}", scatter, "UuUUuuU", block=BLOCK)
