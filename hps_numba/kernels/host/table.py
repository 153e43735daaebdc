"""A hash table in host memory: many lock-free readers beside one writer.

Layout. A table has partitions. A partition has an index of ``(key, meta)`` slots of
16 bytes, probed linearly, and rows in segments of doubling size. ``meta`` is one 64-bit
word: the row number below, a version above that changes whenever the slot does.

Invariants
----------
- A row is written before a slot points to it and is never changed while one does: an
  update takes a fresh row and moves the slot to it with one store.
- A slot keeps its place for the life of the index; a removed key leaves a tombstone.
- A slot's version is never used twice; so a reader that finds the same meta after copying
  the row has copied a row that nobody wrote to meanwhile.
- An index that was replaced is marked retired before any row changes again.

So a reader takes no lock: it copies a row, then looks whether the slot is unchanged and
the index not retired, and tries again if not. Writers of a table exclude one another.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hps_numba.kernels.host.hashing import hash_key
from hps_numba.kernels.host.memory import (
    copy_row,
    count_leading_zeros,
    fence_acquire,
    load_acquire,
    prefetch,
    store_release,
)

# A descriptor row, one per partition, all int64. Readers get a private copy of it.
D_INDEX = 0  # address of the index: a header of 64 bytes, then the slots
D_MASK = 1  # number of slots - 1
D_ROWS = 2  # addresses of the row segments, 0 where there is none yet
MAX_SEGMENTS = 34
D_SCORES = D_ROWS + MAX_SEGMENTS  # addresses of the score segments
D_FIELDS = D_SCORES + MAX_SEGMENTS

# A partition's state, int64, for writers only.
S_SIZE = 0  # keys
S_USED = 1  # slots that are not empty: keys and tombstones
S_NEXT_ROW = 2  # rows below were handed out at least once
S_FREE = 3  # entries of the free list
S_ROOM = 4  # rows that the segments hold
S_FIELDS = 5

HEADER_BYTES = 64  # of an index; its first word is 1 once the index is retired
SLOT_BYTES = 16
SEGMENT_SHIFT = 6  # the first segment has 64 rows
NO_ROW = np.int64(0xFFFFFFFF)  # an empty slot
TOMBSTONE = np.int64(0xFFFFFFFE)
MAX_ROWS = 0xFFFFFFF0

# How scores are kept; equal to the position in OverflowPolicy.
RANDOM = 0
LEAST_USED = 1
OLDEST = 2

# Why a writer stopped.
DONE = 0
NEED_INDEX = 1
NEED_ROWS = 2
NEED_EVICTION = 3

_CHUNK = 512  # keys that are probed before their rows are copied
_SLOTS_AHEAD = 24  # how far ahead slots and rows are asked for
_ROWS_AHEAD = 8
_ATTEMPTS = 64
_LOW = np.int64(0xFFFFFFFF)
_VERSION = np.int64(1 << 32)


@njit(nogil=True, cache=True, inline="always")
def _locate(desc, p, table, row, stride):
    """Return the address of a row (or score) in its segment, 0 if it has none."""
    block = (row >> SEGMENT_SHIFT) + 1
    segment = 63 - count_leading_zeros(block)
    first = ((np.int64(1) << segment) - 1) << SEGMENT_SHIFT
    base = desc[p, table + segment]
    return base + (row - first) * stride if base != 0 else np.int64(0)


@njit(nogil=True, cache=True, inline="always")
def _probe(index, mask, h, key):
    """Return the slot that holds ``key`` and its meta; slot 0 if there is none."""
    position = np.int64(h >> np.uint64(20)) & mask
    for _ in range(mask + 1):
        slot = index + HEADER_BYTES + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        row = meta & _LOW
        if row == NO_ROW:
            break
        if row != TOMBSTONE and load_acquire(slot) == key:
            return slot, meta
        position = (position + 1) & mask
    return np.int64(0), np.int64(0)


@njit(nogil=True, cache=True, inline="always")
def _touch(desc, p, row, policy, tick):
    """Record the use of a row. Lost counts of concurrent readers are accepted."""
    score = _locate(desc, p, D_SCORES, row, np.int64(8))
    if score != 0:
        if policy == OLDEST:
            if load_acquire(score) != tick:
                store_release(score, tick)
        else:
            store_release(score, load_acquire(score) + 1)


@njit(nogil=True, cache=True)
def _read_again(desc, p, h, key, target, row_bytes):
    """Read one row that changed under the reader. 1 found, 0 absent, -1 stale."""
    index = desc[p, D_INDEX]
    for _ in range(_ATTEMPTS):
        slot, meta = _probe(index, desc[p, D_MASK], h, key)
        if slot == 0:
            return -1 if load_acquire(index) else 0
        source = _locate(desc, p, D_ROWS, meta & _LOW, row_bytes)
        if source == 0:
            return -1
        copy_row(target, source, row_bytes)
        fence_acquire()
        if load_acquire(slot + 8) == meta and load_acquire(index) == 0:
            return 1
    return -1


@njit(nogil=True, cache=True)
def fetch_rows(desc, keys, out, found, start, stop, policy, tick):
    """Copy the rows of known keys in ``[start, stop)`` to ``out`` and mark them.

    Reads    desc int64 (partitions, D_FIELDS), keys int64 (n,)
    Writes   out (n, row_bytes) uint8, found bool (n,); scores unless policy is RANDOM
    Races    safe beside other readers and one writer
    Returns  hits, and the position up to which the batch is done; it is below ``stop``
             when the descriptor is out of date, and the caller goes on with a new one
    """
    n_partitions = np.uint64(desc.shape[0])
    low_bits = n_partitions - np.uint64(1)
    if n_partitions & low_bits:
        low_bits = np.uint64(0)
    row_bytes = out.shape[1]
    target = np.int64(out.ctypes.data)
    hashes = np.empty(_CHUNK, np.uint64)
    parts = np.empty(_CHUNK, np.int64)
    slots = np.empty(_CHUNK, np.int64)
    metas = np.empty(_CHUNK, np.int64)
    sources = np.empty(_CHUNK, np.int64)
    hits = 0
    for low in range(start, stop, _CHUNK):
        n = min(_CHUNK, stop - low)
        for i in range(n):
            h = hash_key(keys[low + i])
            # A division costs as much as the rest of this loop.
            p = np.int64(h & low_bits if low_bits else h % n_partitions)
            hashes[i] = h
            parts[i] = p
            position = np.int64(h >> np.uint64(20)) & desc[p, D_MASK]
            slots[i] = desc[p, D_INDEX] + HEADER_BYTES + position * SLOT_BYTES
        for i in range(min(n, _SLOTS_AHEAD)):
            prefetch(slots[i])
        for i in range(n):
            if i + _SLOTS_AHEAD < n:
                prefetch(slots[i + _SLOTS_AHEAD])
            if found[low + i]:
                sources[i] = -2
                continue
            p = parts[i]
            slot, meta = _probe(
                desc[p, D_INDEX], desc[p, D_MASK], hashes[i], keys[low + i]
            )
            if slot == 0:
                # A retired index does not get new keys, so its silence means nothing.
                sources[i] = 0 if load_acquire(desc[p, D_INDEX]) else -2
                continue
            source = _locate(desc, p, D_ROWS, meta & _LOW, row_bytes)
            slots[i] = slot
            metas[i] = meta
            sources[i] = source
            if policy != RANDOM:
                prefetch(_locate(desc, p, D_SCORES, meta & _LOW, np.int64(8)))
        for i in range(min(n, _ROWS_AHEAD)):
            for line in range(0, min(row_bytes, 1024), 64):
                prefetch(sources[i] + line)
        for i in range(n):
            if i + _ROWS_AHEAD < n:
                for line in range(0, min(row_bytes, 1024), 64):
                    prefetch(sources[i + _ROWS_AHEAD] + line)
            source = sources[i]
            if source == -2:
                continue
            if source == 0:
                return hits, low + i
            p = parts[i]
            copy_row(target + (low + i) * row_bytes, source, row_bytes)
            fence_acquire()
            if load_acquire(slots[i] + 8) != metas[i] or load_acquire(
                desc[p, D_INDEX]
            ):
                state = _read_again(
                    desc,
                    p,
                    hashes[i],
                    keys[low + i],
                    target + (low + i) * row_bytes,
                    row_bytes,
                )
                if state < 0:
                    return hits, low + i
                if state == 0:
                    continue
            found[low + i] = True
            hits += 1
            if policy != RANDOM:
                _touch(desc, p, metas[i] & _LOW, policy, tick)
    return hits, stop


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
        row = meta & _LOW
        if row == NO_ROW:
            return (grave, load_acquire(grave + 8)) if grave else (slot, meta)
        if row == TOMBSTONE:
            if grave == 0:
                grave = slot
        elif load_acquire(slot) == key:
            return slot, meta
        position = (position + 1) & mask
    return grave, load_acquire(grave + 8)


@njit(nogil=True, cache=True)
def _write_row(desc, p, state, free, meta, source, row_bytes, policy, tick):
    """Copy a row to a fresh place with its score; return the row number or -1."""
    row = _take_row(state, free)
    if row < 0:
        return row
    copy_row(_locate(desc, p, D_ROWS, row, row_bytes), source, row_bytes)
    if policy != RANDOM:
        score = np.int64(0)
        if policy == OLDEST:
            score = tick
        elif (meta & _LOW) < TOMBSTONE:
            old = _locate(desc, p, D_SCORES, meta & _LOW, np.int64(8))
            score = load_acquire(old)
        store_release(_locate(desc, p, D_SCORES, row, np.int64(8)), score)
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
        old = meta & _LOW
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
        store_release(slot + 8, (meta & ~_LOW) + _VERSION + row)
        if old < TOMBSTONE:
            _give_row(state, free, old)
    return DONE, order.size


@njit(nogil=True, cache=True, inline="always")
def _bury(index, mask, slot, meta, state, free):
    """Remove the key of a slot; a tombstone at the end of a chain becomes empty."""
    _give_row(state, free, meta & _LOW)
    state[S_SIZE] -= 1
    first = index + HEADER_BYTES
    position = (slot - first) // SLOT_BYTES
    following = first + ((position + 1) & mask) * SLOT_BYTES
    if load_acquire(following + 8) & _LOW != NO_ROW:
        store_release(slot + 8, (meta & ~_LOW) + _VERSION + TOMBSTONE)
        return
    store_release(slot + 8, (meta & ~_LOW) + _VERSION + NO_ROW)
    state[S_USED] -= 1
    for _ in range(mask):
        position = (position - 1) & mask
        slot = first + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        if meta & _LOW != TOMBSTONE:
            break
        store_release(slot + 8, (meta & ~_LOW) + _VERSION + NO_ROW)
        state[S_USED] -= 1


@njit(nogil=True, cache=True)
def remove_keys(desc, p, state, free, keys, order):
    """Remove keys of one partition and return how many were there."""
    index = desc[p, D_INDEX]
    mask = desc[p, D_MASK]
    removed = 0
    for j in range(order.size):
        key = keys[order[j]]
        slot, meta = _probe(index, mask, hash_key(key), key)
        if slot != 0:
            _bury(index, mask, slot, meta, state, free)
            removed += 1
    return removed


@njit(nogil=True, cache=True)
def _threshold(desc, p, n_victims):
    """Return the score of the last victim, and how many victims share it."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    scores = np.empty(desc[p, D_MASK] + 1, np.int64)
    n = 0
    for position in range(desc[p, D_MASK] + 1):
        row = load_acquire(first + position * SLOT_BYTES + 8) & _LOW
        if row < TOMBSTONE:
            scores[n] = load_acquire(_locate(desc, p, D_SCORES, row, np.int64(8)))
            n += 1
    ranked = np.partition(scores[:n], n_victims - 1)
    last = ranked[n_victims - 1]
    ties = 0
    for i in range(n_victims):
        if ranked[i] == last:
            ties += 1
    return last, ties


