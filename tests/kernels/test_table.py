from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing
from hps_numba.tiers.host_partition import FIRST_SLOTS
from tests.kernels.bare_table import ROW_BYTES, Bare, colliding_keys, row_of, rows_of
from tests.kernels.test_hashing import INT64

EXTREME_KEYS = [INT64.min, INT64.max, -1, 0, 1]


def test_every_int64_is_a_key():
    bare = Bare()
    assert bare.fetch(EXTREME_KEYS)[0] == 0
    assert bare.upsert(EXTREME_KEYS, 1) == (writing.DONE, len(EXTREME_KEYS))
    bare.check(dict.fromkeys(EXTREME_KEYS, 1))
    assert bare.remove(EXTREME_KEYS[:2]) == 2
    bare.check(dict.fromkeys(EXTREME_KEYS[2:], 1))


@pytest.mark.parametrize("policy", [kernel.RANDOM, kernel.LEAST_USED, kernel.OLDEST])
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_agree_with_a_dict(seed, policy):
    rng = np.random.default_rng(seed)
    bare = Bare(margin=40, policy=policy)
    near = colliding_keys(20, slot=FIRST_SLOTS - 2)  # chains that wrap around
    pool = np.concatenate([near, EXTREME_KEYS, rng.integers(-100, 100, 60)])
    pool = np.unique(pool)
    expected: dict[int, int] = {}
    for version in range(1, 250):
        keys = rng.permutation(pool)[: rng.integers(0, 12)]
        operation = rng.random()
        if operation < 0.55:
            reason, done = bare.upsert(keys, version)
            expected.update(dict.fromkeys(keys[:done].tolist(), version))
            if reason == writing.NEED_EVICTION:
                assert len(expected) == 40
                assert keys[done] not in expected
                assert bare.evict(13, int(rng.integers(FIRST_SLOTS))) == 13
                left = bare.keys()
                assert len(left) == 27
                assert set(left) <= set(expected)
                expected = {k: expected[k] for k in left}
            elif reason == writing.NEED_INDEX:
                assert bare.used >= bare.partition.limits[1]
                bare.rebuild()
                assert bare.used == bare.size
            else:
                assert done == keys.size
        elif operation < 0.9:
            there = [k for k in keys.tolist() if k in expected]
            assert bare.remove(keys) == len(there)
            for key in there:
                del expected[key]
        elif operation < 0.95:
            bare.rebuild()
        elif operation < 0.97:
            p = bare.partition
            writing.clear_slots(bare.descriptor, 0, p.state)
            expected.clear()
        bare.check(expected)
        absent = [k for k in pool.tolist() if k not in expected]
        hits, stop, out, found = bare.fetch(absent)
        assert (hits, stop) == (0, len(absent))
        assert not found.any()
        assert not out.any()


def test_keys_of_one_slot_form_a_chain_that_survives_holes():
    keys = colliding_keys(30, slot=FIRST_SLOTS - 3)
    bare = Bare()
    bare.upsert(keys, 1)
    expected = dict.fromkeys(keys.tolist(), 1)
    bare.check(expected)
    for hole in (keys[::3], keys[1:5], keys[20:]):
        bare.remove(hole)
        expected = {k: v for k, v in expected.items() if k not in set(hole.tolist())}
        bare.check(expected)
    bare.upsert(keys, 2)
    bare.check(dict.fromkeys(keys.tolist(), 2))


def test_removing_the_last_of_a_chain_gives_its_tombstones_back():
    keys = colliding_keys(10, slot=5)
    bare = Bare()
    bare.upsert(keys, 1)
    bare.remove(keys[:-1])
    assert (bare.size, bare.used) == (1, 10)
    bare.remove(keys[-1:])
    assert (bare.size, bare.used) == (0, 0)


def test_a_key_behind_a_tombstone_is_replaced_and_not_doubled():
    keys = colliding_keys(3, slot=9)
    bare = Bare()
    bare.upsert(keys, 1)
    bare.remove(keys[:1])
    bare.upsert(keys[2:], 2)
    bare.check({int(keys[1]): 1, int(keys[2]): 2})


