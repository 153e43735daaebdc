from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import UNTOUCHED_KEY, CheckedCache
from tests.kernels.cuda.hashes import door_mark_of, door_of, stamp_of
from tests.kernels.cuda.oracle import Array
from tests.kernels.cuda.sequences import (
    EXTREME,
    RAGGED,
    bits_for,
    keys_in_set,
    keys_of_set,
    rows_for,
)

ONE_SET = TableLayout(n_sets=1, n_stamps=64, tick_shift=4)


def _full(policy: Policy, **options: object) -> CheckedCache:
    """Return a cache of one set that is full of the keys 0 to 27."""
    cache = CheckedCache(RowLayout(4), [ONE_SET], policy, **options)
    cache.insert(np.arange(WAYS), rows_for(cache, WAYS, seed=1))
    return cache


@pytest.mark.parametrize("policy", [Policy.LRU, Policy.LFU])
@pytest.mark.parametrize("turn", range(WAYS))
def test_the_victim_is_the_way_of_least_worth_after_the_turn(
    policy: Policy, turn: int
) -> None:
    rng = np.random.default_rng(turn)
    cache = _full(policy)
    one = cache.oracle.tables[0].sets[0]
    one.seq = 2 * (turn + WAYS * int(rng.integers(1000)))
    one.scores = rng.choice([0, 1, 2, 37, 254, 255], WAYS).tolist()
    cache.set_clock(0, 16 * 257)
    cache.restore(0, [0])
    outcomes = cache.insert(np.array([1000]), rows_for(cache, 1, seed=2))
    assert outcomes == [Outcome.EVICTED]


def test_the_least_recently_used_key_makes_room() -> None:
    cache = _full(Policy.LRU)
    cache.query(np.arange(20))
    cache.query(np.arange(1, 20))
    for i in range(8):
        cache.insert(np.array([100 + i]), rows_for(cache, 1, seed=i))
    assert keys_of_set(cache) == {*range(20), *range(100, 108)}


def test_a_static_table_takes_nothing_more_when_its_set_is_full() -> None:
    cache = _full(Policy.STATIC)
    outcomes = cache.insert(np.arange(25, 31), rows_for(cache, 6, seed=3))
    assert outcomes == [Outcome.REPLACED] * 3 + [Outcome.FULL] * 3
    cache.evict(np.array([7]), epoch=0)
    outcomes = cache.insert(np.array([100]), rows_for(cache, 1, seed=4))
    assert outcomes == [Outcome.INSERTED]


def test_a_batch_into_one_full_set_evicts_its_own_keys_too() -> None:
    cache = _full(Policy.LRU)
    keys = np.arange(100, 100 + 3 * WAYS)
    outcomes = cache.insert(keys, rows_for(cache, len(keys), seed=5))
    assert outcomes == [Outcome.EVICTED] * len(keys)
    assert keys_of_set(cache) <= set(keys.tolist())


# -- rows and keys --------------------------------------------------------------------

# A row is written 2, 4, 8 or 16 bytes at a time, in one round of a warp or in many.
WIDTHS = [
    RowLayout(1, "float16"),
    RowLayout(33, "bfloat16", "bfloat16"),
    RowLayout(1),
    RowLayout(2),
    RowLayout(100, "float16"),
    RowLayout(1000),
]


@pytest.mark.parametrize("rows", WIDTHS, ids=lambda rows: rows.name)
def test_rows_are_stored_bit_for_bit(rows: RowLayout) -> None:
    cache = CheckedCache(rows, [TableLayout(2, n_stamps=64)])
    for seed in range(3):
        keys = np.random.default_rng(seed).permutation(80)[:40]
        cache.insert(keys, bits_for(cache, 40, seed=seed))


@pytest.mark.parametrize("n", RAGGED)
def test_as_many_keys_as_are_given_go_in(n: int) -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(64)])
    keys = np.random.default_rng(n).integers(-(2**63), 2**63, n, np.int64)
    assert cache.insert(keys, rows_for(cache, n, seed=n)).count(Outcome.INSERTED) == n
    assert len(cache.cpu.contents()) == cache.cpu.total("size") == n


def test_every_int64_can_be_inserted() -> None:
    cache = CheckedCache(RowLayout(4), [ONE_SET])
    keys = np.array(EXTREME)
    assert cache.insert(keys, rows_for(cache, len(keys), seed=1)) == [2] * len(keys)
    assert set(cache.cpu.contents()) == set(EXTREME)


