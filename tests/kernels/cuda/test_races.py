"""Readers beside writers, in seeded interleavings of the compiled kernels."""

from __future__ import annotations

from collections import Counter

import pytest

from hps_numba.kernels.cuda.layout import Outcome
from tests.kernels.cuda.race_scenarios import (
    SCHEDULES,
    backfill_race,
    dump_race,
    duplicate_race,
    mixed_races,
    update_race,
)
from tests.kernels.cuda.races import Reads

RACING_READS = 100_000


def test_no_row_is_torn_foreign_or_old_beside_writers() -> None:
    total = Reads()
    for schedule in SCHEDULES:
        for seed in range(24):
            total += mixed_races(seed, 4, **schedule)
    assert total.n_hits >= RACING_READS


def test_a_reader_that_a_writer_overtakes_hands_its_key_on_as_a_miss() -> None:
    for schedule in SCHEDULES:
        total = Reads()
        for seed in range(12):
            total += update_race(seed, **schedule)
        assert total.n_hits > 0
        assert total.n_misses > 0, schedule  # none of these keys ever leaves


@pytest.mark.parametrize("writer", ["update", "evict", "clear"])
def test_backfills_of_rows_from_before_a_change_do_not_stay(writer: str) -> None:
    for schedule in SCHEDULES:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(100):
            outcomes += backfill_race(seed, writer, **schedule)
        # Some came before the change, and went with it; some came after.
        assert outcomes[Outcome.INSERTED] > 0
        assert outcomes[Outcome.STALE] > 0


def test_no_backfill_passes_a_held_key() -> None:
    for schedule in SCHEDULES:
        for seed in range(100):
            outcomes = backfill_race(seed, "held update", **schedule)
            assert set(outcomes) == {Outcome.STALE}


def test_two_inserts_of_the_same_keys_leave_each_key_once() -> None:
    for schedule in SCHEDULES:
        outcomes: Counter[Outcome] = Counter()
        for seed in range(60):
            outcomes += duplicate_race(seed, **schedule)
        assert outcomes[Outcome.REPLACED] > 0
        assert outcomes[Outcome.INSERTED] > 0
        assert outcomes[Outcome.EVICTED] > 0


def test_a_dump_tells_keys_that_a_set_had_at_one_instant() -> None:
    for schedule in SCHEDULES:
        assert sum(dump_race(seed, **schedule) for seed in range(60)) > 0, schedule
