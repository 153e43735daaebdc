from __future__ import annotations

import lzma
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bench import policy
from bench.policy_sim import (
    EXACT_LRU,
    HALVE,
    LFU,
    LOWEST_WAY,
    LRU,
    ROTATING,
    STATIC,
    SUBTRACT,
    Counts,
    Rules,
    Sets,
    Stream,
    new_sets,
    replay,
    replay_whole_lru,
    set_of,
    stream_of,
)
from bench.records import read
from bench.workloads import zipf
from tests.bench.results import WHERE

SMALL = policy.Sizes(
    n_rows=300, n_lookups=2_048, shares=(0.2,), batches=(64,), drift_keys=512, fill=280
)


def lru_of_a_dict(keys: np.ndarray, capacity: int, batch: int) -> Counts:
    cached: OrderedDict[int, None] = OrderedDict()
    hits = unique = unique_hits = inserts = 0
    for start in range(0, keys.size // batch * batch, batch):
        part = keys[start : start + batch].tolist()
        hits += sum(key in cached for key in part)
        distinct = list(dict.fromkeys(part))
        unique += len(distinct)
        unique_hits += sum(key in cached for key in distinct)
        for key in distinct:
            inserts += key not in cached
            cached[key] = None
            cached.move_to_end(key)
            if len(cached) > capacity:
                cached.popitem(last=False)
    n = keys.size // batch * batch
    return Counts(n, hits, unique, unique_hits, inserts, 0)


def one_set(rules: Rules, ways: int = 4) -> Sets:
    return new_sets(ways, rules, ways)


def held(sets: Sets) -> set[int]:
    return set(sets.keys.ravel().tolist()) - {-1}


def look_up(sets: Sets, rules: Rules, *batches: list[int]) -> list[int]:
    """Look up batches of keys 0 .. 99 in a cache and return the hits of each."""
    hashes = stream_of(np.arange(100)).hashes
    streams = (Stream(np.array(keys, np.int32), hashes) for keys in batches)
    return [replay(s, sets, rules, batch=s.numbers.size).hits for s in streams]


@pytest.mark.parametrize("capacity", [1, 7, 100])
@pytest.mark.parametrize("batch", [1, 16, 333])
def test_exact_lru_hits_what_an_ordered_dict_hits(capacity: int, batch: int) -> None:
    keys = zipf(400, seed=1)(5_000)
    counts = replay_whole_lru(stream_of(keys), capacity, batch=batch)
    assert counts == lru_of_a_dict(keys, capacity, batch)


def test_one_set_of_exact_lru_is_exact_lru() -> None:
    stream, rules = stream_of(zipf(400, seed=1)(5_000)), Rules(score=EXACT_LRU)
    in_sets = replay(stream, new_sets(64, rules, 64), rules, batch=1)
    assert in_sets._replace(stamps=0) == replay_whole_lru(stream, 64, batch=1)


def test_byte_epochs_of_one_key_are_exact_lru_of_a_set_while_they_do_not_wrap() -> None:
    stream = stream_of(zipf(50, seed=1)(3_000))
    exact, bytes_ = Rules(score=EXACT_LRU), Rules(tick=1, aged=0)
    hits = [
        replay(stream, new_sets(28, rules), rules, batch=1).hits
        for rules in (exact, bytes_)
    ]
    assert hits[0] == hits[1]


def test_only_batches_after_the_warm_ones_count() -> None:
    stream, rules = stream_of(np.zeros(40, np.int64)), Rules()
    counts = replay(stream, new_sets(28, rules), rules, batch=10, warm=1)
    assert counts[:5] == (30, 30, 3, 3, 0)
    assert replay_whole_lru(stream, 1, batch=10, warm=1)[:5] == (30, 30, 3, 3, 0)


def test_a_set_is_the_high_word_of_a_product() -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 64, 1_000, dtype=np.uint64)
    for n_sets in (1, 3, 7_143, (1 << 31) - 1):
        for hashed in hashes[:250]:
            assert set_of(hashed, n_sets) == int(hashed) * n_sets >> 64


def test_the_row_of_the_oldest_epoch_leaves() -> None:
    rules = Rules(score=LRU, tick=4)
    sets = one_set(rules)
    assert look_up(sets, rules, [0, 1, 2, 3], [0, 1, 3, 3], [4, 4, 4, 4]) == [0, 4, 0]
    assert held(sets) == {0, 1, 3, 4}