def test_keys_of_one_digest_do_not_replace_each_other() -> None:
    keys = keys_in_set(40, digest=200)
    cache = CheckedCache(RowLayout(4), [ONE_SET])
    outcomes = cache.insert(keys[:20], rows_for(cache, 20, seed=1))
    assert outcomes == [Outcome.INSERTED] * 20
    outcomes = cache.insert(keys[10:30], rows_for(cache, 20, seed=2))
    assert outcomes.count(Outcome.REPLACED) == 10
    cache.insert(keys[30:], rows_for(cache, 10, seed=3))
    assert keys_of_set(cache) <= set(keys.tolist())


def test_of_a_key_that_is_there_twice_one_row_stays() -> None:
    cache = CheckedCache(RowLayout(4), [ONE_SET], preempt=0.1)
    keys = np.array([7, 8, 7, 9, 7])
    outcomes = cache.insert(keys, rows_for(cache, 5, seed=1))
    assert sorted(outcomes) == [Outcome.REPLACED] * 2 + [Outcome.INSERTED] * 3
    assert cache.cpu.total("size") == 3


def test_only_selected_keys_go_in() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(8)])
    selected = np.arange(100) % 3 == 0
    cache.insert(np.arange(100), rows_for(cache, 100, seed=1), selected=selected * 1)
    assert set(cache.cpu.contents()) == set(range(0, 100, 3))


def test_nobody_need_ask_for_outcomes_or_evicted_keys() -> None:
    cache = _full(Policy.LRU)
    keys, values = np.arange(20, 40), rows_for(cache, 20, seed=1)
    cpu = cache.cpu
    key_address, value_address = cpu.put(keys)[1], cpu.put(values)[1]
    cpu.cache.insert(0, 20, keys=key_address, values=value_address, epoch=0)
    contents = cpu.contents()
    assert len(contents) == WAYS
    wanted = {key: row.tobytes() for key, row in zip(keys, values, strict=True)}
    assert all(contents[key] == wanted[key] for key in contents.keys() & wanted.keys())
    assert cpu.total("inserted") == WAYS + cpu.total("evicted")


# -- order ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["uniform", "priority"])
def test_warps_that_meet_in_a_set_come_one_after_the_other(schedule: str) -> None:
    seen = set()
    for seed in range(40):
        cache = _full(Policy.LRU, schedule=schedule, preempt=0.2)
        cache.launcher.seed = 1000 * seed
        cache.insert(np.array([3, 100, 4, 101, 102]), rows_for(cache, 5, seed=seed))
        seen.add(tuple(cache.oracle.tables[0].sets[0].keys))
    assert len(seen) > 5  # orders that left other sets behind


def test_a_set_that_stays_odd_turns_keys_back() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(2, n_stamps=64)])
    keys = np.array([*keys_in_set(2, n_sets=2), *keys_in_set(2, n_sets=2, n_set=1)])
    held = cache.cpu.meta()[0, :4].view(np.uint32)
    held[0] = 7
    outcomes, evicted = cache.cpu.insert(keys, rows_for(cache, 4, seed=1))
    assert outcomes.tolist() == [Outcome.BUSY] * 2 + [Outcome.INSERTED] * 2
    assert (evicted == UNTOUCHED_KEY).all()
    assert held[0] == 7
    assert set(cache.cpu.contents()) == set(keys[2:].tolist())
    assert cache.cpu.total("size") == cache.cpu.total("inserted") == 2


# -- the doorkeeper -------------------------------------------------------------------

DOOR = TableLayout(1, n_stamps=64, tick_shift=4, n_door=4)


def _visitors(n: int, *, entry: int = 1) -> Array:
    """Return keys from 1000 on that ask one entry of the doorkeeper."""
    keys = (k for k in range(1000, 10**6) if door_of(k, DOOR.n_door) == entry)
    return np.array([next(keys) for _ in range(n)], np.int64)


def _guarded(**options: object) -> CheckedCache:
    cache = CheckedCache(RowLayout(4), [DOOR], **options)
    keys = np.arange(WAYS)
    # While there is room, nobody is turned away.
    assert set(cache.insert(keys, rows_for(cache, WAYS, seed=1), admit=True)) == {2}
    return cache


def test_a_full_set_takes_a_key_at_its_second_sight() -> None:
    cache = _guarded()
    key, other = _visitors(2)
    row = rows_for(cache, 1, seed=2)
    for given, wanted in [
        (key, Outcome.TURNED_AWAY),
        (key, Outcome.EVICTED),
        (key, Outcome.REPLACED),
        (other, Outcome.TURNED_AWAY),
        (key, Outcome.REPLACED),
        (other, Outcome.EVICTED),
    ]:
        assert cache.insert(np.array([given]), row, admit=True) == [wanted]