@njit(nogil=True, cache=True)
def evict_rows(desc, p, state, free, n_victims, policy, start):
    """Remove ``n_victims`` keys by policy, scanning slots from ``start``.

    RANDOM takes the keys that come first, which the hash has shuffled. LEAST_USED and
    OLDEST take the smallest scores; LEAST_USED then halves the others, so that old fame
    fades. Returns the number removed.
    """
    index = desc[p, D_INDEX]
    mask = desc[p, D_MASK]
    n_victims = min(n_victims, state[S_SIZE])
    if n_victims <= 0:
        return 0
    last, ties = np.int64(0), np.int64(0)
    if policy != RANDOM:
        last, ties = _threshold(desc, p, n_victims)
    removed = 0
    for k in range(mask + 1):
        slot = index + HEADER_BYTES + ((start + k) & mask) * SLOT_BYTES
        meta = load_acquire(slot + 8)
        row = meta & _LOW
        if row >= TOMBSTONE:
            continue
        if policy == RANDOM:
            if removed == n_victims:
                break
        else:
            address = _locate(desc, p, D_SCORES, row, np.int64(8))
            score = load_acquire(address)
            # Readers raise scores meanwhile: a row that rises above the bar is spared.
            spared = score > last or (score == last and ties == 0)
            if spared or removed == n_victims:
                if policy == LEAST_USED:
                    store_release(address, score >> 1)
                continue
            if score == last:
                ties -= 1
        _bury(index, mask, slot, meta, state, free)
        removed += 1
    return removed


