"""Bugs of static tables, whose keys have two sets, and the check that catches each."""

from __future__ import annotations

from tests.kernels.cuda.mutants import Mutant

_SETS = (
    Mutant(
        "a query does not look into the second set",
        "pairs",
        "for look in range(opaque(u32(2))):",
        "for look in range(opaque(u32(1))):",
        "operations_of_pairs",
    ),
    Mutant(
        "a query looks into the home set twice",
        "pairs",
        "            if look == u32(1):\n",
        "            if look == u32(2):\n",
        "operations_of_pairs",
    ),
    Mutant(
        "the second set may be the home set",
        "hashing",
        "+ step + np.uint64(1)",
        "+ step",
        "operations_of_pairs",
    ),
    Mutant(
        "the second set is behind the last one",
        "hashing",
        "    if n_set >= n_sets:\n",
        "    if n_set > n_sets:\n",
        "operations_of_pairs",
    ),
    Mutant(
        "an update ignores the second set",
        "update",
        "if two_sets and outcome == _ABSENT:",
        "if two_sets and outcome == _BUSY:",
        "operations_of_pairs",
    ),
    Mutant(
        "an eviction ignores the second set",
        "evict",
        "if two_sets and outcome == _ABSENT:",
        "if two_sets and outcome == _BUSY:",
        "operations_of_pairs",
    ),
    Mutant(
        "an insert does not look for the key in the second set",
        "pairs",
        "way, others = way_in_locked(",
        "_, others = way_in_locked(",
        "operations_of_pairs",
    ),
    Mutant(
        "a key goes to the fuller set",
        "pairs",
        "u32(cuda.popc(spare)) > room",
        "u32(cuda.popc(spare)) < room",
        "operations_of_pairs",
    ),
    Mutant(
        "of two sets with as much room a key takes the second",
        "pairs",
        "u32(cuda.popc(spare)) > room",
        "u32(cuda.popc(spare)) >= room",
        "operations_of_pairs",
    ),
    Mutant(
        "a key leaves home for an emptier set while there is room",
        "pairs",
        "moved = room < u32(HOME_ROOM) and",
        "moved = room <= u32(HOME_ROOM) and",
        "operations_of_pairs",
    ),
    Mutant(
        "a key goes to a way that is free in its other set",
        "pairs",
        "            if moved:\n                empty = spare\n",
        "",
        "operations_of_pairs",
    ),
)

_LOCKS = (
    Mutant(
        "an insert holds its home set only",
        "pairs",
        "    low, high = min(meta, rest[0]), max(meta, rest[0])\n",
        "    low, high = meta, meta\n",
        "duplicates_of_pairs",
    ),
    Mutant(
        "an insert holds the sets in the order of its key",
        "pairs",
        "    low, high = min(meta, rest[0]), max(meta, rest[0])\n",
        "    low, high = meta, rest[0]\n",
        "crowds_of_pairs",
    ),
    Mutant(
        "an insert takes the numbers of its two sets for each other's",
        "pairs",
        "    if low == meta:\n",
        "    if low != meta:\n",
        "operations_of_pairs",
    ),
    Mutant(
        "an insert that does not get the second set keeps the first",
        "pairs",
        "            unlock_set(low, first)\n",
        "",
        "held_pairs",
    ),
    Mutant(
        "an insert that does not get the second set goes on",
        "pairs",
        "            first = u32(BUSY)\n",
        "            last = first\n",
        "held_pairs",
    ),
    Mutant(
        "an insert lets the set go where the key goes",
        "pairs",
        "        if moved:\n            unlock_set(meta, seq)\n",
        "        if not moved:\n            unlock_set(meta, seq)\n",
        "operations_of_pairs",
    ),
    Mutant(
        "an insert never lets the other set go",
        "pairs",
        "            unlock_set(rest[0], rest_seq)\n",
        "            seq = u32(seq + u32(0))\n",
        "operations_of_pairs",
    ),
    Mutant(
        "an insert lets the other set go before it has looked for the key",
        "insert",
        "                way, outcome, moved = u32(WAYS), _STALE, False\n",
        "                unlock_set(rest[0], rest_seq)\n"
        "                way, outcome, moved = u32(WAYS), _STALE, False\n",
        "duplicates_of_pairs",
    ),
)

_STAMPED_BEFORE = """            first = lock_set(min(meta, rest[0]))
            stale = is_stale(table, hashed, epoch)
            last = lock_set(max(meta, rest[0]))
            seq, rest_seq = first, last
            if rest[0] < meta:
                seq, rest_seq = last, first
"""
_STAMPS = (
    Mutant(
        "an insert looks at the stamp when it has one of the sets",
        "insert",
        "            seq, rest_seq = lock(meta, rest)\n",
        _STAMPED_BEFORE,
        "backfills_of_pairs",
        also=(
            ("if not is_stale(table, hashed, epoch):", "if not stale:"),
            ("    first_bit,\n", "    first_bit,\n    lock_set,\n"),
        ),
    ),
    Mutant(
        "an update leaves its stamp in the second set",
        "update",
        "hashed, epoch, True, source, lane",
        "hashed, epoch, False, source, lane",
        "backfills_of_pairs",
        also=(
            (
                "    outcome = replace(table, place, key, hashed, epoch, False, source,"
                " lane)\n        if lane",
                "    outcome = replace(table, place, key, hashed, epoch, True, source,"
                " lane)\n        if lane",
            ),
        ),
    ),
    Mutant(
        "an eviction leaves its stamp in the second set",
        "evict",
        "outcome = remove(table, place, key, hashed, epoch, True, lane)",
        "outcome = remove(table, place, key, hashed, epoch, lane < u32(0), lane)",
        "backfills_of_pairs",
        also=(
            (
                "outcome = remove(table, place, key, hashed, epoch, False, lane)",
                "outcome = remove(table, place, key, hashed, epoch, True, lane)",
            ),
        ),
    ),
    Mutant(
        "an update asks the second set before the home set",
        "update",
        "        place = place_of(table, hashed)\n",
        "        place = second_place_of(table, hashed)\n",
        "backfills_of_pairs",
        also=(
            (
                "            place = second_place_of(table, hashed)\n            out",
                "            place = place_of(table, hashed)\n            out",
            ),
            (
                "        place = second_place_of(table, hashed)\n        outcome = "
                "replace(table, place, key, hashed, epoch, True,",
                "        place = second_place_of(table, hashed)\n        outcome = "
                "replace(table, place, key, hashed, epoch, False,",
            ),
            (
                "            place = place_of(table, hashed)\n            outcome = "
                "replace(table, place, key, hashed, epoch, False,",
                "            place = place_of(table, hashed)\n            outcome = "
                "replace(table, place, key, hashed, epoch, True,",
            ),
        ),
    ),
)

STATIC_MUTANTS = (*_SETS, *_LOCKS, *_STAMPS)
