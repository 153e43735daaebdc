"""What kernels have in common: sets and their locks, digests, a warp's bookkeeping.

The sequence protocol, with ``seq`` the first word of a set's metadata:

- A writer makes it odd with a compare-and-swap, fences, changes the set, and stores the
  next even number with release. Whoever finds it odd waits a bounded time.
- A reader takes no lock. It loads ``seq`` with acquire, reads key and row, fences, and
  loads ``seq`` again. The same even number means that nobody wrote meanwhile. Where a
  warp reads a row together, all its lanes have read before one of them looks again.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.hashing import set_of
from hps_numba.kernels.cuda.layout import (
    DIGESTS,
    KEY_BYTES,
    KEYS,
    META,
    N_SETS,
    SET_BYTES,
    WAYS,
)
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u32,
    fence,
    load_acquire_quad,
    load_const_u64,
    load_quad,
    load_u8,
    load_u32,
    load_u64,
    opaque,
    shuffle_u32,
    store_release_u32,
    swap_acquire_u32,
)

u32, u64 = np.uint32, np.uint64

ATTEMPTS = 2  # times a reader looks before it hands a key on as a miss
SPINS = 1 << 16  # times a writer asks for a set; some 10 ms
NAP_NS = 100
BUSY = 1  # an odd number: the set was not to be had


@cuda.jit(device=True, forceinline=True)
def equal_bytes(word, pattern):
    """Return 4 bits, one for each byte of ``word`` that equals that of ``pattern``."""
    low = u32(0x7F7F7F7F)
    differ = u32(word ^ pattern)
    # 0x80 where a byte of `differ` is zero, exactly: no borrow crosses a byte.
    high = u32(~u32(u32(u32(u32(differ & low) + low) | differ) | low))
    return u32(u32(u32(high >> u32(7)) * u32(0x01020408)) >> u32(24)) & u32(0xF)


@cuda.jit(device=True, forceinline=True)
def matching_ways(low, high, digest):
    """Return 28 bits: the ways of a set whose digest this is."""
    pattern = u32(digest * u32(0x01010101))
    ways = equal_bytes(low[1], pattern)
    ways = u32(ways | u32(equal_bytes(low[2], pattern) << u32(4)))
    ways = u32(ways | u32(equal_bytes(low[3], pattern) << u32(8)))
    ways = u32(ways | u32(equal_bytes(high[0], pattern) << u32(12)))
    ways = u32(ways | u32(equal_bytes(high[1], pattern) << u32(16)))
    ways = u32(ways | u32(equal_bytes(high[2], pattern) << u32(20)))
    return u32(ways | u32(equal_bytes(high[3], pattern) << u32(24)))


@cuda.jit(device=True, forceinline=True)
def first_bit(bits):
    """Return the place of the lowest bit of a uint32 that is not 0."""
    return u32(u32(cuda.ffs(bits)) - u32(1))


@cuda.jit(device=True, forceinline=True)
def probe(meta, keys, key, digest):
    """Look for a key in a set, as one thread beside writers.

    The upper half of the metadata is loaded before ``seq``, so that the two are in
    flight together. A digest from before ``seq`` may hide a key that is there, or show
    one that was there when the lookup began; what the row is, the key decides.

    Returns
    -------
    way
        28 where the key is not there.
    seq
        The set's number before its keys were read; odd while a writer was in it.
    """
    high = load_quad(meta + u64(16))
    low = load_acquire_quad(meta)
    seq = low[0]
    way = u32(WAYS)
    if (seq & u32(1)) == u32(0):
        ways = matching_ways(low, high, digest)
        # Each round drops one of 28 bits.
        while ways != u32(0):
            candidate = first_bit(ways)
            ways = u32(ways & u32(ways - u32(1)))
            if load_u64(keys + u64(candidate) * u64(KEY_BYTES)) == key:
                way = candidate
                ways = u32(0)
    return way, seq


@cuda.jit(device=True, forceinline=True)
def begin_reads():
    """Let the warp's loads of rows come after the ``seq`` that any of its lanes saw."""
    cuda.syncwarp(FULL_WARP)


@cuda.jit(device=True, forceinline=True)
def end_reads():
    """Let what any lane of the warp does next come after the loads of all of them."""
    fence()
    cuda.syncwarp(FULL_WARP)


@cuda.jit(device=True, forceinline=True)
def unchanged(meta, seq):
    """Return whether a set's number is still ``seq``, after ``end_reads``."""
    return load_u32(meta) == seq


