"""Bugs of the protocol between writers and readers, and the check that catches each.

Orderings of memory accesses that are left out are in ``weak_mutants``.
"""

from __future__ import annotations

from tests.kernels.cuda.mutants import Mutant

_LOCKS = [
    Mutant(
        "no lock",
        "device",
        """swap_acquire_u32(
                meta, now, u32(now | u32(1))
            ) == now""",
        "swap_acquire_u32(meta, now, now) == now",
        "duplicates",
    ),
    Mutant(
        "a lock that is taken without looking whether it was",
        "device",
        """swap_acquire_u32(
                meta, now, u32(now | u32(1))
            ) == now""",
        """swap_acquire_u32(
                meta, now, u32(now | u32(1))
            ) >= u32(0)""",
        "duplicates",
    ),
    Mutant(
        "a writer enters a set that is held",
        "device",
        "if (now & u32(1)) == u32(0) and swap",
        "if swap",
        "duplicates",
    ),
    Mutant(
        "an insert never lets its set go",
        "insert",
        "unlock_set(meta, seq)",
        "cuda.syncwarp(FULL_WARP)",
        "duplicates",
    ),
    Mutant(
        "an insert lets its set go before it has written the row",
        "insert",
        "                    write(values + i * u64(row_bytes), target, lane)\n",
        "                    unlock_set(meta, u32(seq + u32(2)))\n"
        "                    write(values + i * u64(row_bytes), target, lane)\n",
        "readers_beside_writers",
    ),
    Mutant(
        "an update lets its set go before it has written the row",
        "update",
        "                write(source, target, lane)\n",
        "                unlock_set(meta, u32(seq + u32(2)))\n"
        "                write(source, target, lane)\n",
        "readers_beside_updates_that_are_held_up",
    ),
    Mutant(
        "the lanes of a writer are not waited for",
        "device",
        """    cuda.syncwarp(FULL_WARP)
    if cuda.laneid == 0:
        store_release_u32(meta, seq)""",
        """    if cuda.laneid == 0:
        store_release_u32(meta, seq)""",
        "readers_beside_updates_that_are_held_up",
    ),
    Mutant(
        "a set's number goes up by one",
        "update",
        "seq = u32(seq + u32(2))",
        "seq = u32(seq + u32(1))",
        "readers_beside_updates",
    ),
    Mutant(
        "an update restores its set's number",
        "update",
        "seq = u32(seq + u32(2))",
        "seq = u32(seq + u32(0))",
        "readers_beside_updates",
    ),
    Mutant(
        "an insert restores its set's number",
        "insert",
        "seq = u32(seq + u32(2))",
        "seq = u32(seq + u32(0))",
        "operations",
    ),
    Mutant(
        "an eviction restores its set's number",
        "evict",
        "seq = u32(seq + u32(2))",
        "seq = u32(seq + u32(0))",
        "operations",
    ),
]

_READERS = [
    Mutant(
        "a query does not look at the number again",
        "query",
        "if found and unchanged(meta, seq):",
        "if found:",
        "readers_beside_updates",
    ),
    Mutant(
        "a query looks at the number again before it copies",
        "query",
        """            if wanted != u32(0):
                gather(base, number, target, wanted, lane)
            end_reads()
            if found and unchanged(meta, seq):""",
        """            same = found and unchanged(meta, seq)
            if wanted != u32(0):
                gather(base, number, target, wanted, lane)
            end_reads()
            if same:""",
        "readers_beside_updates",
    ),
    Mutant(
        "a query does not wait for the lanes that copy its row",
        "device",
        "    fence()\n    cuda.syncwarp(FULL_WARP)\n\n\n@cuda.jit(device=True, "
        "forceinline=True)\ndef unchanged",
        "    fence()\n\n\n@cuda.jit(device=True, forceinline=True)\ndef unchanged",
        "readers_beside_updates_that_are_held_up",
    ),
    Mutant(
        "a query reads sets that are held",
        "device",
        "    if (seq & u32(1)) == u32(0):\n        ways = matching",
        "    if seq != u32(0xFFFFFFFF):\n        ways = matching",
        "readers_beside_updates_that_are_held_up",
    ),
    Mutant(
        "a query takes a miss in a held set for final, and fills a torn row",
        "query",
        "fill = (flags & u32(FILL)) != u32(0)\n        live",
        "fill = False\n        live",
        "operations",
    ),
    Mutant(
        "a pooled query does not look at the number again",
        "pooled",
        "spoilt = hit and not unchanged(meta, seq)",
        "spoilt = False",
        "pooled_beside_updates",
    ),
    Mutant(
        "a spoilt bag is not begun again",
        "pooled",
        "lost = cuda.ballot_sync(FULL_WARP, spoilt) != 0",
        "lost = False",
        "pooled_beside_updates",
    ),
    Mutant(
        "a bag begun again trusts notes of another query",
        "pooled",
        "chunk < noted_end,",
        "attempt > 0,",
        "pooled_beside_updates",
    ),
    Mutant(
        "a dump does not look at the number again",
        "dump",
        "still = load_u32(meta) == seq and seq == common",
        "still = seq == common",
        "protocol_of_a_dump",
    ),
    Mutant(
        "a dump's loads may come after its second look",
        "dump",
        "    fence()\n    common",
        "    common",
        "protocol_of_a_dump",
    ),
    Mutant(
        "a dump reads sets that are held",
        "dump",
        "seq == common and (seq & u32(1)) == u32(0)",
        "seq == common",
        "dumps",
    ),
]

