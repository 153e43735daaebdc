"""Bugs that launches one after the other show, and the check that catches each."""

from __future__ import annotations

from tests.kernels.cuda.mutants import Mutant

_KEYS = (
    Mutant(
        "a digest may be 0",
        "hashing",
        "    return np.uint32(np.uint32(1) + (np.uint32(low * np.uint32(255)) >> "
        "np.uint32(8)))\n\n\n@cuda.jit(device=True, forceinline=True)\ndef stamp_of",
        "    return low\n\n\n@cuda.jit(device=True, forceinline=True)\ndef stamp_of",
        "operations",
    ),
    Mutant(
        "an insert in place of another key leaves its digest",
        "insert",
        "                        store_u8(meta + u64(DIGESTS) + u64(way), "
        "digest_of(hashed))\n                        if outcome != _REPLACED:\n",
        "                        if outcome == _INSERTED:\n"
        "                            store_u8(meta + u64(DIGESTS) + u64(way), "
        "digest_of(hashed))\n                        if outcome != _REPLACED:\n",
        "operations",
    ),
    Mutant(
        "an insert writes the digest of another way",
        "insert",
        "store_u8(meta + u64(DIGESTS) + u64(way), digest_of(hashed))",
        "store_u8(meta + u64(DIGESTS) + u64(way ^ u32(1)), digest_of(hashed))",
        "operations",
    ),
    Mutant(
        "a query takes a digest for the key",
        "device",
        "if load_u64(keys + u64(candidate) * u64(KEY_BYTES)) == key:",
        "if load_u64(keys + u64(candidate) * u64(KEY_BYTES)) | u64(1) != u64(0):",
        "operations",
    ),
    Mutant(
        "a writer takes a digest for the key",
        "device",
        "same = load_u64(keys + u64(lane) * u64(KEY_BYTES)) == key",
        "same = True",
        "operations",
    ),
    Mutant(
        "-1 is nobody's key",
        "device",
        "if load_u64(keys + u64(candidate) * u64(KEY_BYTES)) == key:",
        "if (\n            load_u64(keys + u64(candidate) * u64(KEY_BYTES)) == key\n"
        "            and key != u64(0xFFFFFFFFFFFFFFFF)\n        ):",
        "edges",
    ),
    Mutant(
        "the largest key is nobody's",
        "device",
        "        if mine == digest:\n",
        "        if mine == digest and key != u64(0x7FFFFFFFFFFFFFFF):\n",
        "edges",
    ),
    Mutant(
        "a vote without four lanes",
        "device",
        "ways = u32(cuda.ballot_sync(FULL_WARP, same))",
        "ways = u32(cuda.ballot_sync(0x0FFFFFFF, same))",
        "operations",
    ),
    Mutant(
        "a writer knows 27 ways",
        "device",
        "    if lane < u32(WAYS):\n        mine = load_u8",
        "    if lane < u32(27):\n        mine = load_u8",
        "operations",
    ),
    Mutant(
        "a writer knows 32 ways",
        "device",
        "    if lane < u32(WAYS):\n        mine = load_u8",
        "    if lane < u32(32):\n        mine = load_u8",
        "operations_of_halves",
    ),
    Mutant(
        "a query does not look into the last word of digests",
        "device",
        "return u32(ways | u32(equal_bytes(high[3], pattern) << u32(24)))",
        "return ways",
        "operations",
    ),
    Mutant(
        "an update of a key that is not there takes way 0",
        "update",
        "            if way < u32(WAYS):\n                outcome = _REPLACED",
        "            way = u32(way % u32(WAYS))\n"
        "            if way < u32(WAYS):\n                outcome = _REPLACED",
        "operations",
    ),
    Mutant(
        "an eviction leaves the number of keys",
        "evict",
        "add_u64(table + u64(SIZE), u64(-1))",
        "add_u64(table + u64(SIZE), u64(0))",
        "operations",
    ),
    Mutant(
        "an insert reports the new key as the one that made room",
        "insert",
        "                        if outcome == _EVICTED and evicted != u64(0):\n"
        "                            store_u64(evicted + i * u64(KEY_BYTES), "
        "load_u64(entry))\n                        store_u64(entry, key)\n",
        "                        store_u64(entry, key)\n"
        "                        if outcome == _EVICTED and evicted != u64(0):\n"
        "                            store_u64(evicted + i * u64(KEY_BYTES), "
        "load_u64(entry))\n",
        "operations",
    ),
    Mutant(
        "the doorkeeper forgets whom it turned away",
        "insert",
        "            store_u8(entry, mark)\n",
        "            known = u32(0)\n",
        "doorkeeper",
    ),
)

