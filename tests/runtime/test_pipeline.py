from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ClosedError, TierUnavailableError
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import BUFFERS, Pipeline
from hps_numba.tiers.host import HostTier
from hps_numba.types import FailureMode, Keys, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier
from tests.support.gates import StopPoints
from tests.support.wrappers import CountingTier, FailingTier, GatedTier

SPEC = TableSpec("model", "table", 4, default_value=-1.0)
N_KEYS = 1000
CHUNK_KEYS = 96


@dataclass
class Parts:
    """A host tier with every third key over a tier that can stop, fail and count."""

    table: Hierarchy
    stops: StopPoints
    failing: FailingTier
    counting: CountingTier
    executor: ThreadPoolExecutor
    seen: list[tuple[str, int, float, float]] = field(default_factory=list)

    def pipeline(self) -> Pipeline:
        return Pipeline(self.executor, lambda *event: self.seen.append(event))

    def stages(self, name: str) -> list[int]:
        return [number for stage, number, _, _ in self.seen if stage == name]


@pytest.fixture
def parts() -> Iterator[Parts]:
    stops = StopPoints()
    host, lower = HostTier(), LowerTier()
    failing = FailingTier(lower)
    counting = CountingTier(GatedTier(failing, stops))
    keys = np.arange(N_KEYS, dtype=np.int64)
    for tier, some in ((host, keys[::3].copy()), (lower, keys)):
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, some, versioned_rows(some, 1, SPEC.dim))
    table = Hierarchy(
        SPEC,
        [host, counting],
        backfills=None,
        on_failure=FailureMode.RAISE,
        write_rows=64,
    )
    with ThreadPoolExecutor(4) as executor:
        yield Parts(table, stops, failing, counting, executor)


def chunks_of(keys: Keys) -> list[Chunk]:
    out = np.full((keys.size, SPEC.dim), np.nan, np.float32)
    found = np.zeros(keys.size, np.bool_)
    return [
        Chunk(
            keys[low : low + CHUNK_KEYS],
            out[low : low + CHUNK_KEYS],
            found[low : low + CHUNK_KEYS],
        )
        for low in range(0, keys.size, CHUNK_KEYS)
    ]


def random_keys(n_keys: int, seed: int = 1) -> Keys:
    return np.random.default_rng(seed).integers(0, N_KEYS, n_keys)


def test_every_chunk_gets_its_rows(parts: Parts) -> None:
    chunks = chunks_of(random_keys(5_000))
    parts.pipeline().run([(parts.table, chunk) for chunk in chunks])
    for chunk in chunks:
        assert chunk.found.all()
        assert chunk.done
        assert (versions_in(chunk.keys, chunk.out) == 1).all()


def test_chunks_of_several_tables_do_not_mix(parts: Parts) -> None:
    other_spec = TableSpec("model", "other", 4)
    other_tier = LowerTier()
    other_tier.open_table(other_spec)
    keys = np.arange(N_KEYS, dtype=np.int64)
    other_tier.insert(other_spec.tag, keys, versioned_rows(keys, 5, 4))
    other = Hierarchy(
        other_spec,
        [other_tier],
        backfills=None,
        on_failure=FailureMode.RAISE,
        write_rows=64,
    )
    mine, theirs = chunks_of(random_keys(700, 2)), chunks_of(random_keys(700, 3))
    work = [
        pair
        for a, b in zip(mine, theirs, strict=True)
        for pair in ((parts.table, a), (other, b))
    ]
    parts.pipeline().run(work)
    assert all((versions_in(c.keys, c.out) == 1).all() for c in mine)
    assert all((versions_in(c.keys, c.out) == 5).all() for c in theirs)


def test_what_no_tier_knows_stays_unresolved(parts: Parts) -> None:
    keys = np.arange(N_KEYS - 100, N_KEYS + 300, dtype=np.int64)
    chunks = chunks_of(keys)
    parts.pipeline().run([(parts.table, chunk) for chunk in chunks])
    found = np.concatenate([chunk.found for chunk in chunks])
    assert np.array_equal(found, keys < N_KEYS)
    assert sum(chunk.resolved for chunk in chunks) == 100


def test_a_lookup_of_one_chunk_changes_no_thread(parts: Parts) -> None:
    (chunk,) = chunks_of(random_keys(50))
    threads: list[int] = []
    pipeline = Pipeline(
        parts.executor, lambda *_: threads.append(threading.get_ident())
    )
    pipeline.run([(parts.table, chunk)])
    assert threads == [threading.get_ident()] * 4  # two stages, a tier in each


def test_a_chunk_that_the_first_tier_resolves_has_no_remote_stage(parts: Parts) -> None:
    hot = chunks_of(np.zeros(300, np.int64))
    parts.pipeline().run([(parts.table, chunk) for chunk in hot])
    assert parts.stages("local") == [0, 1, 2, 3]
    assert parts.stages("remote") == []
    assert parts.counting.calls["fetch"] == 0


