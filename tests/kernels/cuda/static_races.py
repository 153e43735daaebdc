"""Races of static tables, whose keys have two sets each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy
from tests.kernels.cuda.harness import Array, dumped
from tests.kernels.cuda.hashes import set_of
from tests.kernels.cuda.race_scenarios import A_SET, settle
from tests.kernels.cuda.races import Arena

CROWD_STEPS = 6_000_000  # switches between threads: a few times what a crowd takes


def crowd_race(seed: int, **schedule: Any) -> None:
    """Insert more keys than there are ways at once, into two sets or three.

    No two warps wait for each other, so that all of them get their sets.
    """
    n_sets = 2 + seed % 2
    n_keys = n_sets * WAYS + 8
    arena = Arena(seed, n_sets=n_sets, n_keys=n_keys, policy=Policy.STATIC)
    halves = np.array_split(arena.rng.permutation(n_keys), 2)
    limit = {"max_steps": CROWD_STEPS}
    with arena.cache.launcher.together(seed, **schedule, **limit):
        found = [
            arena.insert(half, epoch=0, stream=stream)
            for stream, half in enumerate(halves)
        ]
    outcomes = np.concatenate(found)
    settle(outcomes, {Outcome.INSERTED, Outcome.FULL})
    arena.check_cache()
    # Who finds both sets full: with two sets, all that are too many.
    n_placed = int((outcomes == Outcome.INSERTED).sum())
    assert len(arena.cache.contents()) == n_placed
    if n_sets == 2:
        assert n_placed == n_sets * WAYS


def both_sets_race(seed: int, **schedule: Any) -> int:
    """Dump beside a writer that evicts some keys and brings them back, twice.

    Keys that stay are told once; others once or not at all, or twice where they came
    back to their other set. Returns how many were told twice.
    """
    n_sets = 2 + seed % 3
    n_keys = A_SET * n_sets
    arena = Arena(seed, n_sets=n_sets, n_keys=n_keys, policy=Policy.STATIC)
    arena.insert(np.arange(n_keys), epoch=0)
    moving = arena.some(3 * n_sets)
    staying = set(np.delete(arena.keys, moving).tolist())
    with arena.cache.launcher.together(seed, **schedule):
        snapshots = [arena.cache.dump(stream=f"dump {i % 2}") for i in range(8)]
        for part in np.array_split(arena.rng.permutation(moving), 3):
            gone = arena.evict(part, stream="writer")
            # Room in another set than before, for some.
            back = arena.insert(
                arena.rng.permutation(part), epoch=arena.epoch, stream="writer"
            )
    settle(gone, {Outcome.EVICTED})
    settle(back, {Outcome.INSERTED})
    n_twice = 0
    for snapshot in snapshots:
        keys, n_busy = dumped(snapshot)
        assert n_busy == 0
        times = Counter(keys.tolist())
        assert {key for key, n in times.items() if n == 1} >= staying
        assert set(times) <= set(arena.keys.tolist())
        assert max(times.values()) <= 2
        n_twice += len(keys) - len(times)
    arena.check_cache()
    assert len(arena.cache.contents()) == n_keys
    return n_twice


def held_pair(held: int) -> Arena:
    """Return a static table of two sets, one of which a writer has left held."""
    arena = Arena(2, n_sets=2, n_keys=40, policy=Policy.STATIC)
    arena.insert(np.arange(40), epoch=0)
    arena.cache.meta()[held, 0] |= 1
    return arena


def insert_beside_a_held_set(held: int) -> None:
    """Insert where one of two sets is not to be had: the other is let go unchanged."""
    arena = held_pair(held)
    before = arena.cache.block.tobytes()
    outcomes = arena.insert(np.array([3, 4]), epoch=arena.epoch)
    assert outcomes.tolist() == [Outcome.BUSY] * 2
    assert arena.cache.block.tobytes() == before
    arena.cache.meta()[held, 0] &= 0xFE
    settled = arena.insert(np.arange(40), epoch=arena.epoch)
    assert set(settled.tolist()) == {Outcome.REPLACED}
    arena.check_cache()


def in_home(arena: Arena, n_set: int) -> Array:
    """Return which keys, by number, lie in this set and have it as their home."""
    held = arena.cache.stored_keys()[n_set][arena.cache.digests()[n_set] != 0]
    n_sets = len(arena.cache.seqs())
    return np.array(
        [set_of(key, n_sets) == n_set and key in held for key in arena.keys.tolist()]
    )
