"""Races and launches in a very weak memory; each check takes seconds and has seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.harness import CpuCache, dumped
from tests.kernels.cuda.pooled_races import pooled_race
from tests.kernels.cuda.race_scenarios import (
    backfill_race,
    duplicate_race,
    mixed_races,
    update_race,
)
from tests.kernels.cuda.races import Reads, numbered_keys

# Chances of an old value. With small ones the lanes of a warp mostly agree.
WEAK_SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "uniform", "preempt": 0.1, "weak": 0.9},
    {"schedule": "priority", "preempt": 0.1, "weak": 0.9},
    {"schedule": "uniform", "preempt": 0.02, "weak": 0.05},
    {"schedule": "priority", "preempt": 0.4, "weak": 0.05},
]


def _over_seeds(n_seeds: int, race: Callable[..., Any], **given: Any) -> None:
    for seed in range(n_seeds):
        race(seed, **given, **WEAK_SCHEDULES[seed % len(WEAK_SCHEDULES)])


def mixed_reads() -> Reads:
    """Race readers with all kinds of writers; return what they saw."""
    total = Reads()
    for seed in range(10):
        total += mixed_races(seed, 2, **WEAK_SCHEDULES[seed % len(WEAK_SCHEDULES)])
    return total


def updates() -> None:
    _over_seeds(24, update_race)


def backfills() -> None:
    for writer in ("update", "evict", "clear"):
        _over_seeds(12, backfill_race, writer=writer)


def duplicates() -> None:
    _over_seeds(12, duplicate_race)


def pooled_updates() -> None:
    _over_seeds(4, pooled_race, dim=12, writer="update")


def pairs() -> None:
    """What static tables add: two sets to look into, and two to hold."""
    _over_seeds(12, update_race, policy=Policy.STATIC)
    for writer in ("update", "evict", "clear"):
        _over_seeds(12, backfill_race, writer=writer, policy=Policy.STATIC)
    _over_seeds(12, duplicate_race, policy=Policy.STATIC)
    _over_seeds(4, mixed_races, turns=2, policy=Policy.STATIC)


def first_dumps() -> None:
    _over_seeds(400, _dump_while_filling)


def _dump_while_filling(seed: int, **schedule: Any) -> None:
    """Dump a set, empty at first, beside inserts, which take its ways in order."""
    cache = CpuCache(RowLayout(4), [TableLayout(1, n_stamps=64)])
    keys, rows = numbered_keys(20, seed), np.zeros((10, 4), np.float32)
    with cache.launcher.together(seed, **schedule):
        outcomes = [
            cache.insert(part, rows, stream=stream)[0]
            for stream, part in enumerate(np.split(keys, 2))
        ]
        snapshots = [cache.dump(stream=f"dump {i % 2}") for i in range(8)]
    assert set(np.concatenate(outcomes).tolist()) == {int(Outcome.INSERTED)}
    in_order = cache.stored_keys()[0][: len(keys)].tolist()
    assert sorted(in_order) == sorted(keys.tolist())
    states = [set(in_order[:n]) for n in range(len(keys) + 1)]
    for snapshot in snapshots:
        found, n_busy = dumped(snapshot)
        assert n_busy == 0
        assert len(set(found.tolist())) == len(found)
        assert set(found.tolist()) in states, "keys of two instants, or of none"


def whole_dumps() -> None:
    _over_seeds(40, _dump_many_sets)


def _dump_many_sets(seed: int, **schedule: Any) -> None:
    """Dump a table that is too large for one block, with nobody beside."""
    cache = CpuCache(RowLayout(4), [TableLayout(20, n_stamps=64)])
    keys = numbered_keys(150, seed)
    cache.insert(keys, np.zeros((len(keys), 4), np.float32))
    with cache.launcher.together(seed, **schedule):
        snapshot = cache.dump()
    found, n_busy = dumped(snapshot)
    assert n_busy == 0
    assert sorted(found.tolist()) == sorted(cache.contents())


def launch_ends() -> None:
    _over_seeds(16, _query_two_tables)


def _query_two_tables(seed: int, **schedule: Any) -> None:
    """Query two tables of several blocks each, three times in one workspace."""
    rng = np.random.default_rng(seed)
    tables = [TableLayout(n_sets, n_stamps=64, tick_shift=5) for n_sets in (2, 3)]
    cache = CpuCache(RowLayout(4), tables)
    keys = numbered_keys(90, seed)
    for table in range(2):
        cache.insert(keys[:40], np.ones((40, 4), np.float32), table=table)
    held = [set(cache.contents(table)) for table in range(2)]
    asked = [[rng.choice(keys, n) for n in (200, 300)] for _ in range(3)]
    work = cache.workspace(500, 2)
    with cache.launcher.together(seed, **schedule):
        answers = [
            cache.query(parts, work=work, stream="reader", count_unique=True)
            for parts in asked
        ]
    for table in range(2):
        given = asked[-1][table]
        missing = [key for key in given.tolist() if key not in held[table]]
        n_hits = len(given) - len(missing)
        n_unique_hits = len(set(given.tolist()) & held[table])
        results = [len(missing), len(set(missing)), n_hits, n_unique_hits]
        assert answers[-1].results(table) == results
        assert sorted(answers[-1].unique(table).tolist()) == sorted(set(missing))
        unique = answers[-1].unique(table)[answers[-1].numbers(table)]
        flat = np.concatenate(asked[-1])
        assert (unique == flat[answers[-1].missing(table)[:, 0]]).all()
        clock = sum(min(len(parts[table]), 32) for parts in asked)
        assert cache.total("clock", table) == clock
