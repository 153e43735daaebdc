"""Insert: rows that were fetched from below, where a set has room or someone yields."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.device import (
    first_bit,
    place_of,
    unlock_set,
    way_in_locked,
)
from hps_numba.kernels.cuda.hashing import (
    digest_of,
    door_mark_of,
    door_of,
    hash_key,
    stamp_of,
)
from hps_numba.kernels.cuda.layout import (
    DIGESTS,
    DOOR,
    DOOR_MASK,
    EVICTED,
    FLOOR,
    INSERTED,
    KEY_BYTES,
    REFUSED,
    ROWS,
    SCORES,
    SIZE,
    STAMP_MASK,
    STAMPS,
    TABLE_BYTES,
    WAYS,
    Outcome,
    Policy,
    RowLayout,
)
from hps_numba.kernels.cuda.pairs import choose_of_two, lockers, second_place
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u64,
    load_const_u64,
    load_u8,
    load_u64,
    shuffle_u32,
    store_u8,
    store_u64,
)
from hps_numba.kernels.cuda.rows import write_row
from hps_numba.kernels.cuda.scores import scorer, victim_chooser

u32, u64 = np.uint32, np.uint64

# Flags: a full set takes a key at its second sight only, or takes none.
ADMIT, FREE_ONLY = 1, 2
BLOCK = 256
MAX_REGISTERS = 64  # of two sets at once; fewer spill on compute capability 7.5 and 8.0

_REPLACED, _INSERTED = u32(Outcome.REPLACED), u32(Outcome.INSERTED)
_EVICTED, _STALE = u32(Outcome.EVICTED), u32(Outcome.STALE)
_TURNED_AWAY, _FULL = u32(Outcome.TURNED_AWAY), u32(Outcome.FULL)
_BUSY, _SKIPPED = u32(Outcome.BUSY), u32(Outcome.SKIPPED)


@cuda.jit(device=True, forceinline=True)
def is_stale(table, hashed, epoch):
    """Return whether a key was updated after ``epoch``, or its table cleared.

    The set is held, of a static table both: an update of the key comes either before,
    and its stamp is seen, or after, and replaces the row. The floor, and a stamp that
    keys of other sets share, may change between two lanes' loads, so the warp votes.
    """
    stamp = stamp_of(hashed, load_const_u64(table + u64(STAMP_MASK)))
    stamps = load_const_u64(table + u64(STAMPS))
    later = max(load_u64(stamps + stamp * u64(8)), load_u64(table + u64(FLOOR)))
    return u32(cuda.ballot_sync(FULL_WARP, later > epoch)) != u32(0)


@cuda.jit(device=True, forceinline=True)
def seen_before(table, hashed, lane):
    """Return whether the doorkeeper remembers a key; it does from now on."""
    known = u32(0)
    if lane == u32(0):
        entry = load_const_u64(table + u64(DOOR))
        entry += door_of(hashed, load_const_u64(table + u64(DOOR_MASK)))
        mark = door_mark_of(hashed)
        if load_u8(entry) == mark:
            known = u32(1)
        else:
            store_u8(entry, mark)
    return shuffle_u32(known, u32(0)) != u32(0)


@cache
def way_chooser(policy: Policy) -> Any:
    """Return a device function: where a key goes in the sets that this warp holds."""
    if policy.two_sets:
        return choose_of_two
    choose_victim = victim_chooser(policy)

    @cuda.jit(device=True, forceinline=True)
    def choose(table, meta, slots, rest, key, hashed, seq, flags, lane):
        """Return (way, outcome, whether it is a way of the second set).

        The way is 28 where the key does not go in.
        """
        way, mine = way_in_locked(meta, slots, key, digest_of(hashed), lane)
        outcome = _REPLACED
        if way == u32(WAYS):
            empty = u32(cuda.ballot_sync(FULL_WARP, mine == u32(0)))
            if empty != u32(0):
                way, outcome = first_bit(empty), _INSERTED
            elif (flags & u32(FREE_ONLY)) != u32(0):
                outcome = _FULL
            elif (flags & u32(ADMIT)) != u32(0) and not seen_before(
                table, hashed, lane
            ):
                outcome = _TURNED_AWAY
            else:
                way, outcome = choose_victim(table, meta, seq, lane), _EVICTED
        return way, outcome, False

    return choose


def insert_kernel(rows: RowLayout, policy: Policy) -> KernelSpec:
    """Return the insert of a cache with such rows.

    Launch   a warp per key, 256 threads, no shared memory
    Reads    keys int64 (n,), rows of the stored type (n, dim) without gaps; selected
             uint8 (n,) or address 0: only keys with a 1 are inserted
    Writes   sets, table totals; outcomes uint8 (n,), evicted int64 (n,) where the
             outcome is EVICTED; either address may be 0
    Races    safe beside all other kernels: a set is held while it changes. Keys are
             unique; of a key that is there twice, one row stays
    Cost     a key reads 64 bytes of metadata and writes 32, reads and writes its row;
             two atomic operations on its set; in a static table as many on a second
             set, and another 64 bytes of metadata
    Oracle   tests/kernels/cuda/oracle.py: OracleTable.insert

    ``epoch`` is the table's update epoch from before the rows were fetched: a key that
    was updated later keeps what it has.
    """
    # How rows are given out is all the same here; no two kernels have one name.
    return _insert_kernel(RowLayout(rows.dim, rows.stored, rows.stored), policy)


@cache
def _insert_kernel(rows: RowLayout, policy: Policy) -> KernelSpec:
    choose = way_chooser(policy)
    other_place = second_place(policy)
    lock, keep = lockers(policy)
    score_of = scorer(policy)
    write = write_row(rows)
    stride, row_bytes = rows.stride_bytes, rows.row_bytes

    def insert(
        tables, n_table, keys, values, n, epoch, selected, outcomes, evicted, flags
    ):
        lane = u32(cuda.laneid)
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        i = thread >> u64(5)
        if i >= n:
            return
        table = tables + u64(n_table) * u64(TABLE_BYTES)
        outcome = _SKIPPED
        if selected == u64(0) or load_u8(selected + i) != u32(0):
            key = load_const_u64(keys + i * u64(KEY_BYTES))
            hashed = hash_key(key)
            meta, slots, slot = place_of(table, hashed)
            rest = other_place(table, hashed)
            outcome = _BUSY
            seq, rest_seq = lock(meta, rest)
            if (seq & u32(1)) == u32(0):
                way, outcome, moved = u32(WAYS), _STALE, False
                if not is_stale(table, hashed, epoch):
                    way, outcome, moved = choose(
                        table, meta, slots, rest, key, hashed, seq, flags, lane
                    )
                meta, slots, slot, seq = keep(
                    meta, slots, slot, seq, rest, rest_seq, moved
                )
                if way < u32(WAYS):
                    target = load_const_u64(table + u64(ROWS))
                    target += (slot + u64(way)) * u64(stride)
                    write(values + i * u64(row_bytes), target, lane)
                    if lane == u32(0):
                        entry = slots + u64(way) * u64(KEY_BYTES)
                        if outcome == _EVICTED and evicted != u64(0):
                            store_u64(evicted + i * u64(KEY_BYTES), load_u64(entry))
                        store_u64(entry, key)
                        store_u8(meta + u64(DIGESTS) + u64(way), digest_of(hashed))
                        if outcome != _REPLACED:
                            score_of(table, meta + u64(SCORES) + u64(way))
                    seq = u32(seq + u32(2))
                unlock_set(meta, seq)
        if lane == u32(0):
            count_outcome(table, outcome)
            if outcomes != u64(0):
                store_u8(outcomes + i, outcome)

    name = f"insert_{rows.stored}_{rows.dim}_{policy.value}"
    most = MAX_REGISTERS if policy.two_sets else None
    return KernelSpec(name, insert, "UuUUUUUUUu", block=BLOCK, max_registers=most)


@cuda.jit(device=True, forceinline=True)
def count_outcome(table, outcome):
    """Add one key to its table's totals."""
    if outcome == _INSERTED:
        add_u64(table + u64(SIZE), u64(1))
    if outcome in (_INSERTED, _EVICTED):
        add_u64(table + u64(INSERTED), u64(1))
    if outcome == _EVICTED:
        add_u64(table + u64(EVICTED), u64(1))
    if outcome == _STALE:
        add_u64(table + u64(REFUSED), u64(1))
