"""Changing a host hash table; see ``kernels.host.table`` for layout and invariants.

The caller lets one writer at a time into a table. Readers may run beside all of these.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.hashing import hash_key
from hps_numba.kernels.host.memory import (
    copy_row,
    fence_release,
    load_acquire,
    prefetch,
    store_release,
)
from hps_numba.kernels.host.table import (
    D_INDEX,
    D_MASK,
    D_ROWS,
    D_SCORES,
    HEADER_BYTES,
    LEAST_USED,
    LOW,
    NO_ROW,
    OLDEST,
    RANDOM,
    SLOT_BYTES,
    TOMBSTONE,
    locate,
    probe,
)

# A partition's state, int64, for writers only.
S_SIZE = 0  # keys
S_USED = 1  # slots that are not empty: keys and tombstones
S_NEXT_ROW = 2  # rows below were handed out at least once
S_FREE = 3  # entries of the free list
S_ROOM = 4  # rows that the segments hold
S_FIELDS = 5

# Why a writer stopped.
DONE = 0
NEED_INDEX = 1
NEED_ROWS = 2
NEED_EVICTION = 3

_VERSION = np.int64(1 << 32)


@njit(nogil=True, cache=True, inline="always")
def _take_row(state, free):
    """Return a row that no slot points to, -1 if there is none."""
    if state[S_FREE] > 0:
        state[S_FREE] -= 1
        return np.int64(free[state[S_FREE]])
    if state[S_NEXT_ROW] < state[S_ROOM]:
        state[S_NEXT_ROW] += 1
        return state[S_NEXT_ROW] - 1
    return np.int64(-1)


@njit(nogil=True, cache=True, inline="always")
def _give_row(state, free, row):
    free[state[S_FREE]] = np.uint32(row)
    state[S_FREE] += 1


@njit(nogil=True, cache=True)
def _slot_for(index, mask, h, key):
    """Return the slot of a key, or the one to write it to, and its meta."""
    position = np.int64(h >> np.uint64(20)) & mask
    grave = np.int64(0)
    for _ in range(mask + 1):
        slot = index + HEADER_BYTES + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        row = meta & LOW
        if row == NO_ROW:
            return (grave, load_acquire(grave + 8)) if grave else (slot, meta)
        if row == TOMBSTONE:
            if grave == 0:
                grave = slot
        elif load_acquire(slot) == key:
            return slot, meta
        position = (position + 1) & mask
    return grave, load_acquire(grave + 8) if grave else NO_ROW


@njit(nogil=True, cache=True)
def _write_row(desc, p, state, free, meta, source, row_bytes, policy, tick):
    """Copy a row to a fresh place with its score; return the row number or -1."""
    row = _take_row(state, free)
    if row < 0:
        return row
    # The slot that left this row changed before; no reader may see it the other way
    # round. Pairs with fence_acquire of the reader.
    fence_release()
    copy_row(locate(desc, p, D_ROWS, row, row_bytes), source, row_bytes)
    if policy != RANDOM:
        score = np.int64(0)
        if policy == OLDEST:
            score = tick
        elif (meta & LOW) < TOMBSTONE:
            old = locate(desc, p, D_SCORES, meta & LOW, np.int64(8))
            score = load_acquire(old)
        store_release(locate(desc, p, D_SCORES, row, np.int64(8)), score)
    return row


@njit(nogil=True, cache=True)
def upsert_rows(desc, p, state, free, keys, rows, order, limits, policy, tick):
    """Insert or replace rows of one partition.

    Reads    keys int64 (n,), rows (n, row_bytes) uint8, order int64 (m,): which of them
    Writes   index, rows, scores, state int64 (S_FIELDS,), free uint32
    limits   int64 (2,): most keys, most slots in use
    Races    safe beside readers; the caller excludes other writers
    Returns  why it stopped, and how many entries of ``order`` are done
    """
    row_bytes = rows.shape[1]
    base = np.int64(rows.ctypes.data)
    index = desc[p, D_INDEX]
    mask = desc[p, D_MASK]
    for j in range(order.size):
        i = order[j]
        if j + 8 < order.size:
            ahead = np.int64(hash_key(keys[order[j + 8]]) >> np.uint64(20)) & mask
            prefetch(index + HEADER_BYTES + ahead * SLOT_BYTES)
        key = keys[i]
        slot, meta = _slot_for(index, mask, hash_key(key), key)
        old = meta & LOW
        if old >= TOMBSTONE:
            if state[S_SIZE] >= limits[0]:
                return NEED_EVICTION, j
            if old == NO_ROW and state[S_USED] >= limits[1]:
                return NEED_INDEX, j
        source = base + i * row_bytes
        row = _write_row(desc, p, state, free, meta, source, row_bytes, policy, tick)
        if row < 0:
            return NEED_ROWS, j
        if old >= TOMBSTONE:
            store_release(slot, key)
            state[S_SIZE] += 1
            if old == NO_ROW:
                state[S_USED] += 1
        store_release(slot + 8, (meta & ~LOW) + _VERSION + row)
        if old < TOMBSTONE:
            _give_row(state, free, old)
    return DONE, order.size


@njit(nogil=True, cache=True, inline="always")
def _bury(index, mask, slot, meta, state, free):
    """Remove the key of a slot; a tombstone at the end of a chain becomes empty."""
    _give_row(state, free, meta & LOW)
    state[S_SIZE] -= 1
    first = index + HEADER_BYTES
    position = (slot - first) // SLOT_BYTES
    following = first + ((position + 1) & mask) * SLOT_BYTES
    if load_acquire(following + 8) & LOW != NO_ROW:
        store_release(slot + 8, (meta & ~LOW) + _VERSION + TOMBSTONE)
        return
    store_release(slot + 8, (meta & ~LOW) + _VERSION + NO_ROW)
    state[S_USED] -= 1
    for _ in range(mask):
        position = (position - 1) & mask
        slot = first + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        if meta & LOW != TOMBSTONE:
            break
        store_release(slot + 8, (meta & ~LOW) + _VERSION + NO_ROW)
        state[S_USED] -= 1


@njit(nogil=True, cache=True)
def remove_keys(desc, p, state, free, keys, order):
    """Remove keys of one partition and return how many were there."""
    index = desc[p, D_INDEX]
    mask = desc[p, D_MASK]
    removed = 0
    for j in range(order.size):
        key = keys[order[j]]
        slot, meta = probe(index, mask, hash_key(key), key)
        if slot != 0:
            _bury(index, mask, slot, meta, state, free)
            removed += 1
    return removed


@njit(nogil=True, cache=True)
def clear_slots(desc, p, state):
    """Remove all keys of a partition; its index and rows stay for new ones."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    for position in range(desc[p, D_MASK] + 1):
        slot = first + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        if meta & LOW != NO_ROW:
            store_release(slot + 8, (meta & ~LOW) + _VERSION + NO_ROW)
    state[S_SIZE] = 0
    state[S_USED] = 0
    state[S_NEXT_ROW] = 0
    state[S_FREE] = 0


