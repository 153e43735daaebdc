"""Pooled query: each bag's rows summed or averaged, without writing the rows out.

A bag is summed by one warp, 32 keys at a time. A set that was written to meanwhile
spoils the sum: its key becomes a miss, and the bag is begun again, a bounded number of
times. Rows of missing keys are added later, bag by bag, when they have been fetched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import (
    ATTEMPTS,
    begin_reads,
    blocks_for,
    end_reads,
    segment,
    start_of,
    unchanged,
)
from hps_numba.kernels.cuda.hashing import hash_key
from hps_numba.kernels.cuda.layout import (
    COUNTER_BYTES,
    FIRSTS,
    KEY_BYTES,
    MISSING,
    N_BAGS,
    N_MISSING,
    N_SETS,
    NO_POSITION,
    RESULTS,
    ROWS,
    SCORES,
    TABLE_BYTES,
    WAYS,
    Policy,
    RowLayout,
)
from hps_numba.kernels.cuda.misses import counters_of, end_launch, name_keys
from hps_numba.kernels.cuda.pairs import finder
from hps_numba.kernels.cuda.pooling import inverse, sum_rows, weight_at
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u32,
    load_const_u64,
    load_u32,
    load_u64,
    store_u32,
)
from hps_numba.kernels.cuda.query import FILL
from hps_numba.kernels.cuda.scores import toucher

u32, u64, f32 = np.uint32, np.uint64, np.float32

MEAN = 4  # flag: sums are divided by the number of the bag's keys
BLOCK = 128
BAGS_A_BLOCK = BLOCK // 32


@cuda.jit(device=True, forceinline=True)
def scale_of(begin, stop, flags):
    """Return what each row of a bag is multiplied with."""
    scale = f32(1)
    if (flags & u32(MEAN)) != u32(0) and stop > begin:
        scale = inverse(f32(u32(stop - begin)))
    return scale


@cuda.jit(device=True, forceinline=True)
def begin_of(bags, bag, n_keys):
    """Return where a bag's keys begin, none of them past the launch's own."""
    return min(load_const_u64(bags + bag * u64(8)), n_keys)


@cuda.jit(device=True, forceinline=True)
def first_occurrence(work, position):
    """Return the address where a position's first occurrence is noted."""
    return load_const_u64(work + u64(MISSING)) + position * u64(8) + u64(4)


@cache
def chunk_pooler(rows: RowLayout, policy: Policy) -> Any:
    """Return a device function that adds 32 keys of a bag to its row."""
    accumulate = sum_rows(rows, rows.stride_bytes)
    find = finder(policy)
    touch = toucher(policy)

    @cuda.jit(device=True, forceinline=True)
    def look(table, key, number):
        """Return (slot, metadata, seq, way); slot is ``number`` for a miss."""
        meta, slot, way, seq = find(table, key, hash_key(key))
        if way < u32(WAYS):
            number = u32(slot + u64(way))
        return number, meta, seq, way

    @cuda.jit(device=True, forceinline=True)
    def pool_chunk(
        table, work, n_table, keys, weights, start, end, chunk, n_rows, target, scale,
        fresh, fill, attempt, noted_before,
    ):  # fmt: skip
        """Return how many of the keys missed, and whether the bag must begin again."""
        lane = u32(cuda.laneid)
        position = chunk + u64(lane)
        live = lane < n_rows
        noted = first_occurrence(work, position)
        # What missed in an earlier attempt stays a miss, and has its number.
        named = live and noted_before and load_u32(noted) != u32(NO_POSITION)
        number = u32(load_const_u64(table + u64(N_SETS)) * u64(WAYS))
        way, seq, meta, weight = u32(WAYS), u32(0), table, f32(0)
        if live:
            weight = weight_at(weights, position, scale)
            if attempt < ATTEMPTS and not named:
                key = load_u64(keys + position * u64(KEY_BYTES))
                number, meta, seq, way = look(table, key, number)
        hit = way < u32(WAYS)
        begin_reads()
        wanted = u32(cuda.ballot_sync(FULL_WARP, live and (hit or fill)))
        accumulate(
            load_const_u64(table + u64(ROWS)), number, weight, wanted, n_rows, target,
            fresh, lane,
        )  # fmt: skip
        end_reads()
        spoilt = hit and not unchanged(meta, seq)
        lost = cuda.ballot_sync(FULL_WARP, spoilt) != 0
        if hit and not spoilt:
            touch(table, meta + u64(SCORES) + u64(way), end - start)
        missed = live and (spoilt or not hit)
        unnamed = missed and not named
        first = name_keys(work, n_table, keys, start, end, position, unnamed, unnamed)
        if unnamed:
            store_u32(noted, u32(first))
        elif live and not named:
            store_u32(noted, u32(NO_POSITION))
        return u32(cuda.popc(u32(cuda.ballot_sync(FULL_WARP, missed)))), lost

    return pool_chunk


