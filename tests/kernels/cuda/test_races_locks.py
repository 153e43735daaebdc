"""Writers that crowd into one set, and writers that never get in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, Outcome
from tests.kernels.cuda.harness import dumped
from tests.kernels.cuda.race_scenarios import SCHEDULES
from tests.kernels.cuda.races import Arena
from tests.support.cpuexec import KernelError

CROWD = 200  # warps
CROWD_STEPS = 20_000_000  # switches between threads: a few times what it takes


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_crowd_of_writers_on_one_set_gets_through(schedule: dict[str, Any]) -> None:
    arena = Arena(1, n_sets=1, n_keys=CROWD)
    with arena.cache.launcher.together(1, max_steps=CROWD_STEPS, **schedule):
        outcomes = arena.insert(np.arange(CROWD), epoch=0, stream="insert")
    # A turn of a waiting warp takes as long here as one of the warp it waits for, so
    # that a few give up.
    busy = np.flatnonzero(outcomes == Outcome.BUSY)
    assert len(busy) < CROWD // 10
    arena.check_cache()
    outcomes[busy] = arena.insert(busy, epoch=0)
    counts = np.bincount(outcomes, minlength=len(Outcome))
    assert counts[Outcome.INSERTED] == WAYS
    assert counts[Outcome.EVICTED] == CROWD - WAYS
    arena.check_cache()
    assert arena.cache.total("evicted") == CROWD - WAYS


def odd_arena() -> tuple[Arena, bytes]:
    """Return a cache whose only set a writer has left held, and its bytes."""
    arena = Arena(2, n_sets=1, n_keys=20)
    arena.insert(np.arange(20), epoch=0)
    arena.cache.meta()[0, 0] |= 1
    return arena, arena.cache.block.tobytes()


@pytest.mark.parametrize("writer", ["insert", "update", "evict"])
def test_a_writer_gives_up_on_a_set_that_stays_held(writer: str) -> None:
    arena, before = odd_arena()
    one = np.array([3])
    if writer == "insert":
        outcome = arena.insert(one, epoch=arena.epoch)
    elif writer == "update":
        outcome = arena.update(one)
    else:
        outcome = arena.evict(one)
    assert outcome.tolist() == [Outcome.BUSY]
    assert arena.cache.block.tobytes() == before


def test_a_clear_names_the_sets_that_stay_held_and_raises_the_floor() -> None:
    arena, before = odd_arena()
    assert arena.clear().tolist() == [1]
    assert arena.cache.total("floor") == arena.epoch
    start = arena.cache.layout.offset("meta", 0)
    assert arena.cache.block.tobytes()[start:] == before[start:]
    assert arena.cache.total("size") == 20


def test_a_dump_leaves_out_a_set_that_stays_held_and_counts_it() -> None:
    arena, before = odd_arena()
    keys, n_busy = dumped(arena.cache.dump())
    assert len(keys) == 0
    assert n_busy == 1
    assert arena.cache.block.tobytes() == before


def test_a_query_misses_what_is_in_a_set_that_stays_held() -> None:
    arena, _ = odd_arena()
    arena.query(0, 100, arena.versions, stream=None, fill=True)
    total = arena.check_readers()
    assert total.n_misses == 100


def test_a_writer_that_comes_free_again_lets_others_in() -> None:
    arena, _ = odd_arena()
    arena.cache.meta()[0, 0] &= 0xFE
    settled = arena.update(np.arange(20))
    assert set(settled.tolist()) == {Outcome.REPLACED}
    arena.check_cache()


def test_a_workspace_is_ready_again_once_it_is_prepared_after_a_broken_query() -> None:
    arena = Arena(3, n_sets=2, n_keys=60)
    arena.insert(np.arange(40), epoch=0)
    work, block = arena.cache.workspace(500)
    with (
        pytest.raises(KernelError, match="step limit"),
        arena.cache.launcher.together(3, preempt=0.3, max_steps=900),
    ):
        arena.query(0, 500, arena.versions, stream=1, work=(work, block))
    arena.readers[0].asked.clear()
    block[...] = 0
    header = work.layout.header(work.base)
    block[: header.size] = header
    for _ in range(3):
        arena.query(0, 500, arena.versions, stream=1, work=(work, block))
        assert arena.check_readers().n_hits > 0


def test_two_queries_on_two_workspaces_do_not_mix() -> None:
    arena = Arena(4, n_sets=2, n_keys=90)
    arena.insert(np.arange(45), epoch=0)
    works = [arena.cache.workspace(300) for _ in range(2)]
    for seed in range(30):
        schedule = SCHEDULES[seed % len(SCHEDULES)]
        with arena.cache.launcher.together(seed, **schedule):
            for reader, work in enumerate(works):
                arena.query(reader, 300, arena.versions, stream=reader, work=work)
        total = arena.check_readers()
        assert total.n_hits > 0
        assert total.n_misses > 0