_SCORES = (
    Mutant(
        "the choice among equals turns the other way",
        "scores",
        "order = u32(lane + u32(WAYS) - turn)",
        "order = u32(lane + turn)",
        "operations",
    ),
    Mutant(
        "the newest key makes room",
        "scores",
        "worth = u32(u32(255) - age)",
        "worth = age",
        "operations",
    ),
    Mutant(
        "the choice leaves out the last way",
        "scores",
        "        if lane < u32(WAYS):\n            score",
        "        if lane < u32(WAYS - 1):\n            score",
        "last_way",
    ),
    Mutant(
        "counts of uses are never halved",
        "scores",
        "                store_u8(score, worth)\n",
        "                worth = u32(worth + u32(0))\n",
        "halving",
    ),
    Mutant(
        "a hit counts for the way beside it",
        "query",
        "touch(table, meta + u64(SCORES) + u64(way), end - start)",
        "touch(table, meta + u64(SCORES) + u64(way ^ u32(1)), end - start)",
        "operations",
    ),
    Mutant(
        "an insert is as good as a hit",
        "scores",
        "u32(tick - u32(AGE_AT_INSERT))",
        "u32(tick - u32(0))",
        "operations",
    ),
    Mutant(
        "the clock stands still",
        "misses",
        "    add_u64(table + u64(CLOCK), step_of(table, n_keys))\n",
        "",
        "operations",
    ),
)

_MISSES = (
    Mutant(
        "keys of one claim are taken for one",
        "misses",
        "            and load_const_u64(keys + where * u64(KEY_BYTES)) == key\n",
        "",
        "operations",
    ),
    Mutant(
        "occurrences in two tables are taken for one",
        "misses",
        "            and where >= start\n            and where < end\n",
        "",
        "small_batches",
    ),
    Mutant(
        "a miss is taken for a hit of the same key",
        "misses",
        "            (other & u64(HIT_BIT)) == kind\n            and where >= start",
        "            where >= start",
        "readers_that_count_beside_inserts",
    ),
    Mutant(
        "claims of an earlier launch count",
        "misses",
        "if (other >> u64(GENERATION_SHIFT)) != generation:",
        "if other == u64(0):",
        "claims_of_earlier_launches",
    ),
    Mutant(
        "the generation stays",
        "misses",
        "store_u64(work + u64(GENERATION), generation + u64(1))",
        "store_u64(work + u64(GENERATION), generation + u64(0))",
        "claims_of_earlier_launches",
    ),
    Mutant(
        "a first occurrence gets no number",
        "misses",
        "            store_u32(firsts + position * u64(4), number)\n",
        "            store_u32(firsts + position * u64(4), u32(0))\n",
        "operations",
    ),
    Mutant(
        "the last block is taken for the one before",
        "misses",
        "ticket = add_u32(counters + u64(TABLE_TICKET), u32(1))",
        "ticket = u32(add_u32(counters + u64(TABLE_TICKET), u32(1)) + u32(1))",
        "operations",
    ),
    Mutant(
        "counters are not begun anew",
        "misses",
        "            store_u64(counters, u64(0))\n",
        "",
        "operations",
    ),
    Mutant(
        "the ticket of the tables is not begun anew",
        "misses",
        "                store_u32(work + u64(TICKET), u32(0))\n",
        "",
        "claims_of_earlier_launches",
    ),
    Mutant(
        "misses of a warp share a place",
        "device",
        "return u32(base + u32(cuda.popc(u32(lanes & lanes_below(lane)))))",
        "return base",
        "operations",
    ),
    Mutant(
        "a dump does not begin anew",
        "dump",
        "            store_u32(counts + u64(DUMP_COUNT), u32(0))\n",
        "",
        "dumps_again",
    ),
)