@cuda.jit(device=True, forceinline=True)
def lock_set(meta):
    """Make a set odd, as a whole warp; return the even number before, or BUSY.

    Progress: whoever holds a set never waits, or for a set of a higher number only
    (``pairs``), so a set comes free; after a bounded number of tries the warp gives up
    all the same.
    """
    seq = u32(BUSY)
    if cuda.laneid == 0:
        for _ in range(opaque(u32(SPINS))):
            now = load_u32(meta)
            if (now & u32(1)) == u32(0) and swap_acquire_u32(
                meta, now, u32(now | u32(1))
            ) == now:
                seq = now
                break
            cuda.nanosleep(u32(NAP_NS))
    seq = shuffle_u32(seq, u32(0))
    cuda.syncwarp(FULL_WARP)
    # Each lane's writes come after the odd number, for any reader that sees them.
    fence()
    return seq


@cuda.jit(device=True, forceinline=True)
def unlock_set(meta, seq):
    """Publish a set under the even number ``seq``, after all lanes' writes."""
    cuda.syncwarp(FULL_WARP)
    if cuda.laneid == 0:
        store_release_u32(meta, seq)


@cuda.jit(device=True, forceinline=True)
def way_in_locked(meta, keys, key, digest, lane):
    """Return the way of a key in a set that this warp holds, or 28.

    Returns
    -------
    way
        28 where the key is not there.
    mine
        The digest of the lane's own way; 0 if that is empty, 255 for a lane without
        one.
    """
    mine = u32(255)
    same = False
    if lane < u32(WAYS):
        mine = load_u8(meta + u64(DIGESTS) + u64(lane))
        if mine == digest:
            same = load_u64(keys + u64(lane) * u64(KEY_BYTES)) == key
    ways = u32(cuda.ballot_sync(FULL_WARP, same))
    way = u32(WAYS)
    if ways != u32(0):
        way = first_bit(ways)
    return way, mine


@cuda.jit(device=True, forceinline=True)
def place_of(table, hashed):
    """Return where a key may live: its set's metadata, keys, and first slot."""
    return place_of_set(table, set_of(hashed, load_const_u64(table + u64(N_SETS))))


@cuda.jit(device=True, forceinline=True)
def place_of_set(table, n_set):
    """Return a set's metadata, keys, and first slot."""
    meta = load_const_u64(table + u64(META)) + n_set * u64(SET_BYTES)
    slot = n_set * u64(WAYS)
    keys = load_const_u64(table + u64(KEYS)) + slot * u64(KEY_BYTES)
    return meta, keys, slot


@cuda.jit(device=True, forceinline=True)
def start_of(offsets, table):
    """Return where a table's part of the last query began; see ``segment``."""
    start = u64(0)
    if offsets != u64(0):
        start = load_const_u64(offsets + table * u64(8))
    return start


@cuda.jit(device=True, forceinline=True)
def segment(offsets, table, n):
    """Return the first and the end of a table's part of a launch.

    ``offsets`` is the address of uint64 (n_tables + 1,), or 0 for one table with all.
    """
    start = u64(0)
    end = u64(n)
    if offsets != u64(0):
        # Whatever memory says, nothing is read or written past the launch's own.
        end = min(load_const_u64(offsets + table * u64(8) + u64(8)), end)
        start = min(load_const_u64(offsets + table * u64(8)), end)
    return start, end


@cuda.jit(device=True, forceinline=True)
def blocks_for(n, per_block):
    """Return how many blocks take ``n``: one at least, and no more than there are."""
    needed = (n + u64(per_block - 1)) // u64(per_block)
    return u32(min(max(needed, u64(1)), u64(cuda.gridDim.x)))


@cuda.jit(device=True, forceinline=True)
def lanes_below(lane):
    """Return the bits of the lanes before this one."""
    return u32(u32(u32(1) << lane) - u32(1))


@cuda.jit(device=True, forceinline=True)
def reserve(counter, lanes, lane):
    """Add the number of ``lanes`` to a counter, once; return this lane's place."""
    leader = first_bit(lanes)
    base = u32(0)
    if lane == leader:
        base = add_u32(counter, u32(cuda.popc(lanes)))
    base = shuffle_u32(base, leader)
    return u32(base + u32(cuda.popc(u32(lanes & lanes_below(lane)))))