_STAMPS = [
    Mutant(
        "an insert ignores the stamps",
        "insert",
        "later = max(load_u64(stamps + stamp * u64(8)), load_u64(table + u64(FLOOR)))",
        "later = load_u64(table + u64(FLOOR))",
        "backfills",
    ),
    Mutant(
        "an insert ignores the floor",
        "insert",
        "later = max(load_u64(stamps + stamp * u64(8)), load_u64(table + u64(FLOOR)))",
        "later = load_u64(stamps + stamp * u64(8))",
        "backfills",
    ),
    Mutant(
        "an insert looks at the stamp before it has the set",
        "insert",
        """            seq, rest_seq = lock(meta, rest)
            if (seq & u32(1)) == u32(0):
                way, outcome, moved = u32(WAYS), _STALE, False
                if not is_stale(table, hashed, epoch):""",
        """            stale = is_stale(table, hashed, epoch)
            seq, rest_seq = lock(meta, rest)
            if (seq & u32(1)) == u32(0):
                way, outcome, moved = u32(WAYS), _STALE, False
                if not stale:""",
        "backfills",
    ),
    Mutant(
        "the lanes of an insert do not agree on a stamp",
        "insert",
        "u32(cuda.ballot_sync(FULL_WARP, later > epoch)) != u32(0)",
        "later > epoch",
        "shared_stamps",
    ),
    Mutant(
        "an eviction stamps nothing",
        "evict",
        """        if stamps and lane == u32(0):
            stamp_key(table, hashed, epoch)
""",
        "",
        "backfills",
    ),
    Mutant(
        "an update stamps keys that are there only",
        "update",
        """            if stamps and lane == u32(0):
                stamp_key(table, hashed, epoch)
            way, _ = way_in_locked(meta, slots, key, digest_of(hashed), lane)
            if way < u32(WAYS):
""",
        """            way, _ = way_in_locked(meta, slots, key, digest_of(hashed), lane)
            if way < u32(WAYS):
                if stamps and lane == u32(0):
                    stamp_key(table, hashed, epoch)
""",
        "backfills",
    ),
    Mutant(
        "a clear raises the floor after it has emptied its set",
        "evict",
        """        if lane == u32(0):
            # The release of the set shows it to inserts that take the set afterwards.
            max_u64(table + u64(FLOOR), epoch)
        meta = load_const_u64(table + u64(META)) + n_set * u64(SET_BYTES)
        seq = lock_set(meta)
""",
        """        meta = load_const_u64(table + u64(META)) + n_set * u64(SET_BYTES)
        seq = lock_set(meta)
        if lane == u32(0):
            cuda.nanosleep(u32(1))
""",
        "backfills",
    ),
]

# Not planted, since it changes nothing that can be told apart: the shuffle between a
# dump's reads and its second look holds every lane until all have read, so that a lane
# whose first look was older than another's sees the difference by itself. Comparing the
# lanes' first looks says so without leaning on a shuffle.
EQUIVALENT = (
    Mutant(
        "a dump's lanes may look at two instants",
        "dump",
        "load_u32(meta) == seq and seq == common and",
        "load_u32(meta) == seq and",
        "dumps",
    ),
)

RACE_MUTANTS = (*_LOCKS, *_READERS, *_STAMPS)