def test_new_rows_leave_before_rows_hit_in_the_same_batch() -> None:
    rules = Rules(score=LRU, tick=1)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3], [0, 1, 2, 4, 5, 6])
    assert {0, 1, 2} <= held(sets)


def test_a_batch_that_ages_its_hits_first_loses_them_to_its_new_rows() -> None:
    rules = Rules(score=LRU, tick=1, early=0, aged=0)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7])
    assert held(sets) == {4, 5, 6, 7}


@pytest.mark.parametrize(("capped", "clock"), [(1, 10 + 3), (0, 25 + 3)])
def test_a_batch_moves_the_clock_by_one_epoch_at_most(capped: int, clock: int) -> None:
    rules = Rules(tick=10, capped=capped)
    sets = one_set(rules)
    look_up(sets, rules, [1] * 25, [1] * 3)
    assert sets.clock.tolist() == [clock]


def test_equal_rows_leave_in_turn_or_at_the_lowest_way() -> None:
    for tie, left in ((ROTATING, {2, 3, 4, 5}), (LOWEST_WAY, {1, 2, 3, 5})):
        rules = Rules(tick=1_000_000, aged=0, tie=tie)
        sets = one_set(rules)
        look_up(sets, rules, [0], [1], [2], [3], [4], [5])
        assert held(sets) == left


def test_ages_of_a_full_set_are_clamped() -> None:
    rules = Rules(tick=1, aged=0, clamp=10)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3], *[[3]] * 50, [4])
    ages = (sets.clock[0] - sets.scores) & 255
    assert sorted(ages.ravel().tolist()) == [0, 1, 10, 10]


def test_the_least_counted_row_leaves() -> None:
    rules = Rules(score=LFU)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3], [0, 1, 3], [2, 0, 1, 3], [4])
    assert held(sets) == {0, 1, 3, 4}


def test_counts_grow_slowly_and_end_at_their_bytes_greatest() -> None:
    rules = Rules(score=LFU, log_shift=3, start=0)
    sets = one_set(rules)
    look_up(sets, rules, [0])
    look_up(sets, rules, [0] * 8)
    assert sets.scores.max() == 8
    look_up(sets, rules, [0] * 10_000)
    # from 8 k to 8 k + 8 takes 8 * 2 ** k hits on average: 8 * (2 ** 10 - 2) to 80
    assert 75 <= sets.scores.max() <= 90
    sets.scores[:] = np.where(sets.keys == 0, 255, 0)
    look_up(sets, Rules(score=LFU, log_shift=8), [0] * 100)
    assert sets.scores.max() == 255


def test_duplicates_of_a_batch_may_count_once() -> None:
    rules = Rules(score=LFU, start=0, once=1)
    sets = one_set(rules)
    look_up(sets, rules, [0], [0] * 8, [0] * 8)
    assert sets.scores.max() == 2


def test_all_counts_of_a_set_are_halved_after_its_period() -> None:
    rules = Rules(score=LFU, ageing=HALVE, period=6)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3], [4])
    sets.scores[:] = [[40, 20, 9, 8]]
    look_up(sets, rules, [5])  # the sixth write, whose turn begins at way 1
    assert sets.scores.tolist() == [[20, 10, 1, 4]]


def test_what_the_leaving_row_had_may_be_subtracted_from_its_set() -> None:
    rules = Rules(score=LFU, ageing=SUBTRACT, start=1)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3])
    sets.scores[:] = [[40, 20, 9, 7]]
    look_up(sets, rules, [5])
    assert sorted(sets.scores.ravel().tolist()) == [1, 3, 14, 34]


def test_nothing_leaves_a_static_cache() -> None:
    rules = Rules(score=STATIC)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2], [3], [4, 5, 6], [7])
    assert held(sets) == {0, 1, 2, 3}


def test_a_doorkeeper_refuses_a_full_set_its_keys_at_first_sight() -> None:
    rules = Rules(door=16)
    sets = one_set(rules)
    look_up(sets, rules, [0, 1, 2, 3])
    assert held(sets) == {0, 1, 2, 3}
    assert look_up(sets, rules, [9, 9], [8], [9], [9]) == [0, 0, 0, 1]
    assert 9 in held(sets)
    assert 8 not in held(sets)