@njit(nogil=True, cache=True)
def rebuild_index(desc, p, state, new_index, new_mask):
    """Copy the keys of a partition to an empty index and drop the tombstones."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    for old_position in range(desc[p, D_MASK] + 1):
        slot = first + old_position * SLOT_BYTES
        row = load_acquire(slot + 8) & _LOW
        if row >= TOMBSTONE:
            continue
        key = load_acquire(slot)
        position = np.int64(hash_key(key) >> np.uint64(20)) & new_mask
        target = new_index + HEADER_BYTES + position * SLOT_BYTES
        while load_acquire(target + 8) & _LOW != NO_ROW:
            position = (position + 1) & new_mask
            target = new_index + HEADER_BYTES + position * SLOT_BYTES
        store_release(target, key)
        store_release(target + 8, row)
    state[S_USED] = state[S_SIZE]


@njit(nogil=True, cache=True)
def list_keys(desc, p, out):
    """Write the keys of a partition to ``out`` int64 (size,); return how many."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    n = 0
    for position in range(desc[p, D_MASK] + 1):
        slot = first + position * SLOT_BYTES
        if load_acquire(slot + 8) & _LOW < TOMBSTONE:
            out[n] = load_acquire(slot)
            n += 1
    return n


@njit(nogil=True, cache=True)
def retire_index(index):
    """Tell readers of an index that it no longer gets changes."""
    store_release(index, 1)