def test_the_observer_is_told_of_every_stage(parts: Parts) -> None:
    chunks = chunks_of(random_keys(960))
    parts.pipeline().run([(parts.table, chunk) for chunk in chunks])
    assert parts.stages("local") == list(range(10))
    assert sorted(parts.stages("remote")) == list(range(10))
    local = {n: end for stage, n, _, end in parts.seen if stage == "local"}
    for stage, number, begin, end in parts.seen:
        assert begin <= end
        if stage == "remote":
            assert local[number] <= begin


def test_at_most_two_chunks_are_with_workers(parts: Parts) -> None:
    chunks = chunks_of(np.arange(6 * CHUNK_KEYS, dtype=np.int64))
    parts.stops.arm("lower.fetch")
    running = threading.Thread(
        target=parts.pipeline().run, args=([(parts.table, c) for c in chunks],)
    )
    running.start()
    parts.stops.wait_held("lower.fetch", BUFFERS)
    # The caller has asked host memory for the third chunk, and waits with it.
    parts.executor.submit(lambda: None).result()  # there is no lack of workers
    assert parts.stops.passed("lower.fetch") == BUFFERS
    assert max(parts.stages("local")) <= BUFFERS
    parts.stops.release("lower.fetch")
    running.join()
    assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)


def test_the_first_tier_is_asked_while_others_are_fetched(parts: Parts) -> None:
    chunks = chunks_of(np.arange(3 * CHUNK_KEYS, dtype=np.int64))
    parts.stops.arm("lower.fetch")
    running = threading.Thread(
        target=parts.pipeline().run, args=([(parts.table, c) for c in chunks],)
    )
    running.start()
    # Two with workers, and the caller itself with the last one.
    parts.stops.wait_held("lower.fetch", BUFFERS + 1)
    assert parts.stages("local") == [0, 1, 2]
    parts.stops.release("lower.fetch")
    running.join()
    assert all(chunk.found.all() for chunk in chunks)


def test_an_error_waits_for_those_who_still_write(parts: Parts) -> None:
    """The caller's buffers are its own again once the error surfaces."""
    chunks = chunks_of(np.arange(3 * CHUNK_KEYS, dtype=np.int64))
    parts.failing.fail("fetch", times=1)
    parts.stops.arm("lower.fetch")
    parts.stops.arm("lower.fetch.done")
    raised: list[BaseException] = []

    def run() -> None:
        try:
            parts.pipeline().run([(parts.table, chunk) for chunk in chunks])
        except TierUnavailableError as exc:
            raised.append(exc)

    running = threading.Thread(target=run)
    running.start()
    parts.stops.wait_held("lower.fetch", 3)
    parts.stops.release("lower.fetch")
    # One of three failed; the others are held before they write to the output.
    parts.stops.wait_held("lower.fetch.done", 2)
    assert running.is_alive()
    assert raised == []
    parts.stops.release("lower.fetch.done")
    running.join()
    assert len(raised) == 1
    assert sorted(chunk.done for chunk in chunks) == [False, True, True]