def test_a_full_index_answers_for_absent_keys_and_refuses_new_ones():
    bare = Bare(margin=2 * FIRST_SLOTS, most_used=FIRST_SLOTS)
    keys = np.arange(FIRST_SLOTS)
    assert bare.upsert(keys, 1) == (writing.DONE, FIRST_SLOTS)
    bare.check(dict.fromkeys(keys.tolist(), 1))
    assert bare.fetch([-7, INT64.max])[:2] == (0, 2)
    assert bare.remove([-7]) == 0
    assert bare.upsert([-7], 2) == (writing.NEED_INDEX, 0)
    assert bare.upsert(keys, 3) == (writing.DONE, FIRST_SLOTS)
    assert bare.remove(keys[10:20]) == 10
    assert bare.upsert([-7], 4) == (writing.DONE, 1)  # in the place of a tombstone
    expected = {k: 3 for k in keys.tolist() if not 10 <= k < 20} | {-7: 4}
    bare.check(expected)


def test_versions_wrap_around():
    bare = Bare()
    keys = [3, 4, 5]
    bare.upsert(keys, 1)
    for top in (0x7FFF_FFFE, 0xFFFF_FFFE):
        metas = bare.slots[:, 1]
        metas[:] = (metas & kernel.LOW) | np.int64(top - (top >> 31 << 32)) << 32
        for version in range(2, 8):
            bare.upsert(keys, version)
            bare.check(dict.fromkeys(keys, version))
            bare.remove([4])
            bare.check({3: version, 5: version})
            bare.upsert([4], version)


@pytest.mark.parametrize("change", ["upsert", "remove", "evict", "clear"])
def test_every_change_of_a_slot_changes_its_meta(change):
    bare = Bare()
    bare.upsert([1, 2, 3], 1)
    before = bare.slots.copy()
    changed = np.flatnonzero((before[:, 1] & kernel.LOW) < kernel.TOMBSTONE)
    for version in range(2, 6):
        if change == "upsert":
            bare.upsert([1, 2, 3], version)
        elif change == "remove":
            bare.remove([1, 2, 3])
        elif change == "evict":
            bare.evict(3)
        else:
            writing.clear_slots(bare.descriptor, 0, bare.partition.state)
        assert not np.isin(bare.slots[changed, 1], before[changed, 1]).any()
        bare.upsert([1, 2, 3], 1)
        assert not np.isin(bare.slots[changed, 1], before[changed, 1]).any()


def test_a_reader_of_a_retired_index_is_sent_away_for_hits_and_misses():
    bare = Bare()
    bare.upsert([1, 2], 1)
    stale = bare.descriptor.copy()
    assert bare.fetch([2, 1, 9], stale)[:2] == (2, 3)
    bare.rebuild()
    bare.upsert([1], 2)
    for keys in ([1], [9]):
        hits, stop, _, found = bare.fetch(keys, stale)
        assert (hits, stop, found.any()) == (0, 0, False)


def test_a_reader_that_lacks_a_segment_is_sent_away_at_its_first_key():
    bare = Bare(margin=2 * FIRST_SLOTS, most_used=FIRST_SLOTS)
    keys = np.arange(FIRST_SLOTS)
    bare.upsert(keys, 1)
    stale = bare.descriptor.copy()
    bare.upsert(keys[50:51], 2)  # takes the first row of the second segment
    hits, stop, out, found = bare.fetch(keys, stale)
    assert (hits, stop) == (50, 50)
    np.testing.assert_array_equal(out[:50], rows_of(keys[:50], 1))
    assert not found[50:].any()
    bare.check(dict.fromkeys(range(FIRST_SLOTS), 1) | {50: 2})


FETCH = "i8[:,::1], i8[::1], u1[:,::1], b1[::1], i8, i8, i8, i8"
UPSERT = "i8[:,::1], i8, i8[::1], u4[::1], i8[::1], u1[:,::1], i8[::1], i8[::1], i8, i8"