_ROWS = (
    Mutant(
        "a query takes a key too many",
        "query",
        "live = position < end",
        "live = position <= end",
        "operations",
    ),
    Mutant(
        "an insert makes room although it must not",
        "insert",
        "elif (flags & u32(FREE_ONLY)) != u32(0):",
        "elif (flags & u32(FREE_ONLY)) == u32(1):",
        "no_room",
    ),
    Mutant(
        "a row that makes no room is not scored",
        "insert",
        "if outcome != _REPLACED:",
        "if outcome != _REPLACED and (flags & u32(FREE_ONLY)) == u32(0):",
        "no_room",
    ),
    Mutant(
        "an insert takes a key too many",
        "insert",
        "        if i >= n:\n",
        "        if i > n:\n",
        "operations",
    ),
    Mutant(
        "a unit lies in the row before its own",
        "rows",
        "magic = -(-(1 << 48) // units)",
        "magic = (1 << 48) // units",
        "operations",
    ),
    Mutant(
        "the third round of units is dropped",
        "rows",
        "has_third = whole_rounds or u32(start + u32(2)) < u32(units)",
        "has_third = whole_rounds",
        "operations",
    ),
    Mutant(
        "rows that come in are taken for padded",
        "update",
        "row_bytes = rows.row_bytes",
        "row_bytes = rows.stride_bytes",
        "operations_of_halves",
    ),
    Mutant(
        "stored rows are taken for packed",
        "query",
        "gather = gather_rows(rows, rows.stride_bytes, contiguous=True)",
        "gather = gather_rows(rows, rows.row_bytes, contiguous=True)",
        "operations_of_halves",
    ),
    Mutant(
        "hits get the default row",
        "query",
        "number = u32(slot + u64(way))",
        "number = u32(n_sets * u64(WAYS))",
        "operations",
    ),
    Mutant(
        "a miss that is filled is a hit",
        "query",
        "missed = live and not hit",
        "missed = live and not hit and not fill",
        "operations",
    ),
    Mutant(
        "a scatter hands out a row too many",
        "scatter",
        "u32(unique - first) < n_rows",
        "u32(unique - first) <= n_rows",
        "operations",
    ),
    Mutant(
        "a scatter begins a row late",
        "scatter",
        "unique >= first and",
        "unique > first and",
        "operations",
    ),
)

_BAGS = (
    Mutant(
        "a row that is not wanted is weighed with 0",
        "pooling",
        "        return add_unit(total, bits, known, is_wanted)",
        "        return add_unit(total, bits, known if is_wanted else f32(0), True)",
        "bags_beside_nan",
    ),
    Mutant(
        "a row gets the weight of the lane that reads it",
        "pooling",
        "shuffle_u32(float32_to_bits(weight), u32(row & u32(31)))",
        "shuffle_u32(float32_to_bits(weight), u32(cuda.laneid))",
        "operations",
    ),
    Mutant(
        "a mean counts one key less",
        "pooled",
        "inverse(f32(u32(stop - begin)))",
        "inverse(f32(u32(stop - begin - u64(1))))",
        "operations",
    ),
    Mutant(
        "a bag's second chunk begins the sum anew",
        "pooled",
        "target, scale, chunk == begin, fill",
        "target, scale, True, fill",
        "operations",
    ),
)

RESULT_MUTANTS = (*_KEYS, *_SCORES, *_MISSES, *_ROWS, *_BAGS)
