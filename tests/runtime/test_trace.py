"""What an observer is told of the tiers, and that chunks are in two of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, Keys, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier, UpperTier
from tests.support.gates import StopPoints
from tests.support.wrappers import FailingTier, GatedTier

SPEC = TableSpec("model", "table", 4)
CHUNK_KEYS = 30
N_CHUNKS = 5
KEYS = np.arange(N_CHUNKS * CHUNK_KEYS, dtype=np.int64)

Event = tuple[str, int, float, float]


class World:
    """Host memory with key 0 and every tenth, a tier with even keys, one with all."""

    def __init__(self, mode: FailureMode, executor: ThreadPoolExecutor) -> None:
        self.stops = StopPoints()
        self.seen: list[Event] = []
        self.upper = FailingTier(self._tier(UpperTier, KEYS[::2]))
        tiers = [
            self._tier(HostTier, KEYS[::10]),
            GatedTier(self.upper, self.stops),
            GatedTier(self._tier(LowerTier, KEYS), self.stops),
        ]
        self.table = Hierarchy(
            SPEC, tiers, backfills=None, on_failure=mode, write_rows=64
        )
        self.pipeline = Pipeline(executor, lambda *event: self.seen.append(event))

    def look_up(self, keys: Keys = KEYS) -> list[Chunk]:
        chunks = [
            Chunk(
                part,
                np.zeros((part.size, SPEC.dim), np.float32),
                np.zeros(part.size, np.bool_),
            )
            for part in np.array_split(keys, max(keys.size // CHUNK_KEYS, 1))
        ]
        self.pipeline.run([(self.table, chunk) for chunk in chunks])
        return chunks

    def of(self, stage: str, number: int | None = None) -> list[Event]:
        return [
            event
            for event in self.seen
            if event[0] == stage and number in (None, event[1])
        ]

    def _tier(self, make: Callable[[], Tier], keys: Keys) -> Tier:
        tier = make()
        tier.open_table(SPEC)
        some = keys.copy()
        tier.insert(SPEC.tag, some, versioned_rows(some, 1, SPEC.dim))
        return tier


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture
def world(executor: ThreadPoolExecutor) -> World:
    return World(FailureMode.RAISE, executor)


def overlap(a: Event, b: Event) -> bool:
    return a[2] < b[3] and b[2] < a[3]


def test_a_trace_has_every_tier_of_every_chunk(world: World) -> None:
    chunks = world.look_up()
    assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)
    for stage in ("local", "remote", "host", "upper", "lower"):
        assert sorted(n for _, n, _, _ in world.of(stage)) == list(range(N_CHUNKS))


def test_tiers_are_asked_within_their_stages_one_after_another(world: World) -> None:
    world.look_up()
    for number in range(N_CHUNKS):
        (local,), (remote,) = world.of("local", number), world.of("remote", number)
        (host,), (upper,) = world.of("host", number), world.of("upper", number)
        (lower,) = world.of("lower", number)
        moments = [*local[2:3], *host[2:], local[3], remote[2]]
        moments += [*upper[2:], *lower[2:], remote[3]]
        assert moments == sorted(moments)


def test_the_next_chunk_is_in_one_tier_while_the_last_is_in_the_one_below(
    world: World,
) -> None:
    world.stops.arm("upper.fetch")
    world.stops.arm("lower.fetch")
    chunks: list[Chunk] = []
    running = threading.Thread(target=lambda: chunks.extend(world.look_up()))
    running.start()
    world.stops.wait_held("upper.fetch", 2)
    world.stops.release_first("upper.fetch")
    world.stops.wait_held("lower.fetch", 1)
    # Now one of the first two chunks is in the lower tier, the other in the upper one.
    world.stops.release("upper.fetch")
    world.stops.release("lower.fetch")
    running.join()
    assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)
    pairs = [(world.of("lower", n)[0], world.of("upper", 1 - n)[0]) for n in (0, 1)]
    assert any(
        overlap(lower, upper) and upper[2] < lower[2] < upper[3]
        for lower, upper in pairs
    )


def test_a_tier_that_has_all_keys_spares_those_below(world: World) -> None:
    world.look_up(KEYS[2:20:2].copy())
    assert [stage for stage, *_ in world.seen] == ["host", "local", "upper", "remote"]


def test_a_tier_that_fails_is_in_the_trace(executor: ThreadPoolExecutor) -> None:
    world = World(FailureMode.DEGRADE, executor)
    world.upper.fail("fetch", times=1)
    (chunk,) = world.look_up(KEYS[1:20:2].copy())
    assert chunk.degraded
    assert [stage for stage, *_ in world.seen][2:] == ["upper", "lower", "remote"]


def test_keys_that_another_lookup_fetches_are_not_in_the_trace(world: World) -> None:
    """Who waits asks no tier; that its remote stage takes as long shows the wait."""
    world.stops.arm("upper.fetch")
    theirs = KEYS[1:9:2].copy()
    mine = np.append(theirs, 12)  # which the upper tier has
    both = [threading.Thread(target=world.look_up, args=(k,)) for k in (theirs, mine)]
    both[0].start()
    world.stops.wait_held("upper.fetch")
    both[1].start()
    world.stops.wait_held("upper.fetch", 2)
    world.stops.release("upper.fetch")
    for thread in both:
        thread.join()
    assert [len(world.of(stage)) for stage in ("remote", "upper", "lower")] == [2, 2, 1]


def test_without_an_observer_nobody_watches(world: World) -> None:
    pipeline = Pipeline(world.pipeline._workers)
    chunk = Chunk(KEYS, np.zeros((KEYS.size, 4), np.float32), np.zeros(150, np.bool_))
    pipeline.run([(world.table, chunk)])
    assert chunk.watch is None
    assert chunk.done
