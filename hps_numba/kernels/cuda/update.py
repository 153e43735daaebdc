"""Update: new rows for keys that are there, in place; the others stay away."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import lock_set, place_of, unlock_set, way_in_locked
from hps_numba.kernels.cuda.hashing import digest_of, hash_key, stamp_of
from hps_numba.kernels.cuda.layout import (
    KEY_BYTES,
    ROWS,
    STAMP_MASK,
    STAMPS,
    TABLE_BYTES,
    UPDATED,
    WAYS,
    Outcome,
    Policy,
    RowLayout,
)
from hps_numba.kernels.cuda.pairs import second_place_of
from hps_numba.kernels.cuda.ptx import add_u64, load_const_u64, store_u8, store_u64
from hps_numba.kernels.cuda.rows import write_row

u32, u64 = np.uint32, np.uint64

BLOCK = 256
MAX_REGISTERS = 48  # of the two looks of a static table; they fit without spills

_REPLACED, _ABSENT, _BUSY = (
    u32(Outcome.REPLACED),
    u32(Outcome.ABSENT),
    u32(Outcome.BUSY),
)


@cuda.jit(device=True, forceinline=True)
def stamp_key(table, hashed, epoch):
    """Note when a key was last updated, in a set that is held.

    Whoever updates a table does so one batch after the other, so stamps need no
    maximum: the last one counts.
    """
    stamp = stamp_of(hashed, load_const_u64(table + u64(STAMP_MASK)))
    store_u64(load_const_u64(table + u64(STAMPS)) + stamp * u64(8), epoch)


@cache
def replacer(rows: RowLayout) -> Any:
    """Return a device function that replaces a key's row in one set, as a warp."""
    write = write_row(rows)
    stride = rows.stride_bytes

    @cuda.jit(device=True, forceinline=True)
    def replace(table, place, key, hashed, epoch, stamps, source, lane):
        """Return what became of the key; ``stamps`` says whether to stamp it."""
        meta, slots, slot = place
        outcome = _BUSY
        seq = lock_set(meta)
        if (seq & u32(1)) == u32(0):
            outcome = _ABSENT
            if stamps and lane == u32(0):
                stamp_key(table, hashed, epoch)
            way, _ = way_in_locked(meta, slots, key, digest_of(hashed), lane)
            if way < u32(WAYS):
                outcome = _REPLACED
                target = load_const_u64(table + u64(ROWS))
                target += (slot + u64(way)) * u64(stride)
                write(source, target, lane)
                seq = u32(seq + u32(2))
            unlock_set(meta, seq)
        return outcome

    return replace


def update_kernel(rows: RowLayout, policy: Policy) -> KernelSpec:
    """Return the update of a cache with such rows.

    Launch   a warp per key, 256 threads, no shared memory
    Reads    keys int64 (n,), unique; rows of the stored type (n, dim) without gaps
    Writes   rows of keys that are there, the stamps of all; outcomes uint8 (n,), or
             nothing if that address is 0: REPLACED, ABSENT, or BUSY, to be tried again
    Races    safe beside queries, inserts and dumps; updates and evictions of one table
             come one after the other
    Cost     as an insert; scores are left alone. In a static table what is not in its
             home set reads another 64 bytes of metadata, with two atomic operations
    Oracle   tests/kernels/cuda/oracle.py: OracleTable.update
    """
    # How rows are given out is all the same here; no two kernels have one name.
    stored = RowLayout(rows.dim, rows.stored, rows.stored)
    return _update_kernel(stored, two_sets=policy.two_sets)


@cache
def _update_kernel(rows: RowLayout, *, two_sets: bool) -> KernelSpec:
    replace = replacer(rows)
    row_bytes = rows.row_bytes

    def update(tables, n_table, keys, values, n, epoch, outcomes):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        i = thread >> u64(5)
        if i >= n:
            return
        table = tables + u64(n_table) * u64(TABLE_BYTES)
        key = load_const_u64(keys + i * u64(KEY_BYTES))
        hashed = hash_key(key)
        source = values + i * u64(row_bytes)
        place = place_of(table, hashed)
        outcome = replace(table, place, key, hashed, epoch, True, source, lane)
        if two_sets and outcome == _ABSENT:
            place = second_place_of(table, hashed)
            outcome = replace(table, place, key, hashed, epoch, False, source, lane)
        if lane == u32(0):
            if outcome == _REPLACED:
                add_u64(table + u64(UPDATED), u64(1))
            if outcomes != u64(0):
                store_u8(outcomes + i, outcome)

    name = f"update_{rows.stored}_{rows.dim}" + ("_static" if two_sets else "")
    most = MAX_REGISTERS if two_sets else None
    return KernelSpec(name, update, "UuUUUUU", block=BLOCK, max_registers=most)
