"""A hash table in host memory: many lock-free readers beside one writer.

Layout. A table has partitions. A partition has an index of ``(key, meta)`` slots of
16 bytes, probed linearly, and rows in segments of doubling size. ``meta`` is one 64-bit
word: the row number below, a version above that changes whenever the slot does.

Invariants
----------
- A row is written before a slot points to it and is never changed while one does: an
  update takes a fresh row and moves the slot to it with one store.
- A slot keeps its place for the life of the index; a removed key leaves a tombstone.
- A slot's version is never used twice; so a reader that finds the same meta after
  copying the row has copied a row that nobody wrote to meanwhile.
- An index that was replaced is marked retired before any row changes again.

So a reader takes no lock: it copies a row, then looks whether the slot is unchanged and
the index not retired, and tries again if not. Writers of a table exclude one another.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
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

HEADER_BYTES = 64  # of an index; its first word is 1 once the index is retired
SLOT_BYTES = 16
SEGMENT_SHIFT = 6  # the first segment has 64 rows
NO_ROW = np.int64(0xFFFFFFFF)  # an empty slot
TOMBSTONE = np.int64(0xFFFFFFFE)
MAX_ROWS = 0xFFFFFFF0
LOW = np.int64(0xFFFFFFFF)  # the row number in a meta word

# How scores are kept; equal to the position in OverflowPolicy.
RANDOM = 0
LEAST_USED = 1
OLDEST = 2

_CHUNK = 512  # keys that are probed before their rows are copied
_SLOTS_AHEAD = 24  # how far ahead slots and rows are asked for
_ROWS_AHEAD = 8
_ATTEMPTS = 64


@njit(nogil=True, cache=True, inline="always")
def locate(desc, p, table, row, stride):
    """Return the address of a row (or score) in its segment, 0 if it has none."""
    block = (row >> SEGMENT_SHIFT) + 1
    segment = 63 - count_leading_zeros(block)
    first = ((np.int64(1) << segment) - 1) << SEGMENT_SHIFT
    base = desc[p, table + segment]
    return base + (row - first) * stride if base != 0 else np.int64(0)


@njit(nogil=True, cache=True, inline="always")
def probe(index, mask, h, key):
    """Return the slot that holds ``key`` and its meta; slot 0 if there is none."""
    position = np.int64(h >> np.uint64(20)) & mask
    for _ in range(mask + 1):
        slot = index + HEADER_BYTES + position * SLOT_BYTES
        meta = load_acquire(slot + 8)
        row = meta & LOW
        if row == NO_ROW:
            break
        if row != TOMBSTONE and load_acquire(slot) == key:
            return slot, meta
        position = (position + 1) & mask
    return np.int64(0), np.int64(0)


@njit(nogil=True, cache=True, inline="always")
def _touch(desc, p, row, policy, tick):
    """Record the use of a row. Lost counts of concurrent readers are accepted."""
    score = locate(desc, p, D_SCORES, row, np.int64(8))
    if score != 0:
        if policy == OLDEST:
            if load_acquire(score) < tick:
                store_release(score, tick)
        else:
            store_release(score, load_acquire(score) + 1)


@njit(nogil=True, cache=True)
def _read_again(desc, p, h, key, target, row_bytes):
    """Read one row that changed under the reader. 1 found, 0 absent, -1 stale."""
    index = desc[p, D_INDEX]
    for _ in range(_ATTEMPTS):
        slot, meta = probe(index, desc[p, D_MASK], h, key)
        if slot == 0:
            return -1 if load_acquire(index) else 0
        source = locate(desc, p, D_ROWS, meta & LOW, row_bytes)
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
            slot, meta = probe(
                desc[p, D_INDEX], desc[p, D_MASK], hashes[i], keys[low + i]
            )
            if slot == 0:
                # A retired index does not get new keys, so its silence means nothing.
                sources[i] = 0 if load_acquire(desc[p, D_INDEX]) else -2
                continue
            source = locate(desc, p, D_ROWS, meta & LOW, row_bytes)
            slots[i] = slot
            metas[i] = meta
            sources[i] = source
            if policy != RANDOM:
                prefetch(locate(desc, p, D_SCORES, meta & LOW, np.int64(8)))
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
            if load_acquire(slots[i] + 8) != metas[i] or load_acquire(desc[p, D_INDEX]):
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
                _touch(desc, p, metas[i] & LOW, policy, tick)
    return hits, stop


@njit(nogil=True, cache=True)
def list_keys(desc, p, out):
    """Write the keys of a partition to ``out`` int64 (size,); return how many."""
    first = desc[p, D_INDEX] + HEADER_BYTES
    n = 0
    for position in range(desc[p, D_MASK] + 1):
        slot = first + position * SLOT_BYTES
        if load_acquire(slot + 8) & LOW < TOMBSTONE:
            out[n] = load_acquire(slot)
            n += 1
    return n
