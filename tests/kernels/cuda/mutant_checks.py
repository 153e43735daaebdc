"""What planted bugs have to survive; each passes in seconds on what is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.dump import dump_kernel
from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.checked_pooling import pooled_query
from tests.kernels.cuda.harness import dumped
from tests.kernels.cuda.pooled_races import pooled_race
from tests.kernels.cuda.protocol import Flow, check_dump
from tests.kernels.cuda.race_scenarios import (
    SCHEDULES,
    backfill_race,
    counting_race,
    dump_race,
    duplicate_race,
    mixed_races,
    shared_stamp_race,
    update_race,
)
from tests.kernels.cuda.races import EDGES, MAX_STEPS
from tests.kernels.cuda.sequences import TABLES, RandomOperations, rows_for
from tests.kernels.cuda.static_races import crowd_race, insert_beside_a_held_set


def _in_all(n_seeds: int, race: Callable[..., Any], **given: Any) -> None:
    for seed in range(n_seeds):
        for schedule in SCHEDULES:
            race(seed, **given, **schedule)


def readers_beside_writers() -> None:
    _in_all(3, mixed_races, turns=3)


def readers_beside_updates() -> None:
    _in_all(40, update_race)


def readers_beside_updates_that_are_held_up() -> None:
    """What takes a warp that stands still at one of a few places."""
    for seed in range(150):
        for schedule in SCHEDULES:
            if schedule["schedule"] == "priority":
                update_race(seed, **schedule)


def backfills() -> None:
    for writer in ("update", "evict", "clear"):
        _in_all(20, backfill_race, writer=writer)


def shared_stamps() -> None:
    _in_all(30, shared_stamp_race)


def duplicates() -> None:
    _in_all(20, duplicate_race)


def dumps() -> None:
    _in_all(30, dump_race)


def pairs_beside_writers() -> None:
    _in_all(3, mixed_races, turns=3, policy=Policy.STATIC)


def backfills_of_pairs() -> None:
    for writer in ("update", "evict", "clear"):
        _in_all(20, backfill_race, writer=writer, policy=Policy.STATIC)


def duplicates_of_pairs() -> None:
    _in_all(20, duplicate_race, policy=Policy.STATIC)


def crowds_of_pairs() -> None:
    _in_all(2, crowd_race)


def held_pairs() -> None:
    for held in range(2):
        insert_beside_a_held_set(held)


def pooled_beside_updates() -> None:
    _in_all(2, pooled_race, dim=12, writer="update")


def protocol_of_a_dump() -> None:
    check_dump(Flow.of(dump_kernel()))


def operations() -> None:
    _operations(RowLayout(12), Policy.LRU)


def operations_by_use() -> None:
    _operations(RowLayout(12), Policy.LFU)


def operations_of_halves() -> None:
    _operations(RowLayout(7, "float16"), Policy.STATIC)


def operations_of_pairs() -> None:
    _operations(RowLayout(12), Policy.STATIC)


def _operations(rows: RowLayout, policy: Policy) -> None:
    for seed in range(2):
        cache = CheckedCache(rows, TABLES, policy, max_steps=MAX_STEPS)
        RandomOperations(cache, seed).run(2000)


def edges() -> None:
    """Each of the keys that others keep for themselves, twice."""
    cache = CheckedCache(RowLayout(12))
    keys = np.array(EDGES, np.int64)
    for seed in range(2):
        cache.insert(keys, rows_for(cache, len(keys), seed=seed))
        cache.query(keys)


def doorkeeper() -> None:
    """Two keys that come again and again to a set that is full."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1, n_door=1024)])
    cache.insert(np.arange(WAYS), rows_for(cache, WAYS, seed=0))
    seen = []
    for seed in range(2):
        rows = rows_for(cache, 2, seed=seed)
        seen += cache.insert(np.array([100, 101]), rows, admit=True)
    assert seen == [Outcome.TURNED_AWAY] * 2 + [Outcome.EVICTED] * 2


def last_way() -> None:
    """The least of a full set is in its last way."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1)], Policy.LFU)
    cache.insert(np.arange(WAYS), rows_for(cache, WAYS, seed=0))
    cache.oracle.tables[0].sets[0].scores = [9] * (WAYS - 1) + [2]
    cache.restore(0, [0])
    cache.insert(np.array([100]), rows_for(cache, 1, seed=1))


def no_room() -> None:
    """Rows that push nobody out, into a set that they fill and into a full one."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1)])
    for first, wanted in ((0, Outcome.INSERTED), (100, Outcome.FULL)):
        keys = np.arange(first, first + WAYS)
        rows = rows_for(cache, WAYS, seed=first)
        assert set(cache.insert(keys, rows, make_room=False)) == {wanted}


def halving() -> None:
    """More writes to a full set than lie between two halvings."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1)], Policy.LFU)
    for first in range(0, 160, 4):
        keys = np.arange(first, first + 4)
        cache.insert(keys, rows_for(cache, 4, seed=first))
        cache.query(keys)


def small_batches() -> None:
    """The same few keys of three tables, in a workspace that they fill."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1)] * 3)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        keys = rng.integers(0, 1 << 40, 2 + seed % 3)
        work = cache.cpu.workspace(3 * len(keys), 3)
        cache.query(keys, keys, keys, work=work)


def claims_of_earlier_launches() -> None:
    """As many keys as there are claims, and then one twice at places of its own."""
    cache = CheckedCache(RowLayout(12), [TableLayout(1)] * 2)
    work = cache.cpu.workspace(64, 2)
    rng = np.random.default_rng(0)
    for _ in range(4):
        cache.query(rng.integers(0, 1 << 40, 60), work=work)
    cache.query(np.arange(60), np.array([7, 7, 8, 7]), work=work)


def dumps_again() -> None:
    cache = CheckedCache(RowLayout(12))
    cache.insert(np.arange(20), np.zeros((20, 12), np.float32))
    keys, counts = cache.cpu.dump()
    for _ in range(2):
        cache.cpu.cache.dump(
            0,
            0,
            2,
            keys=cache.memory.address(keys),
            counts=cache.memory.address(counts),
        )
        assert sorted(dumped((keys, counts))[0].tolist()) == list(range(20))


def readers_that_count_beside_inserts() -> None:
    _in_all(40, counting_race)


def bags_beside_nan() -> None:
    """A miss reads the default row, which may be NaN, and adds nothing of it."""
    cache = CheckedCache(RowLayout(12))
    cache.set_default(0, np.full(12, np.nan, np.float32))
    cache.insert(np.arange(20), np.ones((20, 12), np.float32))
    pooled_query(cache, [list(range(25)), [30]])
