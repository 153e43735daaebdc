"""Readers beside writers, in seeded interleavings of the compiled kernels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.cuda.races import Arena, Reads, mixed_race

SCHEDULES: list[dict[str, Any]] = [
    {"schedule": schedule, "preempt": preempt}
    for schedule in ("uniform", "priority")
    for preempt in (0.02, 0.1, 0.4)
]


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_no_row_is_torn_foreign_or_old_beside_writers(
    schedule: dict[str, Any], hold: bool
) -> None:
    total = Reads()
    for seed in range(8):
        arena = Arena(seed, n_sets=1 + seed % 3, n_keys=20 + 26 * (seed % 3 + 1))
        for turn in range(6):
            arena.insert(arena.some(200), epoch=arena.epoch)
            total += mixed_race(arena, 100 * seed + turn, hold=hold, **schedule)
    assert total.n_hits >= 8 * 6 * 25


def test_lanes_agree_on_a_stamp_that_changes_under_an_insert() -> None:
    for seed in range(20):
        arena = Arena(seed, n_sets=3, n_keys=60)
        arena.cache = type(arena.cache)(
            arena.cache.layout.rows,
            [type(arena.cache.layout.tables[0])(3, n_stamps=1)],
        )
        arena.insert(arena.some(60), epoch=0)
        before, epoch = arena.versions.copy(), arena.epoch
        with arena.cache.launcher.together(seed, preempt=0.3):
            arena.update(arena.some(20), stream="update")
            arena.insert(arena.some(20), epoch=epoch, stream=1, versions=before)
            arena.epoch += 1
            arena.cache.clear(epoch=arena.epoch, stream="update")
        arena.check_cache()