@njit(nogil=True, cache=True)
def _threshold(desc, p, size, n_victims):
    """Return the score of the last victim, how many share it, and how many must go."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    scores = np.empty(size, np.int64)
    n = 0
    for position in range(desc[p, D_MASK] + 1):
        row = load_acquire(first + position * SLOT_BYTES + 8) & LOW
        if row < TOMBSTONE:
            scores[n] = load_acquire(locate(desc, p, D_SCORES, row, np.int64(8)))
            n += 1
    ranked = np.partition(scores[:n], n_victims - 1)
    last = ranked[n_victims - 1]
    ties = 0
    for i in range(n):
        if ranked[i] == last:
            ties += 1
    wanted = 0
    for i in range(n_victims):
        if ranked[i] == last:
            wanted += 1
    return last, ties, wanted


@njit(nogil=True, cache=True)
def evict_rows(desc, p, state, free, n_victims, policy, seed):
    """Remove ``n_victims`` keys by policy and return how many went.

    RANDOM draws them. LEAST_USED and OLDEST take the smallest scores and draw among
    equal ones; LEAST_USED then halves the others, so that old fame fades. Drawn keys
    lie all over the index (one pass, each candidate with the chance that is left), as
    tombstones side by side would lengthen every probe that meets them.
    """
    index = desc[p, D_INDEX]
    mask = desc[p, D_MASK]
    n_victims = min(n_victims, state[S_SIZE])
    if n_victims <= 0:
        return 0
    last, candidates, wanted = np.int64(0), state[S_SIZE], n_victims
    if policy != RANDOM:
        last, candidates, wanted = _threshold(desc, p, state[S_SIZE], n_victims)
    draw = np.uint64(seed) | np.uint64(1)
    removed = 0
    for position in range(mask + 1):
        slot = index + HEADER_BYTES + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        row = meta & LOW
        if row >= TOMBSTONE:
            continue
        address, score = np.int64(0), last
        if policy != RANDOM:
            address = locate(desc, p, D_SCORES, row, np.int64(8))
            score = load_acquire(address)
        # Readers raise scores meanwhile: a row that rises above the bar is spared.
        chosen = score < last and removed < n_victims
        if score == last and candidates > 0:
            draw ^= draw << np.uint64(13)
            draw ^= draw >> np.uint64(7)
            draw ^= draw << np.uint64(17)
            chosen = np.int64((draw >> np.uint64(11)) % np.uint64(candidates)) < wanted
            candidates -= 1
            wanted -= np.int64(chosen)
        if chosen:
            _bury(index, mask, slot, meta, state, free)
            removed += 1
        elif policy == LEAST_USED:
            store_release(address, score >> 1)
    return removed


@njit(nogil=True, cache=True)
def rebuild_index(desc, p, state, new_index, new_mask):
    """Copy the keys of a partition to an empty index and drop the tombstones."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    for old_position in range(desc[p, D_MASK] + 1):
        slot = first + old_position * SLOT_BYTES
        row = load_acquire(slot + 8) & LOW
        if row >= TOMBSTONE:
            continue
        key = load_acquire(slot)
        position = np.int64(hash_key(key) >> np.uint64(20)) & new_mask
        target = new_index + HEADER_BYTES + position * SLOT_BYTES
        while load_acquire(target + 8) & LOW != NO_ROW:
            position = (position + 1) & new_mask
            target = new_index + HEADER_BYTES + position * SLOT_BYTES
        store_release(target, key)
        store_release(target + 8, row)
    state[S_USED] = state[S_SIZE]


@njit(nogil=True, cache=True)
def retire_index(index):
    """Tell readers of an index that it no longer gets changes."""
    store_release(index, 1)