@cache
def pooled_query_kernel(rows: RowLayout, policy: Policy) -> KernelSpec:
    """Return the pooled query of a cache with such rows; ``out`` of them is float32.

    Launch   grid (blocks of the longest table's bags, n_tables), 256 threads, a warp
             per bag, no shared memory
    Reads    offsets uint64 (n_tables + 1,) of bags, or address 0: all ``n_bags`` are
             table 0's; bags uint64 (n_bags + 1,): where a bag's keys begin; keys int64
             (n_keys,);
             weights float32 of the keys, or address 0; sets as ``layout`` describes
             them
    Writes   out float32 (n_bags, dim): sums over hits, and over default rows for misses
             with FILL; with MEAN divided by the number of all keys of the bag, weights
             or not; scores; in the workspace the misses (``WorkLayout.missing``),
             results, N_BAGS among them; per table the clock and the totals
    Races    safe beside all other kernels; takes no lock. A key whose set is written to
             meanwhile counts as a miss, and if that happens in two attempts all keys
             of the bag do. Nothing else uses the workspace
    Cost     as a query, but 4 * dim bytes are written a bag instead of a row a key
    Oracle   tests/kernels/cuda/oracle.py: OracleCache.pooled_query
    """
    if rows.out != "float32":
        raise ValueError(f"pooled rows are float32, not {rows.out}")
    pool_chunk = chunk_pooler(rows, policy)
    out_bytes = rows.out_bytes

    def pooled_query(
        tables, offsets, n_bags, bags, keys, n_keys, weights, out, work, flags
    ):
        lane = u32(cuda.laneid)
        n_table = u64(cuda.blockIdx.y)
        table = tables + n_table * u64(TABLE_BYTES)
        first_bag, end_bag = segment(offsets, n_table, n_bags)
        n_blocks = blocks_for(end_bag - first_bag, BAGS_A_BLOCK)
        if u32(cuda.blockIdx.x) >= n_blocks:
            return
        end_bag = min(end_bag, first_bag + u64(n_blocks) * u64(BAGS_A_BLOCK))
        start = begin_of(bags, first_bag, n_keys)
        end = max(begin_of(bags, end_bag, n_keys), start)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        bag = first_bag + (thread >> u64(5))
        if bag < end_bag:
            begin = begin_of(bags, bag, n_keys)
            stop = max(begin_of(bags, bag + u64(1), n_keys), begin)
            scale = scale_of(begin, stop, flags)
            fill = (flags & u32(FILL)) != u32(0)
            target = out + bag * u64(out_bytes)
            n_missed, noted_end = u32(0), begin
            for attempt in range(ATTEMPTS + 1):
                chunk, lost, n_missed = begin, False, u32(0)
                # An empty bag has one empty chunk, which writes its zeros.
                while (chunk < stop or chunk == begin) and not lost:
                    n_rows = u32(min(stop - chunk, u64(32)))
                    n, lost = pool_chunk(
                        table, work, n_table, keys, weights, start, end, chunk, n_rows,
                        target, scale, chunk == begin, fill, attempt, chunk < noted_end,
                    )  # fmt: skip
                    n_missed = u32(n_missed + n)
                    chunk += u64(32)
                    # An attempt that is lost leaves no notes of the chunks after.
                    noted_end = max(noted_end, chunk)
                if not lost:
                    break
            if n_missed != u32(0) and lane == u32(0):
                counters = counters_of(work, n_table)
                add_u32(counters + u64(N_MISSING), n_missed)
                place = add_u32(counters + u64(N_BAGS), u32(1))
                entry = load_const_u64(work + u64(MISSING))
                store_u32(entry + (start + u64(place)) * u64(8), u32(bag))
        end_launch(work, n_table, table, end - start, n_blocks, flags)

    name = f"pooled_query_{rows.name}_{policy.value}"
    return KernelSpec(name, pooled_query, "UUUUUUUUUu", block=BLOCK)


@cache
def pooled_scatter_kernel(rows: RowLayout) -> KernelSpec:
    """Return the scatter that adds fetched rows to the bags that missed them.

    Launch   a warp per bag with misses of one table, 128 threads, no shared memory
    Reads    the misses of the last pooled query in this workspace, with its bags,
             weights and flags; rows of the stored type (n_rows, dim) without gaps:
             those of unique keys ``first`` and following
    Writes   out float32 (n_bags, dim) of that query: adds to it
    Races    none: it follows the query on its stream
    Cost     a bag reads 8 bytes a key and the missing rows, and reads and writes its
             row
    Oracle   tests/kernels/cuda/oracle.py: pooled_scatter
    """
    accumulate = sum_rows(rows, rows.row_bytes)
    out_bytes = rows.out_bytes

    def pooled_scatter(
        work, n_table, offsets, bags, weights, values, first, n_rows, out, flags
    ):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        i = thread >> u64(5)
        results = load_const_u64(work + u64(RESULTS))
        results += u64(n_table) * u64(COUNTER_BYTES)
        if i >= u64(load_u32(results + u64(N_BAGS))):
            return
        start = load_const_u64(bags + start_of(offsets, u64(n_table)) * u64(8))
        missing = load_const_u64(work + u64(MISSING))
        firsts = load_const_u64(work + u64(FIRSTS))
        bag = u64(load_u32(missing + (start + i) * u64(8)))
        begin = load_const_u64(bags + bag * u64(8))
        stop = load_const_u64(bags + bag * u64(8) + u64(8))
        scale = scale_of(begin, stop, flags)
        chunk = begin
        while chunk < stop:
            position = chunk + u64(lane)
            mine, number, weight = False, u32(0), f32(0)
            if position < stop:
                noted = load_u32(first_occurrence(work, position))
                if noted != u32(NO_POSITION):
                    unique = load_u32(firsts + u64(noted) * u64(4))
                    if unique >= first and u32(unique - first) < n_rows:
                        mine, number = True, u32(unique - first)
                        weight = weight_at(weights, position, scale)
            wanted = u32(cuda.ballot_sync(FULL_WARP, mine))
            if wanted != u32(0):
                accumulate(
                    values, number, weight, wanted, u32(min(stop - chunk, u64(32))),
                    out + bag * u64(out_bytes), False, lane,
                )  # fmt: skip
            chunk += u64(32)

    name = f"pooled_scatter_{rows.name}"
    return KernelSpec(name, pooled_scatter, "UuUUUUuuUu", block=BLOCK)
