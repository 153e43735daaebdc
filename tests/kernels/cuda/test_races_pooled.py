"""Pooled queries beside writers, in seeded interleavings of the compiled kernels."""

from __future__ import annotations

import pytest

from tests.kernels.cuda.pooled_races import pooled_race
from tests.kernels.cuda.race_scenarios import MEMORIES


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("writer", ["update", "evict"])
def test_sums_beside_a_writer_are_of_whole_rows(memory: str, writer: str) -> None:
    for schedule in MEMORIES[memory]:
        n_missed = sum(
            pooled_race(seed, dim=(12, 5)[seed % 2], writer=writer, **schedule)
            for seed in range(6)
        )
        assert n_missed > 0, schedule  # keys whose sets were written to meanwhile
