"""Evict: keys of a list, or all of a table."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import lock_set, place_of, unlock_set, way_in_locked
from hps_numba.kernels.cuda.hashing import digest_of, hash_key
from hps_numba.kernels.cuda.layout import (
    DIGESTS,
    FLOOR,
    KEY_BYTES,
    META,
    N_SETS,
    SET_BYTES,
    SIZE,
    TABLE_BYTES,
    WAYS,
    Outcome,
    Policy,
)
from hps_numba.kernels.cuda.pairs import second_place_of
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u64,
    load_const_u64,
    load_u8,
    max_u64,
    store_u8,
)
from hps_numba.kernels.cuda.update import stamp_key

u32, u64 = np.uint32, np.uint64

BLOCK = 256

_EVICTED, _ABSENT, _BUSY = (
    u32(Outcome.EVICTED),
    u32(Outcome.ABSENT),
    u32(Outcome.BUSY),
)


@cuda.jit(device=True, forceinline=True)
def remove(table, place, key, hashed, epoch, stamps, lane):
    """Remove a key from one set, as a warp; return what became of it."""
    meta, slots, _ = place
    outcome = _BUSY
    seq = lock_set(meta)
    if (seq & u32(1)) == u32(0):
        outcome = _ABSENT
        if stamps and lane == u32(0):
            stamp_key(table, hashed, epoch)
        way, _ = way_in_locked(meta, slots, key, digest_of(hashed), lane)
        if way < u32(WAYS):
            outcome = _EVICTED
            if lane == u32(0):
                store_u8(meta + u64(DIGESTS) + u64(way), u32(0))
            seq = u32(seq + u32(2))
        unlock_set(meta, seq)
    return outcome


def evict_kernel(policy: Policy) -> KernelSpec:
    """Return the eviction of listed keys.

    Launch   a warp per key, 256 threads, no shared memory
    Reads    keys int64 (n,), unique
    Writes   digests of keys that are there, the stamps of all; outcomes uint8 (n,), or
             nothing if that address is 0: EVICTED, ABSENT, or BUSY, to be tried again
    Races    safe beside queries, inserts and dumps; updates and evictions of one table
             come one after the other
    Cost     a key reads 64 bytes of metadata and 32 of keys; two atomic operations; in
             a static table what is not in its home set as much again
    Oracle   tests/kernels/cuda/oracle.py: OracleTable.evict
    """
    return _evict_kernel(two_sets=policy.two_sets)


@cache
def _evict_kernel(*, two_sets: bool) -> KernelSpec:
    def evict(tables, n_table, keys, n, epoch, outcomes):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        i = thread >> u64(5)
        if i >= n:
            return
        table = tables + u64(n_table) * u64(TABLE_BYTES)
        key = load_const_u64(keys + i * u64(KEY_BYTES))
        hashed = hash_key(key)
        place = place_of(table, hashed)
        outcome = remove(table, place, key, hashed, epoch, True, lane)
        if two_sets and outcome == _ABSENT:
            place = second_place_of(table, hashed)
            outcome = remove(table, place, key, hashed, epoch, False, lane)
        if lane == u32(0):
            if outcome == _EVICTED:
                add_u64(table + u64(SIZE), u64(-1))
            if outcomes != u64(0):
                store_u8(outcomes + i, outcome)

    name = "evict_static" if two_sets else "evict"
    return KernelSpec(name, evict, "UuUUUU", block=BLOCK)


@cache
def clear_kernel() -> KernelSpec:
    """Return the eviction of a whole table.

    Launch   a warp per set, 256 threads, no shared memory
    Reads    nothing
    Writes   all digests; the table's floor: inserts of before ``epoch`` are refused
             from the moment their set is cleared; busy uint8 (n_sets,), or nothing if
             that address is 0: 1 for a set that was held for too long, to be tried
             again
    Races    as an eviction
    Cost     32 bytes read and written a set
    Oracle   tests/kernels/cuda/oracle.py: OracleTable.clear
    """

    def clear(tables, n_table, epoch, busy):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        n_set = thread >> u64(5)
        table = tables + u64(n_table) * u64(TABLE_BYTES)
        if n_set >= load_const_u64(table + u64(N_SETS)):
            return
        if lane == u32(0):
            # The release of the set shows it to inserts that take the set afterwards.
            max_u64(table + u64(FLOOR), epoch)
        meta = load_const_u64(table + u64(META)) + n_set * u64(SET_BYTES)
        seq = lock_set(meta)
        held = (seq & u32(1)) == u32(0)
        if held:
            occupied = False
            if lane < u32(WAYS):
                digest = meta + u64(DIGESTS) + u64(lane)
                occupied = load_u8(digest) != u32(0)
                store_u8(digest, u32(0))
            n_gone = u64(cuda.popc(u32(cuda.ballot_sync(FULL_WARP, occupied))))
            unlock_set(meta, u32(seq + u32(2)))
            if lane == u32(0):
                add_u64(table + u64(SIZE), u64(0) - n_gone)
        if lane == u32(0) and busy != u64(0):
            store_u8(busy + n_set, u32(0) if held else u32(1))

    return KernelSpec("clear", clear, "UuUU", block=BLOCK)
