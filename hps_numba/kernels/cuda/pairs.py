"""Static tables: a key lives in its home set or in its second set.

Since nobody yields there, a table must have a place for every row, and a choice between
two sets gives it one with little room to spare. A key never moves from one set to the
other. Where it is known that a table has one set only, the functions here do what is
done with the home set alone.

An insert holds both sets of its key while it looks for the key and at its stamp, and
goes on to hold the set where the key goes. An update or an eviction holds one set after
the other, and leaves its stamp while it holds the home set, the first. So it comes
before an insert, which then sees the stamp, or finds in one of the two sets what the
insert wrote. A clear raises the floor before it holds either set. Of two inserts of one
key the later finds the key.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.device import (
    BUSY,
    first_bit,
    lock_set,
    place_of,
    place_of_set,
    probe,
    unlock_set,
    way_in_locked,
)
from hps_numba.kernels.cuda.hashing import digest_of, second_set_of
from hps_numba.kernels.cuda.layout import N_SETS, WAYS, Outcome, Policy
from hps_numba.kernels.cuda.ptx import FULL_WARP, load_const_u64, opaque

u32, u64 = np.uint32, np.uint64

# A key goes home while its home set has so many empty ways, then to the emptier set:
# see docs/decisions/0009-two-sets-for-static-tables.md.
HOME_ROOM = 8

_REPLACED, _INSERTED = u32(Outcome.REPLACED), u32(Outcome.INSERTED)
_FULL = u32(Outcome.FULL)


@cuda.jit(device=True, forceinline=True)
def second_place_of(table, hashed):
    """Return where else a key may live; see ``place_of``."""
    n_sets = load_const_u64(table + u64(N_SETS))
    return place_of_set(table, second_set_of(hashed, n_sets))


@cache
def second_place(policy: Policy) -> Any:
    """Return a device function: ``second_place_of``, or zeros where there is none."""

    @cuda.jit(device=True, forceinline=True)
    def nowhere(table, hashed):
        return u64(0), u64(0), u64(0)

    return second_place_of if policy.two_sets else nowhere


@cache
def finder(policy: Policy) -> Any:
    """Return a device function: look for a key where it may live, as one thread.

    It returns the metadata and the first slot of the set that was looked into last, the
    key's way or 28, and the set's number, as ``probe`` does.
    """

    @cuda.jit(device=True, forceinline=True)
    def find_in_one(table, key, hashed):
        meta, slots, slot = place_of(table, hashed)
        way, seq = probe(meta, slots, key, digest_of(hashed))
        return meta, slot, way, seq

    @cuda.jit(device=True, forceinline=True)
    def find_in_two(table, key, hashed):
        meta, slots, slot = place_of(table, hashed)
        way, seq = u32(WAYS), u32(0)
        for look in range(opaque(u32(2))):
            if look == u32(1):
                meta, slots, slot = second_place_of(table, hashed)
            way, seq = probe(meta, slots, key, digest_of(hashed))
            # A set that is held says nothing; then the key is looked for anew.
            if way < u32(WAYS) or (seq & u32(1)) != u32(0):
                break
        return meta, slot, way, seq

    return find_in_two if policy.two_sets else find_in_one


@cuda.jit(device=True, forceinline=True)
def lock_pair(meta, rest):
    """Hold two sets, as a whole warp; ``rest`` is the place of the other or the same.

    Whoever holds one set and waits for another waits for one of a higher number, so
    that no warps wait for each other in a circle.

    Returns
    -------
    seq, rest_seq
        The even numbers before, or BUSY twice: then neither is held.
    """
    low, high = min(meta, rest[0]), max(meta, rest[0])
    first = lock_set(low)
    last = first
    if high != low and (first & u32(1)) == u32(0):
        last = lock_set(high)
        if (last & u32(1)) != u32(0):
            unlock_set(low, first)
            first = u32(BUSY)
    if low == meta:
        return first, last
    return last, first


@cuda.jit(device=True, forceinline=True)
def keep_of_pair(meta, slots, slot, seq, rest, rest_seq, moved):
    """Let the set go where the key does not go; return the other's place and number."""
    if meta != rest[0]:
        if moved:
            unlock_set(meta, seq)
            meta, slots, slot = rest
            seq = rest_seq
        else:
            unlock_set(rest[0], rest_seq)
    return meta, slots, slot, seq


@cache
def lockers(policy: Policy) -> tuple[Any, Any]:
    """Return device functions: hold a key's sets; keep the one where the key goes."""

    @cuda.jit(device=True, forceinline=True)
    def lock_one(meta, rest):
        return lock_set(meta), u32(0)

    @cuda.jit(device=True, forceinline=True)
    def keep_one(meta, slots, slot, seq, rest, rest_seq, moved):
        return meta, slots, slot, seq

    return (lock_pair, keep_of_pair) if policy.two_sets else (lock_one, keep_one)


@cuda.jit(device=True, forceinline=True)
def choose_of_two(table, meta, slots, rest, key, hashed, seq, flags, lane):
    """Return (way, outcome, whether it is a way of the second set), as ``choose``.

    Both sets are held. ``way`` is 28 where the key is in neither and both are full.
    """
    digest = digest_of(hashed)
    way, mine = way_in_locked(meta, slots, key, digest, lane)
    outcome = _REPLACED
    moved = way == u32(WAYS)
    if moved:
        way, others = way_in_locked(rest[0], rest[1], key, digest, lane)
        moved = way < u32(WAYS)
        if not moved:
            empty = u32(cuda.ballot_sync(FULL_WARP, mine == u32(0)))
            spare = u32(cuda.ballot_sync(FULL_WARP, others == u32(0)))
            room = u32(cuda.popc(empty))
            moved = room < u32(HOME_ROOM) and u32(cuda.popc(spare)) > room
            if moved:
                empty = spare
            outcome = _FULL
            if empty != u32(0):
                way, outcome = first_bit(empty), _INSERTED
    return way, outcome, moved
