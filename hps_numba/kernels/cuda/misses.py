"""Misses of a launch in the workspace: compacted, and each key once.

A *claim* says where a key was first seen in this launch: generation of the launch (39
bits), whether it was a hit (1 bit), and position (24 bits). Claims of earlier
generations count as empty, so nothing is cleared between launches. Claims lie in an
open-addressed table of at least twice as many entries as there are keys; the key itself
is read from the launch's keys, so that every int64 can be claimed.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.device import reserve
from hps_numba.kernels.cuda.hashing import claim_of, hash_key
from hps_numba.kernels.cuda.layout import (
    CLAIM_MASK,
    CLAIMS,
    CLOCK,
    COUNTER_BYTES,
    FIRSTS,
    GENERATION,
    HITS,
    KEY_BYTES,
    MISSES,
    MISSING,
    N_HITS,
    N_MISSING,
    N_UNIQUE_HITS,
    N_UNIQUE_MISSING,
    RESULTS,
    TABLE_TICKET,
    TICKET,
    UNIQUE,
    WORK_HEADER,
)
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u32,
    add_u64,
    fence,
    load_const_u64,
    load_u32,
    load_u64,
    store_u32,
    store_u64,
    swap_u64,
)
from hps_numba.kernels.cuda.scores import step_of

u32, u64 = np.uint32, np.uint64

UNCOUNTED = 8  # flag: neither totals nor the clock hear of the launch

POSITION_BITS = 24
POSITION_MASK = (1 << POSITION_BITS) - 1
HIT_BIT = 1 << POSITION_BITS
GENERATION_SHIFT = POSITION_BITS + 1


@cuda.jit(device=True, forceinline=True)
def claim(work, n_table, keys, start, end, position, missed):
    """Return the position of the first occurrence of a key: its own if it is that.

    Occurrences of one table that hit and such that missed are told apart, since a key
    may be inserted while a launch runs.
    """
    claims = load_const_u64(work + u64(CLAIMS))
    mask = load_const_u64(work + u64(CLAIM_MASK))
    generation = load_u64(work + u64(GENERATION))
    key = load_u64(keys + position * u64(KEY_BYTES))
    kind = u64(0)
    if not missed:
        kind = u64(HIT_BIT)
    mine = (generation << u64(GENERATION_SHIFT)) | kind | position
    place = claim_of(hash_key(key), n_table, mask)
    first = position
    for _ in range(mask + u64(1)):
        entry = claims + place * u64(8)
        other = load_u64(entry)
        if (other >> u64(GENERATION_SHIFT)) != generation:
            before = swap_u64(entry, other, mine)
            if before == other:
                break
            other = before
        where = other & u64(POSITION_MASK)
        if (
            (other & u64(HIT_BIT)) == kind
            and where >= start
            and where < end
            and load_const_u64(keys + where * u64(KEY_BYTES)) == key
        ):
            first = where
            break
        place = (place + u64(1)) & mask
    return first


@cuda.jit(device=True, forceinline=True)
def name_keys(work, n_table, keys, start, end, position, missed, claiming):
    """Give each missing key of a warp a number, once; return its first position.

    ``unique[start + u]`` becomes the table's u-th missing key, and ``firsts[position]``
    the u of a first occurrence. Lanes that are ``claiming`` without having missed are
    hits, whose unique keys are counted.
    """
    lane = u32(cuda.laneid)
    counters = counters_of(work, n_table)
    first = position
    if claiming:
        first = claim(work, n_table, keys, start, end, position, missed)
    is_first = claiming and first == position
    new_hits = u32(cuda.ballot_sync(FULL_WARP, is_first and not missed))
    new_misses = u32(cuda.ballot_sync(FULL_WARP, is_first and missed))
    if new_hits != u32(0) and lane == u32(0):
        add_u32(counters + u64(N_UNIQUE_HITS), u32(cuda.popc(new_hits)))
    if new_misses != u32(0):
        number = reserve(counters + u64(N_UNIQUE_MISSING), new_misses, lane)
        if is_first and missed:
            unique = load_const_u64(work + u64(UNIQUE))
            key = load_u64(keys + position * u64(KEY_BYTES))
            store_u64(unique + (start + u64(number)) * u64(KEY_BYTES), key)
            firsts = load_const_u64(work + u64(FIRSTS))
            store_u32(firsts + position * u64(4), number)
    return first


@cuda.jit(device=True, forceinline=True)
def record_misses(work, n_table, keys, start, end, position, missed, claiming):
    """Name a warp's missing keys and write down every occurrence.

    ``missing[start + i]`` is (position, position of the first occurrence) of the
    table's i-th miss.
    """
    if cuda.ballot_sync(FULL_WARP, claiming) != 0:
        first = name_keys(work, n_table, keys, start, end, position, missed, claiming)
        misses = u32(cuda.ballot_sync(FULL_WARP, missed))
        if misses != u32(0):
            counter = counters_of(work, n_table) + u64(N_MISSING)
            place = reserve(counter, misses, u32(cuda.laneid))
            if missed:
                entry = load_const_u64(work + u64(MISSING))
                entry = entry + (start + u64(place)) * u64(8)
                store_u64(entry, position | (first << u64(32)))


@cuda.jit(device=True, forceinline=True)
def counters_of(work, n_table):
    """Return the address of the counters that a launch adds to."""
    return work + u64(WORK_HEADER) + n_table * u64(COUNTER_BYTES)


@cuda.jit(device=True, forceinline=True)
def end_launch(work, n_table, table, n_keys, n_blocks, flags):
    """Let the last block publish the results and make the workspace ready again.

    All of a table's ``n_blocks`` call this, each as a whole. Who draws a table's last
    ticket publishes that table: all others' counts were added before they drew theirs.
    The last table ends the generation.
    """
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        counters = counters_of(work, n_table)
        fence()
        ticket = add_u32(counters + u64(TABLE_TICKET), u32(1))
        if u32(ticket + u32(1)) == n_blocks:
            fence()
            results = load_const_u64(work + u64(RESULTS))
            publish(counters, results + n_table * u64(COUNTER_BYTES), n_keys)
            if (flags & u32(UNCOUNTED)) == u32(0):
                count_keys(counters, table, n_keys)
            store_u64(counters, u64(0))
            store_u64(counters + u64(8), u64(0))
            fence()
            if u32(add_u32(work + u64(TICKET), u32(1)) + u32(1)) == cuda.gridDim.y:
                fence()
                store_u32(work + u64(TICKET), u32(0))
                generation = load_u64(work + u64(GENERATION))
                store_u64(work + u64(GENERATION), generation + u64(1))


@cuda.jit(device=True, forceinline=True)
def publish(counters, result, n_keys):
    """Copy one table's counters to its results."""
    n_missing = load_u32(counters + u64(N_MISSING))
    n_hits = u32(n_keys - u64(n_missing))
    store_u32(result + u64(N_MISSING), n_missing)
    store_u32(
        result + u64(N_UNIQUE_MISSING), load_u32(counters + u64(N_UNIQUE_MISSING))
    )
    store_u32(result + u64(N_HITS), n_hits)
    store_u32(result + u64(N_UNIQUE_HITS), load_u32(counters + u64(N_UNIQUE_HITS)))


@cuda.jit(device=True, forceinline=True)
def count_keys(counters, table, n_keys):
    """Add one table's counters to its totals, and advance its clock."""
    n_missing = u64(load_u32(counters + u64(N_MISSING)))
    add_u64(table + u64(HITS), n_keys - n_missing)
    add_u64(table + u64(MISSES), n_missing)
    add_u64(table + u64(CLOCK), step_of(table, n_keys))