@pytest.mark.parametrize(
    ("function", "arguments", "fence"),
    [
        (kernel.fetch_rows, FETCH, "fence acquire"),
        (writing.upsert_rows, UPSERT, "fence release"),
    ],
)
def test_compiled_code_fences_the_copies_of_rows(function, arguments, fence):
    compiled = njit(f"({arguments})", nogil=True)(function.py_func)
    (code,) = compiled.inspect_llvm().values()
    assert fence in code


def test_a_fetch_skips_what_is_found_already():
    bare = Bare()
    bare.upsert([1, 2, 3], 1)
    out = np.full((3, ROW_BYTES), 77, np.uint8)
    found = np.array([True, False, True])
    keys = np.array([1, 2, 3])
    hits, stop = kernel.fetch_rows(bare.descriptor, keys, out, found, 0, 3, 0, 1)
    assert (hits, stop) == (1, 3)
    assert (out[[0, 2]] == 77).all()
    np.testing.assert_array_equal(out[1], row_of(2, 1))


def test_a_fetch_stays_inside_its_part_of_the_batch():
    bare = Bare()
    bare.upsert([1, 2, 3, 4], 1)
    out = np.zeros((4, ROW_BYTES), np.uint8)
    found = np.zeros(4, np.bool_)
    keys = np.array([1, 2, 3, 4])
    hits, stop = kernel.fetch_rows(bare.descriptor, keys, out, found, 1, 3, 0, 1)
    assert (hits, stop) == (2, 3)
    assert found.tolist() == [False, True, True, False]
    assert not out[[0, 3]].any()


@pytest.mark.parametrize("policy", [kernel.LEAST_USED, kernel.OLDEST])
@pytest.mark.parametrize("seed", [0, 17, FIRST_SLOTS - 1])
def test_eviction_takes_the_smallest_scores_and_as_many_as_asked(policy, seed):
    bare = Bare(policy=policy)
    keys = np.random.default_rng(seed).permutation(40)
    bare.upsert(keys, 1)
    for uses, key in enumerate(keys):
        for _ in range(uses if policy == kernel.LEAST_USED else 1):
            bare.fetch([key])
    assert bare.evict(15, seed) == 15
    bare.check(dict.fromkeys(keys[15:].tolist(), 1))


def test_a_late_fetch_does_not_make_a_row_older():
    bare = Bare(policy=kernel.OLDEST)
    bare.upsert([1, 2, 3], 1)
    bare.tick = 100
    bare.fetch([1])
    bare.tick = 50
    bare.fetch([2])
    bare.tick = 10  # began long ago, and gets to its rows only now
    bare.fetch([1])
    assert bare.evict(2) == 2
    assert bare.keys() == [1]


def test_an_update_keeps_the_uses_of_a_row_and_ties_fill_up_the_number_asked():
    bare = Bare(policy=kernel.LEAST_USED)
    bare.upsert(np.arange(40), 1)
    for _ in range(3):
        bare.fetch([5, 6])
    bare.upsert([5], 2)
    assert bare.evict(37, 3) == 37
    assert {5, 6} <= set(bare.keys())
    assert bare.size == 3


def test_eviction_of_more_than_there_is_empties_the_partition():
    for policy in (kernel.RANDOM, kernel.LEAST_USED, kernel.OLDEST):
        bare = Bare(policy=policy)
        bare.upsert(np.arange(40), 1)
        assert bare.evict(41) == 40
        assert (bare.size, bare.used) == (0, 0)
        assert bare.evict(1) == 0
        bare.upsert(np.arange(40), 2)
        bare.check(dict.fromkeys(range(40), 2))


def test_rows_are_found_across_all_segments():
    n = 5_000
    bare = Bare(margin=n, most_used=1 << 20)
    keys = np.random.default_rng(0).integers(INT64.min, INT64.max, n)
    done = 0
    while done < n:
        bare.partition.limits[1] = int(bare.partition.n_slots * 0.75)
        done += bare.upsert(keys[done:], 1)[1]
        bare.rebuild()
    assert len(bare.partition.arrays()) == 1 + 7  # 64, 128, ... and the rest
    bare.check(dict.fromkeys(keys.tolist(), 1))
