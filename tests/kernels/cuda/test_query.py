from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import (
    GENERATION,
    SCORES,
    SET_BYTES,
    WAYS,
    Policy,
    RowLayout,
    TableLayout,
    WorkLayout,
)
from hps_numba.kernels.cuda.operands import Batch
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.comparisons import CANARY
from tests.kernels.cuda.harness import Answer
from tests.kernels.cuda.hashes import claim_of
from tests.kernels.cuda.oracle import Array, handed_out
from tests.kernels.cuda.sequences import (
    EXTREME,
    RAGGED,
    bits_for,
    fill,
    keys_in_set,
    rows_for,
)

# Every dim with one type of row, in turn, and the odd ones as float32, too.
DIMS = (1, 2, 3, 4, 7, 8, 16, 20, 32, 33, 64, 100, 128, 1000)
TYPES = (
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
)
SHAPES = [RowLayout(dim, *TYPES[i % len(TYPES)]) for i, dim in enumerate(DIMS)]
SHAPES += [RowLayout(dim) for dim in (1, 2, 7, 33, 1000)]
SMALL = TableLayout(n_sets=8, n_stamps=64, tick_shift=5)


def _filled(
    rows: RowLayout, n: int = 100, policy: Policy = Policy.LRU, **options: object
) -> CheckedCache:
    """Return a cache that has the keys 0 to n and rows of any bits."""
    cache = CheckedCache(rows, [SMALL], policy, **options)
    fill(cache, np.arange(n), bits_for(cache, n, seed=rows.dim))
    cache.set_default(0, bits_for(cache, 1, seed=99)[0])
    return cache


# -- rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", SHAPES, ids=lambda rows: rows.name)
def test_rows_come_out_bit_for_bit(rows: RowLayout) -> None:
    cache = _filled(rows)
    rng = np.random.default_rng(rows.dim)
    for n in (1, 33, 257):
        with cache.memory.scratch():
            cache.query(rng.integers(-50, 150, n))
            answer, found = cache.query(rng.integers(-50, 150, n), fill=True)
            cache.scatter(answer, found, 0, bits_for(cache, 150, seed=n))


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("rows", [RowLayout(4), RowLayout(33)], ids=["whole", "odd"])
def test_nothing_is_written_beyond_the_last_row(n: int, rows: RowLayout) -> None:
    cache = _filled(rows)
    keys = np.random.default_rng(n).integers(0, 150, n)
    around = cache.memory.array((n + 2, rows.dim), np.float32)
    around.view(np.uint8)[...] = CANARY
    cache.query(keys, out=around[1 : n + 1])
    assert (around[[0, -1]].view(np.uint8) == CANARY).all()


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_every_half_becomes_its_float32(stored: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)
    cache = CheckedCache(RowLayout(64, stored), [TableLayout(128)])
    rows = halves.view(cache.cpu.stored)
    fill(cache, np.arange(1024), rows)
    answer, _ = cache.query(np.arange(1024))
    assert answer.results() == [0, 0, 1024, 0]
    wanted = handed_out(rows, cache.rows)
    got, finite = answer.out.view(np.uint32), ~np.isnan(wanted)
    assert (got[finite] == wanted.view(np.uint32)[finite]).all()
    assert np.isnan(answer.out[~finite]).all()