class Submitting(ThreadPoolExecutor):
    """One worker; tells how many tasks it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.given = threading.Semaphore(0)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        future = super().submit(*args, **kwargs)
        self.given.release()
        return future


def test_workers_that_are_sent_home_leave_no_lookup_waiting(parts: Parts) -> None:
    """As when a server closes while a tier hangs: some chunks are never begun."""
    chunks = chunks_of(np.arange(4 * CHUNK_KEYS, dtype=np.int64))
    parts.stops.arm("lower.fetch")
    one = Submitting()
    raised: list[str] = []

    def run() -> None:
        try:
            Pipeline(one).run([(parts.table, chunk) for chunk in chunks])
        except ClosedError as exc:
            raised.append(str(exc))

    running = threading.Thread(target=run, daemon=True)
    running.start()
    parts.stops.wait_held("lower.fetch", 1)
    for _ in range(2):
        assert one.given.acquire(timeout=30.0)
    one.shutdown(wait=False, cancel_futures=True)
    parts.stops.release("lower.fetch")
    running.join(30.0)
    assert not running.is_alive()
    assert raised == ["the server was closed while the lookup was under way"]


def test_without_workers_the_server_is_closed(parts: Parts) -> None:
    parts.executor.shutdown()
    with pytest.raises(ClosedError, match="the server was closed while the lookup"):
        parts.pipeline().run(
            [(parts.table, chunk) for chunk in chunks_of(random_keys(200))]
        )


def test_a_single_worker_is_enough(parts: Parts) -> None:
    with ThreadPoolExecutor(1) as one:
        pipeline = Pipeline(one)
        jobs = [chunks_of(random_keys(2_000, seed)) for seed in range(4)]
        callers = [
            threading.Thread(
                target=pipeline.run, args=([(parts.table, c) for c in chunks],)
            )
            for chunks in jobs
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    for chunks in jobs:
        assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)


def test_nothing_to_do_is_done(parts: Parts) -> None:
    parts.pipeline().run([])
    assert parts.seen == []


class TierInTurn(LowerTier):
    """Stays with its first chunk until the second one is about to be asked for."""

    in_turn = True

    def __init__(self) -> None:
        super().__init__()
        self.arriving = threading.Semaphore(0)
        self.inside = threading.Semaphore(1)
        self.alone: list[bool] = []
        self.second_is_asked = threading.Event()

    def arrange(self, tag: str, keys: Keys) -> None:
        self.arriving.release()

    def fetch(self, *args: Any, **kwargs: Any) -> int:
        self.alone.append(self.inside.acquire(blocking=False))
        if len(self.alone) == 1:
            for _ in range(2):  # its own chunk, and the next one
                assert self.arriving.acquire(timeout=10)
        elif len(self.alone) == 2:
            self.second_is_asked.set()
        hits = super().fetch(*args, **kwargs)
        self.inside.release()
        return hits


class TierBelow(LowerTier):
    """Stays with the first chunk until the tier above is asked for the second."""

    def __init__(self, above: TierInTurn) -> None:
        super().__init__()
        self.above = above

    def fetch(self, *args: Any, **kwargs: Any) -> int:
        assert self.above.second_is_asked.wait(10)
        return super().fetch(*args, **kwargs)


def test_a_tier_in_turn_is_asked_for_a_chunk_while_the_next_has_the_last_one() -> None:
    above = TierInTurn()
    below = TierBelow(above)
    keys = np.arange(N_KEYS, dtype=np.int64)
    for tier, some in ((above, keys[::3].copy()), (below, keys)):
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, some, versioned_rows(some, 1, SPEC.dim))
    table = Hierarchy(
        SPEC,
        [above, below],
        backfills=None,
        on_failure=FailureMode.RAISE,
        write_rows=64,
    )
    chunks = chunks_of(keys)
    with ThreadPoolExecutor(BUFFERS) as executor:
        Pipeline(executor).run([(table, chunk) for chunk in chunks])
    assert above.alone == [True] * len(chunks)
    assert all(chunk.done for chunk in chunks)


class MeetingTier(LowerTier):
    """Lets two chunks go on together, and counts how often no second one came."""

    in_turn = True

    def __init__(self, *, meet: bool) -> None:
        super().__init__()
        self.inside = 0
        self.most = 0
        self._changed = threading.Condition()
        self._meet = meet

    def fetch(self, *args: Any, **kwargs: Any) -> int:
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            if self._meet:
                assert self._changed.wait_for(lambda: self.most == 2, timeout=10)
        hits = super().fetch(*args, **kwargs)
        with self._changed:
            self.inside -= 1
        return hits


def tiers_of(above: MeetingTier, n_above: int, below: bool) -> Hierarchy:
    keys = np.arange(N_KEYS, dtype=np.int64)
    tiers = [above, LowerTier()] if below else [above]
    for tier, some in zip(tiers, (keys[:n_above], keys), strict=False):
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, some, versioned_rows(some, 1, SPEC.dim))
    return Hierarchy(
        SPEC, tiers, backfills=None, on_failure=FailureMode.RAISE, write_rows=64
    )


def test_chunks_go_side_by_side_through_a_tier_with_none_below() -> None:
    table = tiers_of(MeetingTier(meet=True), N_KEYS, below=False)
    chunks = chunks_of(np.arange(N_KEYS, dtype=np.int64))
    with ThreadPoolExecutor(BUFFERS) as executor:
        Pipeline(executor).run([(table, chunk) for chunk in chunks])
    assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)


def test_chunks_go_side_by_side_once_a_tier_has_nearly_all_keys() -> None:
    above = MeetingTier(meet=False)
    table = tiers_of(above, N_KEYS - 5, below=True)
    keys = np.arange(N_KEYS, dtype=np.int64)
    with ThreadPoolExecutor(BUFFERS) as executor:
        Pipeline(executor).run([(table, chunk) for chunk in chunks_of(keys)[:1]])
        above.most, above._meet = 0, True
        Pipeline(executor).run([(table, chunk) for chunk in chunks_of(keys)])
    assert above.most == 2


def test_chunks_take_turns_again_when_a_tier_leaves_keys_to_the_next() -> None:
    above = MeetingTier(meet=False)
    table = tiers_of(above, N_KEYS // 2, below=True)
    keys = np.arange(N_KEYS, dtype=np.int64)
    with ThreadPoolExecutor(BUFFERS) as executor:
        pipeline = Pipeline(executor)
        pipeline.run([(table, chunk) for chunk in chunks_of(keys)[:1]])  # has all
        pipeline.run([(table, chunk) for chunk in chunks_of(keys)[-1:]])  # has none
        above.most = 0
        pipeline.run([(table, chunk) for chunk in chunks_of(keys[N_KEYS // 2 :])])
    assert above.most == 1
