"""Query: hits to the output, misses compacted and without duplicates, in one launch."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import (
    ATTEMPTS,
    begin_reads,
    blocks_for,
    end_reads,
    segment,
    unchanged,
)
from hps_numba.kernels.cuda.hashing import hash_key
from hps_numba.kernels.cuda.layout import (
    KEY_BYTES,
    N_SETS,
    ROWS,
    SCORES,
    TABLE_BYTES,
    WAYS,
    Policy,
    RowLayout,
)
from hps_numba.kernels.cuda.misses import end_launch, record_misses
from hps_numba.kernels.cuda.pairs import finder
from hps_numba.kernels.cuda.ptx import FULL_WARP, load_const_u64, load_u64
from hps_numba.kernels.cuda.rows import gather_rows
from hps_numba.kernels.cuda.scores import toucher

u32, u64 = np.uint32, np.uint64

FILL = 1  # flag: misses get the table's default row
COUNT_UNIQUE = 2  # flag: unique hits are counted as well
BLOCK = 128
MAX_REGISTERS = 72  # fewer spill on compute capability 7.5 and 8.0


def query_kernel(rows: RowLayout, policy: Policy, *, touch: bool = True) -> KernelSpec:
    """Return the query of a cache with such rows; without ``touch`` it scores nothing.

    Launch   grid (blocks of the longest table's keys, n_tables), 128 threads, no shared
             memory; a thread looks for one key, a warp copies the rows of its 32
    Reads    offsets uint64 (n_tables + 1,) or address 0: all ``n`` keys are table 0's;
             keys int64 (n,); sets as ``layout`` describes them
    Writes   out (n, dim) for hits, and for misses with FILL, else those may hold
             anything until they are scattered; scores; in the workspace
             the misses (``misses``), and the results; per table the clock and the
             totals
    Races    safe beside all other kernels; takes no lock. A key whose set is written to
             twice meanwhile counts as a miss. Nothing else uses the workspace
    Cost     a hit reads its key, 64 bytes of metadata, 32 bytes of keys and its row
             once, in units of up to 16 bytes, four in flight a lane; in a static table
             what is not in its home set reads the metadata of a second
    Oracle   tests/kernels/cuda/oracle.py: OracleCache.query
    """
    if policy.two_sets or touch:
        return _query_kernel(rows, policy, policy, policy.value)
    # Where nothing is scored, policies whose keys have one set do not differ.
    return _query_kernel(rows, Policy.LRU, Policy.STATIC, "untouched")


@cache
def _query_kernel(
    rows: RowLayout, policy: Policy, scores: Policy, name: str
) -> KernelSpec:
    find = finder(policy)
    gather = gather_rows(rows, rows.stride_bytes, contiguous=True)
    touch = toucher(scores)
    out_bytes = rows.out_bytes

    def query(tables, offsets, n, keys, out, work, flags):
        lane = u32(cuda.laneid)
        n_table = u64(cuda.blockIdx.y)
        table = tables + n_table * u64(TABLE_BYTES)
        start, end = segment(offsets, n_table, n)
        n_blocks = blocks_for(end - start, BLOCK)
        if u32(cuda.blockIdx.x) >= n_blocks:
            return
        end = min(end, start + u64(n_blocks) * u64(BLOCK))
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        position = start + thread
        target = out + (position - u64(lane)) * u64(out_bytes)
        base = load_const_u64(table + u64(ROWS))
        n_sets = load_const_u64(table + u64(N_SETS))
        fill = (flags & u32(FILL)) != u32(0)
        live = position < end
        hit, pending = False, live
        for attempt in range(ATTEMPTS + 1):
            way, seq = u32(WAYS), u32(0)
            number, meta = u32(n_sets * u64(WAYS)), table
            # The last round looks no more: whoever is left has missed.
            if pending and attempt < ATTEMPTS:
                key = load_u64(keys + position * u64(KEY_BYTES))
                hashed = hash_key(key)
                meta, slot, way, seq = find(table, key, hashed)
                if way < u32(WAYS):
                    number = u32(slot + u64(way))
            found = way < u32(WAYS)
            begin_reads()
            wanted = u32(cuda.ballot_sync(FULL_WARP, pending and (found or fill)))
            if wanted != u32(0):
                gather(base, number, target, wanted, lane)
            end_reads()
            if found and unchanged(meta, seq):
                touch(table, meta + u64(SCORES) + u64(way), end - start)
                hit, pending = True, False
            elif not found and (seq & u32(1)) == u32(0):
                pending = False
            if cuda.ballot_sync(FULL_WARP, pending) == 0:
                break
        missed = live and not hit
        claiming = missed or (hit and (flags & u32(COUNT_UNIQUE)) != u32(0))
        record_misses(work, n_table, keys, start, end, position, missed, claiming)
        end_launch(work, n_table, table, end - start, n_blocks, flags)

    name = f"query_{rows.name}_{name}"
    return KernelSpec(name, query, "UUUUUUu", block=BLOCK, max_registers=MAX_REGISTERS)