@pytest.mark.parametrize(
    ("rows", "offset"),
    [
        (RowLayout(4), 4),
        (RowLayout(4), 8),
        (RowLayout(8, "float16"), 4),
        (RowLayout(8, "float16", "float16"), 2),
        (RowLayout(8, "bfloat16", "bfloat16"), 4),
        (RowLayout(8, "bfloat16", "bfloat16"), 8),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_output_may_begin_anywhere_a_value_may(rows: RowLayout, offset: int) -> None:
    cache = _filled(rows)
    keys = np.random.default_rng(offset).integers(0, 150, 100)
    block = cache.memory.array(100 * rows.out_bytes + 32, np.uint8, fill=CANARY)
    inside = slice(offset, offset + 100 * rows.out_bytes)
    out = block[inside].view(cache.cpu.out).reshape(100, rows.dim)
    answer, found = cache.query(keys, out=out)
    cache.scatter(answer, found, 0, bits_for(cache, 100, seed=3))
    outside = np.delete(block, np.r_[inside])
    assert (outside == CANARY).all()


def test_what_lies_between_rows_does_not_matter() -> None:
    cache = _filled(RowLayout(3))
    keys = np.arange(100)
    first, _ = cache.query(keys, touch=False)
    stride = cache.rows.stride_bytes
    n_bytes = SMALL.n_slots * stride
    for block in (cache.cpu.block, cache.image):
        start = cache.cpu.layout.offset("rows", 0)
        rows = block[start : start + n_bytes].reshape(-1, stride)
        rows[:, cache.rows.row_bytes :] = np.arange(4, dtype=np.uint8)
    second, _ = cache.query(keys, touch=False)
    assert first.out.tobytes() == second.out.tobytes()


# -- keys ---------------------------------------------------------------------------


def test_every_int64_is_a_key() -> None:
    cache = CheckedCache(RowLayout(4), [SMALL])
    keys = np.array(EXTREME)
    answer, _ = cache.query(keys)
    assert answer.results() == [len(keys), len(keys), 0, 0]
    fill(cache, keys, rows_for(cache, len(keys), seed=1))
    answer, _ = cache.query(keys)
    assert answer.results() == [0, 0, len(keys), 0]


def test_keys_of_one_digest_are_told_apart() -> None:
    keys = keys_in_set(60, digest=77)
    cache = CheckedCache(RowLayout(4), [TableLayout(n_sets=1)])
    fill(cache, keys[:WAYS], rows_for(cache, WAYS, seed=1))
    answer, _ = cache.query(keys, count_unique=True)
    assert answer.results() == [60 - WAYS, 60 - WAYS, WAYS, WAYS]


@pytest.mark.parametrize("policy", [Policy.LRU, Policy.LFU])
@pytest.mark.parametrize("key", [5, 500], ids=["hit", "miss"])
def test_a_launch_may_ask_for_one_key_only(key: int, policy: Policy) -> None:
    cache = _filled(RowLayout(4), policy=policy, preempt=0.1)
    answer, _ = cache.query(np.full(1000, key), count_unique=True)
    assert answer.results() == ([0, 0, 1000, 1] if key == 5 else [1000, 1, 0, 0])


def test_a_set_under_a_writer_misses_until_it_is_even_again() -> None:
    cache = _filled(RowLayout(4))
    keys = np.arange(100)
    held = cache.cpu.meta()[3, :4].view(np.uint32)
    of_set = [k for k in range(100) if cache.oracle.tables[0].set_of(k) == 3]
    held[0] |= 1
    with cache.memory.scratch():
        answer = cache.cpu.query(keys)
        assert sorted(answer.unique().tolist()) == of_set
        assert answer.results()[0] == len(of_set)
    cache.oracle.tables[0].clock += 32
    cache.oracle.tables[0].totals.update(hits=100 - len(of_set), misses=len(of_set))
    held[0] &= ~np.uint32(1)
    for one in range(SMALL.n_sets):
        if one != 3:
            scores = cache.oracle.tables[0].sets[one].scores
            scores[:] = cache.cpu.scores()[one].tolist()
    cache.restore(0, range(SMALL.n_sets))
    answer, _ = cache.query(keys)
    assert answer.results() == [0, 0, 100, 0]


# -- several tables -----------------------------------------------------------------


def test_tables_of_a_launch_keep_to_themselves() -> None:
    sizes = (8, 1, 3)
    tables = [TableLayout(n, n_stamps=16, tick_shift=3) for n in sizes]
    cache = CheckedCache(RowLayout(4), tables)
    for i in range(3):
        fill(cache, np.arange(20), rows_for(cache, 20, seed=i), table=i)
    rng = np.random.default_rng(1)
    work = cache.cpu.workspace(2000, 3)
    for lengths in [(0, 0, 0), (5, 0, 9), (0, 257, 0), (1000, 1, 32), (0, 0, 300)]:
        with cache.memory.scratch():
            parts = [rng.integers(0, 40, n) for n in lengths]
            answer, found = cache.query(*parts, work=work, count_unique=True)
            for i in range(3):
                cache.scatter(answer, found, i, rows_for(cache, 50, seed=i))


def test_a_launch_may_begin_at_any_table() -> None:
    cache = CheckedCache(RowLayout(4), [SMALL] * 4, Policy.LFU)
    for i in range(4):
        fill(cache, np.arange(i, 80, 2), rows_for(cache, 40 - i // 2, seed=i), table=i)
    keys = np.arange(90)
    for first, n in [(1, 1), (3, 1), (1, 2), (2, 2)]:
        answer, found = cache.query(*[keys] * n, first_table=first)
        for i in range(n):
            cache.scatter(answer, found, i, rows_for(cache, 60, seed=i))


@pytest.mark.parametrize(
    ("offsets", "n_longest", "n_looked"),
    [
        ([0, 10**6], 300, 300),
        ([0, 2**64 - 1], 300, 300),
        ([400, 500], 300, 0),
        ([290, 300], 300, 10),
        ([200, 100], 300, 0),
        ([0, 300], 100, 128),
        ([10, 300], 1, 128),
        ([0, 0], 300, 0),
    ],
)
def test_a_launch_keeps_to_its_bounds_whatever_the_offsets_say(
    offsets: list[int], n_longest: int, n_looked: int
) -> None:
    cache = _filled(RowLayout(4))
    cpu, memory = cache.cpu, cache.memory
    keys = cpu.put(np.arange(-50, 250))[1]
    parts = cpu.put(np.array(offsets, np.uint64))[1]
    out = memory.array((300, 4), np.float32)
    work = cpu.workspace(300)
    batch = Batch(300, keys, parts, n_longest=n_longest)
    for _ in range(2):
        cpu.cache.query(batch, memory.address(out), work[0], fill=True)
        answer = Answer(out, *work, offsets)
        n_missing, _, n_hits, _ = answer.results()
        assert n_missing + n_hits == n_looked
        written = (out.view(np.uint32) != 0).any(1)
        assert written.sum() == n_looked
        out[...] = 0


def test_an_empty_query_reports_and_moves_nothing_on() -> None:
    cache = _filled(RowLayout(4))
    work = cache.cpu.workspace(10)
    answer, _ = cache.query(np.arange(5, 8), work=work)
    assert answer.results() == [0, 0, 3, 0]
    clock = cache.oracle.tables[0].clock
    answer, _ = cache.query(np.empty(0, np.int64), work=work)
    assert answer.results() == [0, 0, 0, 0]
    assert cache.oracle.tables[0].clock == clock


# -- the workspace ------------------------------------------------------------------


def test_a_workspace_serves_many_launches_without_being_cleared() -> None:
    cache = _filled(RowLayout(4))
    rng = np.random.default_rng(5)
    work = cache.cpu.workspace(100)
    for _ in range(200):
        with cache.memory.scratch():
            keys = rng.integers(0, 130, rng.integers(0, 101))
            cache.query(keys, work=work, count_unique=True)
    words = work[1][:64].view(np.uint64)
    assert words[GENERATION // 8] == 201


@pytest.mark.parametrize("n", [1, 64, 256])
def test_as_many_distinct_misses_as_a_workspace_holds_are_named(n: int) -> None:
    cache = CheckedCache(RowLayout(4), [SMALL], preempt=0.05)
    work = cache.cpu.workspace(n)
    for _ in range(3):
        answer, _ = cache.query(np.arange(n), work=work)
        assert answer.results() == [n, n, 0, 0]


@pytest.mark.parametrize("n_tables", [1, 2])
def test_misses_that_all_begin_at_one_claim_are_named(n_tables: int) -> None:
    n = 48
    n_claims = WorkLayout(n, n_tables).n_claims
    tables = [SMALL] * n_tables
    cache = CheckedCache(RowLayout(4), tables, preempt=0.05)
    # The last claim, so that the search goes on at the first.
    parts = [_keys_at_claim(n // n_tables, i, n_claims - 1) for i in range(n_tables)]
    answer, _ = cache.query(*parts)
    assert answer.results()[:2] == [n // n_tables, n // n_tables]


def _keys_at_claim(n: int, table: int, place: int) -> Array:
    n_claims = WorkLayout(48).n_claims
    keys = (k for k in range(10**6) if claim_of(k, table, n_claims) == place)
    return np.array([next(keys) for _ in range(n)], np.int64)


@pytest.mark.parametrize("seed", range(4))
def test_tables_do_not_take_each_others_claims(seed: int) -> None:
    # Of 256 claims, those of the fourth table begin 19 after those of the first.
    n = 64
    keys = (k for k in range(10**6) if claim_of(k, 0, 256) == 100)
    part = np.array([next(keys) for _ in range(n)], np.int64)
    nothing = np.empty(0, np.int64)
    cache = CheckedCache(RowLayout(4), [SMALL] * 4, schedule="uniform", preempt=0.02)
    cache.launcher.seed = 1000 * seed
    work = cache.cpu.workspace(2 * n, 4)
    assert work[0].layout.n_claims == 256
    answer, _ = cache.query(part, nothing, nothing, part, work=work)
    assert answer.results(0) == answer.results(3) == [n, n, 0, 0]


def test_a_key_that_comes_in_during_a_launch_is_told_apart_from_its_misses() -> None:
    both = 0
    for seed in range(40):
        cache = CheckedCache(RowLayout(4), [SMALL])
        with cache.launcher.together(seed, preempt=0.3):
            answer = cache.cpu.query(np.full(200, 5), count_unique=True, stream=1)
            cache.cpu.insert(np.array([5]), rows_for(cache, 1, seed=1), stream=2)
        n_missing, n_unique, n_hits, n_unique_hits = answer.results()
        assert n_missing + n_hits == 200
        assert (n_unique, n_unique_hits) == (n_missing > 0, n_hits > 0)
        assert answer.unique().tolist() == [5] * n_unique
        assert (answer.numbers() == 0).all()
        assert len(set(answer.missing()[:, 1].tolist())) == n_unique
        both += n_unique and n_unique_hits
    assert both > 5


def test_the_last_generations_leave_room_for_position_and_kind() -> None:
    cache = _filled(RowLayout(4))
    work = cache.cpu.workspace(200)
    work[1][:64].view(np.uint64)[GENERATION // 8] = 2**39 - 3
    for _ in range(2):
        keys = np.concatenate([np.arange(80, 120)] * 5)
        answer, _ = cache.query(keys, work=work, count_unique=True)
        assert answer.results() == [100, 20, 100, 20]


# -- scores -------------------------------------------------------------------------


def test_hits_are_worth_the_tick_after_their_launch() -> None:
    cache = _filled(RowLayout(4), n=20)
    for n in (1, 31, 32, 33, 400):
        cache.query(np.arange(n) % 20)
    # A launch moves the clock by a tick, 32 keys, at most.
    assert cache.oracle.tables[0].clock == 1 + 31 + 3 * 32
    cache.query(np.arange(20), touch=False)
    seen = {cache.cpu.scores()[cache.oracle.tables[0].find(k)] for k in range(20)}
    assert seen == {4}


def test_the_way_longest_unused_yields_also_when_ticks_wrap_around() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(1, tick_shift=0)])
    cache.set_clock(0, 240)
    cache.insert(np.arange(WAYS), rows_for(cache, WAYS, seed=1))
    for key in range(WAYS):
        cache.query(np.array([key]))
    assert cache.oracle.tables[0].clock == 268
    for key in range(10):
        cache.insert(np.array([100 + key]), rows_for(cache, 1, seed=key))
    # New keys are as old as two ticks: older than the last, younger than these ten.
    assert set(cache.cpu.contents()) == {*range(10, WAYS), *range(100, 110)}


def test_counts_of_uses_grow_slower_and_end_at_255() -> None:
    cache = _filled(RowLayout(4), n=60, policy=Policy.LFU)
    sets = cache.oracle.tables[0].sets
    for one in sets:
        one.scores[:] = [0, 1, 15, 16, 17, 31, 32, 100, 200, 254, 255] + [255] * 17
    cache.restore(0, range(len(sets)))
    before = sum(sum(one.scores) for one in sets)
    rng = np.random.default_rng(2)
    for _ in range(60):
        with cache.memory.scratch():
            cache.query(rng.permutation(60))
    after = sum(sum(one.scores) for one in sets)
    assert before < after < before + 60 * 60 // 4
    assert max(max(one.scores) for one in sets) == 255


def test_a_count_of_255_stays_even_if_the_lot_falls_on_it() -> None:
    cache = _filled(RowLayout(4), n=1, policy=Policy.LFU)
    table = cache.oracle.tables[0]
    n_set, way = table.find(0)
    table.sets[n_set].scores[way] = 255
    # The clock with which the score's address draws the lot of all those at 255.
    address = table.meta + n_set * SET_BYTES + SCORES + way
    mixed = 5 * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64
    cache.set_clock(0, address ^ mixed)
    assert table.chance(n_set, way, 255)
    cache.restore(0, [n_set])
    cache.query(np.array([0]))
    assert cache.cpu.scores()[n_set, way] == 255
