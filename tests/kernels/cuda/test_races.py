"""Readers beside writers, in seeded interleavings of the compiled kernels."""

from __future__ import annotations

from collections import Counter

import pytest

from hps_numba.kernels.cuda.layout import Outcome
from tests.kernels.cuda.race_scenarios import (
    MEMORIES,
    backfill_race,
    counting_race,
    dump_race,
    duplicate_race,
    mixed_races,
    shared_stamp_race,
    update_race,
)
from tests.kernels.cuda.races import Reads

RACING_READS = 100_000


in_both_memories = pytest.mark.parametrize("memory", MEMORIES)


@in_both_memories
def test_no_row_is_torn_foreign_or_old_beside_writers(memory: str) -> None:
    total = Reads()
    for schedule in MEMORIES[memory]:
        for seed in range(7):
            total += mixed_races(seed, 4, **schedule)
    assert total.n_hits >= RACING_READS


@in_both_memories
def test_a_reader_that_a_writer_overtakes_hands_its_key_on_as_a_miss(
    memory: str,
) -> None:
    for schedule in MEMORIES[memory]:
        total = Reads()
        for seed in range(12):
            total += update_race(seed, **schedule)
        assert total.n_hits > 0
        assert total.n_misses > 0, schedule  # none of these keys ever leaves


@in_both_memories
@pytest.mark.parametrize("writer", ["update", "evict", "clear"])
def test_backfills_of_rows_from_before_a_change_do_not_stay(
    memory: str, writer: str
) -> None:
    for schedule in MEMORIES[memory]:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(50):
            outcomes += backfill_race(seed, writer, **schedule)
        # Some came before the change, and went with it; some came after.
        assert outcomes[Outcome.INSERTED] > 0
        assert outcomes[Outcome.STALE] > 0


@in_both_memories
def test_lanes_of_an_insert_agree_on_a_stamp_that_others_move(memory: str) -> None:
    for schedule in MEMORIES[memory]:
        for seed in range(30):
            shared_stamp_race(seed, **schedule)


@in_both_memories
def test_two_inserts_of_the_same_keys_leave_each_key_once(memory: str) -> None:
    for schedule in MEMORIES[memory]:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(40):
            outcomes += duplicate_race(seed, **schedule)
        assert outcomes[Outcome.REPLACED] > 0
        assert outcomes[Outcome.INSERTED] > 0
        assert outcomes[Outcome.EVICTED] > 0


@in_both_memories
def test_a_dump_tells_keys_that_a_set_had_at_one_instant(memory: str) -> None:
    n_between = 0
    for schedule in MEMORIES[memory]:
        n_between += sum(dump_race(seed, **schedule) for seed in range(40))
    assert n_between > 0


@in_both_memories
def test_a_key_that_hits_and_misses_in_one_launch_counts_as_both(memory: str) -> None:
    n_both = 0
    for schedule in MEMORIES[memory]:
        n_both += sum(counting_race(seed, **schedule) for seed in range(20))
    assert n_both > 0