@pytest.mark.parametrize("slots_per_key", [1.0, 1.05, 1.1])
def test_keys_fill_sets_as_a_poisson_distribution_does(slots_per_key: float) -> None:
    mean = 28 / slots_per_key
    expected = sum(
        min(n, 28) * math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))
        for n in range(200)
    )
    share = policy.held_share(112_000, int(112_000 * slots_per_key))
    assert share == pytest.approx(expected / mean, abs=0.003)


def test_ticks_are_powers_of_two_from_an_eighth_to_a_quarter_of_the_cache() -> None:
    for capacity in (8, 9, 1_000, 65_535, 65_536, 10_000_000):
        tick = policy.tick_of(capacity)
        assert tick & (tick - 1) == 0
        assert capacity / 8 < tick <= capacity / 4
    assert policy.tick_of(1) == 1


def test_a_doorkeeper_has_a_power_of_two_of_bytes() -> None:
    assert [policy.door_of(c, 4) for c in (1, 1_000, 1_024, 1_025)] == [
        *(4, 4_096, 4_096, 8_192)
    ]


def test_ideal_static_holds_the_keys_looked_up_most() -> None:
    stream = stream_of(np.array([9, 9, 1, 1, 1, 2, 2, 5, 3, 3]))
    case = policy.Case("mine", stream, capacity=2, batch=4, warm=1)
    assert policy.ideal_static(case) == 0.75


def test_what_is_popular_drifts() -> None:
    sample = policy.drifting(1_000, seed=1, every=50_000)(100_000)
    first, second = (
        set(np.argsort(np.bincount(part, minlength=1_000))[-20:].tolist())
        for part in np.split(sample, 2)
    )
    assert 4 <= len(first & second) <= 16
    steady = policy.drifting(1_000, seed=1, every=100_000)(50_000)
    assert steady.tolist() == sample[:50_000].tolist()


def test_a_fifth_of_a_scanned_workload_is_another_table_in_order() -> None:
    keys = policy.scanned(1_000, seed=1)(4_000)
    scan = keys[keys >= 1_000] - 1_000
    assert scan.tolist() == list(range(scan.size))
    assert 700 < scan.size < 900


@pytest.mark.parametrize("name", ["short.trace", "short.trace.xz"])
def test_traces_are_big_endian_words_compressed_or_not(
    tmp_path: Path, name: str
) -> None:
    raw = np.array([1, 1 << 31, 7], ">u4").tobytes()
    path = tmp_path / name
    path.write_bytes(lzma.compress(raw) if name.endswith("xz") else raw)
    assert policy.read_trace(path).tolist() == [1, 1 << 31, 7]
    assert {case.keys for case in policy.trace_cases(path)} == {"short"}


def test_a_run_writes_every_rate_of_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "SMOKE", SMALL)
    trace, out = tmp_path / "made.trace", tmp_path / "policy.jsonl"
    trace.write_bytes(zipf(200, seed=1)(2_000).astype(">u4").tobytes())
    app = typer.Typer()
    app.command()(policy.main)
    arguments = ["--smoke", "--trace", str(trace), "--out", str(out)]
    for _ in range(2):  # a second run writes the file anew
        assert CliRunner().invoke(app, arguments).exit_code == 0
    results = read(out)
    assert len({r.key for r in results}) == len(results)
    assert {r.name for r in results} == {
        *("policy_fill", "policy_hits", "policy_unique_hits"),
        *("policy_inserts", "policy_stamps", "policy_points"),
    }
    rates = [r for r in results if r.name != "policy_points"]
    assert all(0 <= r.median <= 1 for r in rates)
    hits = {r.params["keys"] for r in results if r.name == "policy_hits"}
    assert hits >= {"zipf 0.9", "zipf 1.05, drifting", "made"}
    variants = {r.variant for r in results if r.name == "policy_inserts"}
    assert variants == {policy.WHOLE_LRU, *policy.CHOSEN}


def test_points_are_hits_against_exact_lru() -> None:
    def counts(hits: int) -> Counts:
        return Counts(200, hits, 100, 0, 0, 0)

    found = [{policy.WHOLE_LRU: counts(100), "LRU": counts(n)} for n in (104, 90, 120)]
    results = policy.points(found, "drawn", WHERE)
    of_lru = {r.params["figure"]: r.median for r in results if r.variant == "LRU"}
    assert of_lru == {"median": 2.0, "worst": -5.0}
    assert {r.median for r in results if r.variant == policy.WHOLE_LRU} == {0.0}