def test_another_key_makes_the_doorkeeper_forget() -> None:
    cache = _guarded()
    one, other = _visitors(2)
    row = rows_for(cache, 1, seed=2)
    for key in (one, other, one, other):
        outcomes = cache.insert(np.array([key]), row, admit=True)
        assert outcomes == [Outcome.TURNED_AWAY]
    assert cache.insert(np.array([one]), row) == [Outcome.EVICTED]  # not asked


def test_a_key_of_the_same_mark_passes_for_one_that_was_seen() -> None:
    cache = _guarded()
    visitors = _visitors(2000)
    marks = [door_mark_of(key) for key in visitors.tolist()]
    twin = next(i for i in range(1, 2000) if marks[i] == marks[0])
    row = rows_for(cache, 1, seed=2)
    assert cache.insert(visitors[:1], row, admit=True) == [Outcome.TURNED_AWAY]
    assert cache.insert(visitors[[twin]], row, admit=True) == [Outcome.EVICTED]


@pytest.mark.parametrize("seed", range(10))
def test_keys_that_ask_the_doorkeeper_at_once_ask_in_some_order(seed: int) -> None:
    cache = _guarded(preempt=0.2)
    cache.launcher.seed = 1000 * seed
    keys = np.random.default_rng(seed).permutation(_visitors(5))
    for _ in range(4):
        cache.insert(keys, rows_for(cache, 5, seed=seed), admit=True)


# -- epochs ---------------------------------------------------------------------------


def test_rows_from_before_an_update_are_refused() -> None:
    cache = _full(Policy.LRU)
    row = rows_for(cache, 1, seed=1)
    for key in (3, 1000):  # there, and not there
        keys = np.array([key])
        cache.update(keys, row, epoch=5)
        assert cache.insert(keys, row, epoch=4) == [Outcome.STALE]
        assert cache.insert(keys, row, epoch=5) != [Outcome.STALE]
        assert cache.insert(keys, row, epoch=6) == [Outcome.REPLACED]
    assert cache.cpu.total("refused") == 2


def test_keys_that_share_a_stamp_are_refused_together() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(1, n_stamps=2)])
    stamps = [stamp_of(key, 2) for key in range(20)]
    cache.update(np.array([0]), rows_for(cache, 1, seed=1), epoch=9)
    outcomes = cache.insert(np.arange(20), rows_for(cache, 20, seed=1), epoch=8)
    refused = [outcome == Outcome.STALE for outcome in outcomes]
    assert refused == [stamp == stamps[0] for stamp in stamps]


def test_a_cleared_table_refuses_rows_from_before() -> None:
    cache = _full(Policy.LRU)
    cache.clear(epoch=9)
    row = rows_for(cache, 1, seed=1)
    assert cache.insert(np.array([5]), row, epoch=8) == [Outcome.STALE]
    assert cache.insert(np.array([5]), row, epoch=9) == [Outcome.INSERTED]


# -- counts of uses -------------------------------------------------------------------


def test_counts_are_halved_once_in_56_writes() -> None:
    cache = _full(Policy.LFU)
    one = cache.oracle.tables[0].sets[0]
    one.scores = [255] * WAYS
    one.seq = 2 * (56 * 1000 + 54)
    cache.restore(0, [0])
    for i, others in enumerate([255, 127, 127]):
        outcomes = cache.insert(np.array([100 + i]), rows_for(cache, 1, seed=i))
        assert outcomes == [Outcome.EVICTED]
        # All three take the way that came in with the least.
        assert sorted(cache.cpu.scores()[0].tolist()) == [1] + [others] * (WAYS - 1)


def test_the_number_of_a_set_wraps_around() -> None:
    cache = _full(Policy.LRU)
    cache.oracle.tables[0].sets[0].seq = 2**32 - 4
    cache.restore(0, [0])
    for i in range(4):
        cache.insert(np.array([100 + i]), rows_for(cache, 1, seed=i))
    assert cache.cpu.seqs()[0] == 4


def test_keys_spread_over_many_sets() -> None:
    cache = CheckedCache(RowLayout(4), [TableLayout(5003)], preempt=0.01)
    keys = np.random.default_rng(1).integers(-(2**63), 2**63, 1000, np.int64)
    assert set(cache.insert(keys, rows_for(cache, 1000, seed=1))) == {Outcome.INSERTED}
    answer, _ = cache.query(keys)
    assert answer.results() == [0, 0, 1000, 0]
    assert cache.dump().size == 1000
    assert cache.evict(keys) == [Outcome.EVICTED] * 1000
