"""Static tables: readers beside writers, of keys that have two sets each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import Outcome, Policy
from tests.kernels.cuda.pooled_races import pooled_race
from tests.kernels.cuda.race_scenarios import (
    MEMORIES,
    backfill_race,
    counting_race,
    duplicate_race,
    mixed_races,
    shared_stamp_race,
    update_race,
)
from tests.kernels.cuda.races import Reads
from tests.kernels.cuda.static_races import (
    both_sets_race,
    crowd_race,
    held_pair,
    in_home,
    insert_beside_a_held_set,
)

RACING_READS = 50_000
STATIC = Policy.STATIC

in_both_memories = pytest.mark.parametrize("memory", MEMORIES)


@in_both_memories
def test_no_row_is_torn_foreign_or_old_beside_writers(memory: str) -> None:
    total = Reads()
    for schedule in MEMORIES[memory]:
        for seed in range(5):
            total += mixed_races(seed, 4, policy=STATIC, **schedule)
    assert total.n_hits >= RACING_READS


@in_both_memories
def test_a_reader_that_a_writer_overtakes_hands_its_key_on_as_a_miss(
    memory: str,
) -> None:
    for schedule in MEMORIES[memory]:
        total = Reads()
        for seed in range(8):
            total += update_race(seed, policy=STATIC, **schedule)
        assert total.n_hits > 0
        assert total.n_misses > 0, schedule  # none of these keys ever leaves


@in_both_memories
@pytest.mark.parametrize("writer", ["update", "evict", "clear"])
def test_backfills_of_rows_from_before_a_change_do_not_stay(
    memory: str, writer: str
) -> None:
    for schedule in MEMORIES[memory]:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(25):
            outcomes += backfill_race(seed, writer, policy=STATIC, **schedule)
        assert outcomes[Outcome.INSERTED] > 0
        assert outcomes[Outcome.STALE] > 0
        assert outcomes[Outcome.BUSY] == 0


@in_both_memories
def test_two_inserts_of_the_same_keys_leave_each_key_once(memory: str) -> None:
    for schedule in MEMORIES[memory]:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(25):
            outcomes += duplicate_race(seed, policy=STATIC, **schedule)
        assert outcomes[Outcome.REPLACED] > 0
        assert outcomes[Outcome.INSERTED] > 0


@in_both_memories
def test_warps_that_want_each_others_sets_all_get_them(memory: str) -> None:
    for schedule in MEMORIES[memory]:
        for seed in range(4):
            crowd_race(seed, **schedule)


@in_both_memories
def test_a_dump_tells_a_key_that_stays_once_and_one_that_moves_twice_at_most(
    memory: str,
) -> None:
    n_twice = 0
    for schedule in MEMORIES[memory]:
        n_twice += sum(both_sets_race(seed, **schedule) for seed in range(12))
    assert n_twice > 0


@in_both_memories
def test_lanes_agree_on_stamps_and_unique_keys_are_counted(memory: str) -> None:
    n_both = 0
    for schedule in MEMORIES[memory]:
        for seed in range(10):
            shared_stamp_race(seed, policy=STATIC, **schedule)
            n_both += counting_race(seed, policy=STATIC, **schedule)
    assert n_both > 0


@in_both_memories
@pytest.mark.parametrize("writer", ["update", "evict"])
def test_sums_are_of_whole_rows_that_existed(memory: str, writer: str) -> None:
    n_missed = 0
    for schedule in MEMORIES[memory]:
        for seed in range(2):
            n_missed += pooled_race(
                seed, dim=12, writer=writer, policy=STATIC, **schedule
            )
    assert n_missed > 0


@pytest.mark.parametrize("held", [0, 1])
def test_an_insert_that_gets_one_set_only_lets_it_go_and_writes_nothing(
    held: int,
) -> None:
    insert_beside_a_held_set(held)


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("writer", ["update", "evict"])
def test_a_writer_is_busy_where_the_key_may_be_in_the_set_that_stays_held(
    writer: str, held: int
) -> None:
    arena = held_pair(held)
    table = arena.cache.contents()
    # Home sets are asked first, so that their keys are found whatever the other does.
    in_free_home = in_home(arena, 1 - held)
    write = arena.update if writer == "update" else arena.evict
    outcomes = write(np.arange(40))
    free = Outcome.REPLACED if writer == "update" else Outcome.EVICTED
    assert (outcomes == free).tolist() == in_free_home.tolist()
    assert (outcomes == Outcome.BUSY).tolist() == (~in_free_home).tolist()
    arena.cache.meta()[held, 0] &= 0xFE
    left = np.flatnonzero(outcomes == Outcome.BUSY)
    assert set(write(left).tolist()) == {free}
    if writer == "update":
        assert set(arena.cache.contents()) == set(table)
    else:
        assert arena.cache.contents() == {}


def test_a_query_misses_what_is_behind_a_set_that_stays_held() -> None:
    arena = held_pair(0)
    arena.query(0, 300, arena.versions, stream=None, fill=True)
    (asked,) = arena.readers[0].asked
    missing = np.zeros(300, bool)
    missing[asked.answer.missing()[:, 0]] = True
    assert missing.tolist() == (~in_home(arena, 1)[asked.numbers]).tolist()
    arena.check_readers()
