"""Races that tests run over many seeds, and that planted bugs have to lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import WAYS, Outcome, Policy
from hps_numba.kernels.host.hashing import hash_key
from tests.kernels.cuda.harness import Array, dumped
from tests.kernels.cuda.races import Arena, Reads, hits_of, rows_of

# A warp that is held up for long, and warps that take turns at every few accesses.
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": schedule, "preempt": preempt}
    for schedule in ("uniform", "priority")
    for preempt in (0.02, 0.1, 0.4)
]
# Loads may return older values wherever PTX allows it.
WEAK_SCHEDULES = [
    {**schedule, "weak": weak}
    for schedule, weak in zip(SCHEDULES, (0.5, 0.1, 0.5, 0.1, 0.5, 0.1), strict=True)
]
MEMORIES = {"strong memory": SCHEDULES, "weak memory": WEAK_SCHEDULES}
_WRITES = {Outcome.REPLACED, Outcome.INSERTED, Outcome.EVICTED, Outcome.STALE}
# Keys of a static table to a set: few enough for all of them to have a place, and so
# many that some have it in their second set.
A_SET = 25


def settle(outcomes: Array, allowed: set[Outcome]) -> None:
    """Fail if a key had another outcome than one of ``allowed``."""
    found = {Outcome(one) for one in outcomes.tolist()}
    assert found <= allowed, f"outcomes {found - allowed}"


def mixed_race(arena: Arena, seed: int, **schedule: Any) -> Reads:
    """Race updates, evictions, a clear, inserts, a dump and readers once.

    The inserts bring rows of before the update, and more come in beside them as soon as
    it is through. Afterwards none of the old rows is there, whoever came first.
    """
    before, epoch = arena.versions.copy(), arena.epoch
    changed, outcomes = arena.some(6), []
    with arena.cache.launcher.together(seed, **schedule):
        for turn in range(4):
            for reader in range(2):
                fill = (turn + seed) % 2 == 0
                stream = f"reader {reader}"
                arena.query(reader, 256, before, stream=stream, fill=fill)
        for stream in ("insert 1", "insert 2"):
            old = arena.insert(
                arena.some(6), epoch=epoch, stream=stream, versions=before
            )
            outcomes.append(old)
        arena.update(changed, stream="update")
        arena.query(2, 96, arena.versions, stream="update")
        new = arena.insert(changed[:4], epoch=arena.epoch, stream="update")
        outcomes.append(new)
        if seed % 3 == 0:
            arena.evict(arena.some(6), stream="update")
        if seed % 7 == 0:
            arena.clear(stream="update")
        snapshot = arena.cache.dump(stream="dump")
    static = arena.policy == Policy.STATIC
    for one in outcomes:
        settle(one, _WRITES | {Outcome.FULL} if static else _WRITES)
    keys, n_busy = dumped(snapshot)
    assert len(keys) <= WAYS * len(arena.cache.seqs())
    # A key that goes and comes again meanwhile may have been in one set, then another.
    assert max(Counter(keys.tolist()).values(), default=1) <= (2 if static else 1)
    assert set(keys.tolist()) <= set(arena.keys.tolist())
    assert n_busy == 0
    total = arena.check_readers()
    arena.check_cache()
    return total


def mixed_races(
    seed: int, turns: int, *, policy: Policy = Policy.LRU, **schedule: Any
) -> Reads:
    """Race for some turns in one small table, filled again before each of them."""
    n_sets, dim = 1 + seed % 3, (12, 5)[seed % 2]
    arena = Arena(seed, n_sets=n_sets, n_keys=32 * n_sets, dim=dim, policy=policy)
    total = Reads()
    for turn in range(turns):
        arena.insert(arena.some(200), epoch=arena.epoch)
        total += mixed_race(arena, 100 * seed + turn, **schedule)
    return total


def update_race(seed: int, *, policy: Policy = Policy.LRU, **schedule: Any) -> Reads:
    """Race updates with readers of keys that never leave: a miss is handed on."""
    n_sets, dim = 1 + seed % 3, (12, 40)[seed % 2]
    n_keys = A_SET * n_sets if policy == Policy.STATIC else 4 + 10 * n_sets
    arena = Arena(seed, n_sets=n_sets, n_keys=n_keys, dim=dim, policy=policy)
    arena.insert(np.arange(n_keys), epoch=0)
    with arena.cache.launcher.together(seed, **schedule):
        before = arena.versions.copy()
        for _ in range(3):
            for reader in range(2):
                arena.query(reader, 256, before, stream=f"reader {reader}")
        for _ in range(3):
            settle_later = arena.update(arena.some(4), stream="update")
            arena.query(2, 64, arena.versions, stream="update")
    settle(settle_later, {Outcome.REPLACED})
    total = arena.check_readers()
    arena.check_cache()
    assert arena.cache.total("size") == n_keys
    assert arena.cache.total("updated") == 12
    return total


def backfill_race(
    seed: int, writer: str, *, policy: Policy = Policy.LRU, **schedule: Any
) -> Counter[Outcome]:
    """Race old backfills of a few keys with one ``writer``; return their outcomes.

    Lookups have missed, and have read rows of epoch 0 from below: old ones, and beside
    an update new ones too, since rows change below before the epoch does. Whatever the
    interleaving, no old row is there when the writer and the backfills are done. In a
    static table others are there all the time, so that some keys go to second sets.
    """
    n_sets = 2 + seed % 2 if policy == Policy.STATIC else 1
    n_keys = A_SET * n_sets if policy == Policy.STATIC else 6
    arena = Arena(
        seed, n_sets=n_sets, n_keys=n_keys, n_stamps=(1, 64)[seed % 2], policy=policy
    )
    arena.insert(np.arange(6, n_keys), epoch=0)
    others = set(arena.keys[6:].tolist())
    assert set(arena.cache.contents()) == others
    old, numbers = arena.versions.copy(), np.arange(6)
    fetched = [old, old + 1 if writer == "update" and seed // 2 % 2 else old]
    with arena.cache.launcher.together(seed, **schedule):
        backfills = [
            arena.insert(numbers, epoch=0, stream=f"backfill {i}", versions=versions)
            for i, versions in enumerate(fetched)
        ]
        arena.query(0, 64, old, stream="reader")
        if seed % 3:  # what comes first is not always the writer
            arena.query(2, 32, old, stream="writer")
        if writer == "update":
            arena.update(numbers, stream="writer")
        elif writer == "evict":
            arena.evict(numbers, stream="writer")
        else:
            arena.clear(stream="writer")
        arena.query(1, 64, arena.versions, stream="writer")
    arena.check_readers()
    arena.check_cache()
    if writer in ("evict", "clear"):
        left = others if writer == "evict" else set()
        assert set(arena.cache.contents()) == left
    late = arena.insert(numbers, epoch=0, versions=old)
    settle(late, {Outcome.STALE})
    return Counter(Outcome(one) for one in np.concatenate(backfills).tolist())


def shared_stamp_race(
    seed: int, *, policy: Policy = Policy.LRU, **schedule: Any
) -> None:
    """Insert keys while others are evicted that share their stamp.

    Each insert comes before an eviction or after it: all its lanes take one way.
    """
    arena = Arena(seed, n_sets=16, n_keys=36, n_stamps=1, policy=policy)
    numbers, outcomes = np.arange(36), []
    with arena.cache.launcher.together(seed, **schedule):
        for i in range(6):
            new = numbers[4 * i : 4 * i + 4]
            outcomes.append(arena.insert(new, epoch=i, stream=f"backfill {i % 2}"))
            arena.evict(numbers[24 + 2 * i : 26 + 2 * i], stream="writer")
    found = np.concatenate(outcomes)
    settle(found, {Outcome.INSERTED, Outcome.STALE})
    arena.check_cache()
    left = set(arena.keys[:24][found == Outcome.INSERTED].tolist())
    assert set(arena.cache.contents()) == left


def duplicate_race(
    seed: int, *, policy: Policy | None = None, **schedule: Any
) -> Counter[Outcome]:
    """Insert the same keys twice at once into sets that are nearly full."""
    static = policy == Policy.STATIC
    n_sets = 1 + seed % 2 + static
    policy = policy or (Policy.LRU, Policy.LFU)[seed % 2]
    arena = Arena(seed, n_sets=n_sets, n_keys=80, policy=policy)
    arena.insert(arena.some((23 if static else 20) * n_sets), epoch=0)
    start, numbers = arena.cache.total("size"), arena.some(12)
    with arena.cache.launcher.together(seed, **schedule):
        both = [arena.insert(numbers, epoch=0, stream=stream) for stream in range(2)]
    arena.check_cache()
    outcomes = np.concatenate(both)
    kept_out = Outcome.FULL if static else Outcome.EVICTED
    settle(outcomes, {Outcome.REPLACED, Outcome.INSERTED, kept_out})
    counts = Counter(Outcome(one) for one in outcomes.tolist())
    grown = arena.cache.total("size") - start
    assert counts[Outcome.INSERTED] == grown
    return counts


def counting_race(seed: int, *, policy: Policy = Policy.LRU, **schedule: Any) -> int:
    """Insert keys while a query counts its unique hits and misses.

    Occurrences of a key may hit and miss in one launch; it then counts as both. Returns
    how many keys did.
    """
    arena = Arena(seed, n_sets=2, n_keys=24, policy=policy)
    with arena.cache.launcher.together(seed, **schedule):
        arena.query(0, 200, arena.versions, stream="reader", count_unique=True)
        arena.insert(np.arange(24), epoch=0, stream="writer")
    (asked,) = arena.readers[0].asked
    hit, numbers = hits_of(asked), asked.numbers
    missed, found = set(numbers[~hit].tolist()), set(numbers[hit].tolist())
    results = asked.answer.results()
    assert results[1] == len(missed)
    assert results[3] == len(found)
    return len(missed & found)


@dataclass(frozen=True)
class Step:
    """One change of every set by one launch, and what became of it."""

    what: str
    numbers: Array  # one key of each set, or none for a clear
    outcomes: Array
    gone: Array | None = None

    def after(self, states: list[set[int]], keys: Array) -> list[set[int]]:
        """Return the keys of each set after this step."""
        if self.what == "clear":
            return [set() for _ in states]
        states = [set(state) for state in states]
        for i, (state, key) in enumerate(zip(states, keys[self.numbers], strict=True)):
            if self.outcomes[i] == Outcome.EVICTED:
                state.discard(int(key if self.gone is None else self.gone[i]))
            if self.what == "insert":
                state.add(int(key))
        return states


def change_sets(arena: Arena, what: str, numbers: Array) -> Step:
    """Launch one change of every set on the stream "writer"."""
    if what == "clear":
        return Step(what, numbers, arena.clear(stream="writer"))
    if what == "evict":
        return Step(what, numbers, arena.evict(numbers, stream="writer"))
    rows = rows_of(numbers, arena.versions[numbers], arena.dim)
    keys, epoch = arena.keys[numbers], arena.epoch
    both = arena.cache.insert(keys, rows, epoch=epoch, stream="writer")
    return Step(what, numbers, *both)


def dump_race(seed: int, **schedule: Any) -> int:
    """Dump beside a writer that changes one key of each set at a time, and clears.

    Each step's outcomes tell which keys a set had after it. What a dump says of a set
    must be one of these states. Returns how many dumps fell between the first and the
    last one.
    """
    arena = Arena(seed, n_sets=8, n_keys=450)
    home = np.array([int(hash_key(key)) * 8 >> 64 for key in arena.keys])
    columns = np.stack([np.flatnonzero(home == i)[: WAYS + 4] for i in range(8)], 1)
    n_first = WAYS if seed % 2 else 5
    arena.insert(columns[:n_first].ravel(), epoch=0)
    states = [[set(arena.keys[columns[:n_first, i]].tolist()) for i in range(8)]]
    plan = [("insert", j) for j in range(WAYS, WAYS + 4)]
    plan += [("evict", j) for j in range(6)]
    if seed % 2 == 0:
        refill = [("insert", j) for j in range(4)]
        plan = [("clear", 0), *refill, ("clear", 0), *refill, ("clear", 0)]
    snapshots = []
    with arena.cache.launcher.together(seed, **schedule):
        for i in range(40):
            first = 4 * (i // 2 % 2)
            dump = arena.cache.dump(first, 4, stream=f"dump {i % 2}")
            snapshots.append((first, dump))
        steps = [change_sets(arena, what, columns[j]) for what, j in plan]
    for step in steps:
        states.append(step.after(states[-1], arena.keys))
    assert set().union(*states[-1]) == set(arena.cache.contents())
    number_of = {int(key): i for i, key in enumerate(arena.keys)}
    return sum(
        _in_between(first, dump, states, lambda key: int(home[number_of[key]]))
        for first, dump in snapshots
    )


def _in_between(
    first: int, dump: Any, states: list[list[set[int]]], home: Callable[[int], int]
) -> int:
    """Return how many sets a dump saw between the first and the last state."""
    keys, n_busy = dumped(dump)
    assert n_busy == 0
    assert len(set(keys.tolist())) == len(keys)
    seen: list[set[int]] = [set() for _ in states[0]]
    for key in keys.tolist():
        seen[home(key)].add(key)
    n_between = 0
    for i, one in enumerate(seen):
        known = [state[i] for state in states] if first <= i < first + 4 else [set()]
        assert one in known, "keys of two instants"
        n_between += one not in (known[0], known[-1])
    return n_between
