"""Dump: which keys a range of sets holds."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import reserve
from hps_numba.kernels.cuda.layout import (
    DIGESTS,
    DUMP_BUSY,
    DUMP_COUNT,
    DUMP_TICKET,
    DUMPED,
    DUMPED_BUSY,
    KEY_BYTES,
    KEYS,
    META,
    SET_BYTES,
    TABLE_BYTES,
    WAYS,
)
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u32,
    fence,
    load_acquire_u32,
    load_const_u64,
    load_u8,
    load_u32,
    load_u64,
    opaque,
    shuffle_u32,
    store_u32,
    store_u64,
)

u32, u64 = np.uint32, np.uint64

LOOKS = 1 << 12  # at a set that others write to; some milliseconds
NAP_NS = 500
BLOCK = 256


@cuda.jit(device=True, forceinline=True)
def snapshot(meta, slots, lane):
    """Return whether the lane's way is taken, its key, and if the set stood still."""
    seq = load_acquire_u32(meta)
    taken, key = False, u64(0)
    if lane < u32(WAYS):
        taken = load_u8(meta + u64(DIGESTS) + u64(lane)) != u32(0)
        key = load_u64(slots + u64(lane) * u64(KEY_BYTES))
    fence()
    common = shuffle_u32(seq, u32(0))
    still = load_u32(meta) == seq and seq == common and (seq & u32(1)) == u32(0)
    return taken, key, u32(cuda.ballot_sync(FULL_WARP, still)) == u32(FULL_WARP)


@cache
def dump_kernel() -> KernelSpec:
    """Return the dump of a range of sets.

    Launch   a warp per set of the range, 256 threads, no shared memory
    Reads    sets ``first`` to ``first + n_sets``
    Writes   keys int64, up to 28 a set, without gaps, in no particular order;
             ``counts`` (see ``layout``): how many, and how many sets never stood still
             and were left out. It must be zero before the first launch, and is ready
             for the next one
    Races    safe beside all other kernels; takes no lock. Keys of one set are of one
             instant; a key of a static table that goes and comes back meanwhile may be
             told of both its sets. Nothing else uses ``counts``
    Cost     288 bytes read a set; one atomic operation
    Oracle   tests/kernels/cuda/oracle.py: OracleTable.dump

    The rows are had by a query of the keys that touches no scores.
    """

    def dump(tables, n_table, first, n_sets, keys, counts):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        n_set = thread >> u64(5)
        table = tables + u64(n_table) * u64(TABLE_BYTES)
        if n_set < n_sets:
            meta = load_const_u64(table + u64(META)) + (first + n_set) * u64(SET_BYTES)
            slots = load_const_u64(table + u64(KEYS))
            slots += (first + n_set) * u64(WAYS * KEY_BYTES)
            taken, key, still = False, u64(0), False
            for _ in range(opaque(u32(LOOKS))):
                taken, key, still = snapshot(meta, slots, lane)
                if still:
                    break
                cuda.nanosleep(u32(NAP_NS))
            if still:
                ways = u32(cuda.ballot_sync(FULL_WARP, taken))
                if ways != u32(0):
                    place = reserve(counts + u64(DUMP_COUNT), ways, lane)
                    if taken:
                        store_u64(keys + u64(place) * u64(KEY_BYTES), key)
            elif lane == u32(0):
                add_u32(counts + u64(DUMP_BUSY), u32(1))
        end_dump(counts)

    return KernelSpec("dump", dump, "UuUUUU", block=BLOCK)


@cuda.jit(device=True, forceinline=True)
def end_dump(counts):
    """Let the last block publish what was counted, and begin again at zero."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        fence()
        ticket = add_u32(counts + u64(DUMP_TICKET), u32(1))
        if u32(ticket + u32(1)) == u32(cuda.gridDim.x):
            fence()
            # As the second of two offsets, it tells a query how many keys there are.
            store_u64(counts + u64(DUMPED), u64(load_u32(counts + u64(DUMP_COUNT))))
            store_u32(counts + u64(DUMPED_BUSY), load_u32(counts + u64(DUMP_BUSY)))
            store_u32(counts + u64(DUMP_COUNT), u32(0))
            store_u32(counts + u64(DUMP_BUSY), u32(0))
            store_u32(counts + u64(DUMP_TICKET), u32(0))
