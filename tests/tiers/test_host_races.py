"""Readers of the host tier beside writers.

Row i of key k in version v is (v, k, and a mix of both), so a row made of two versions
or of two keys is recognised, and a version that goes back as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import pytest

from hps_numba.tiers.host import HostTier
from hps_numba.types import OverflowPolicy, RowBlock, TableSpec

N_KEYS = 6_000
DIM = 24
SPEC = TableSpec("model", "table", DIM)
TAG = SPEC.tag
N_READERS = 2
WRITES = 2_000
LEAST_BATCHES = 200
BATCH = 700


def rows_of(keys: np.ndarray, versions) -> np.ndarray:
    columns = np.arange(DIM)
    versions = np.broadcast_to(versions, keys.shape)
    rows = (keys[:, None] * 7 + versions[:, None] * 13 + columns) % (1 << 20)
    rows[:, 0], rows[:, 1] = versions, keys
    return rows.astype(np.float32)


def check_rows(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the versions of the rows, each of which is whole and of its key."""
    versions = rows[:, 0].astype(np.int64)
    np.testing.assert_array_equal(rows, rows_of(keys, versions))
    return versions


def fetch(tier: HostTier, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((keys.size, DIM), -1, np.float32)
    found = np.zeros(keys.size, np.bool_)
    hits = tier.fetch(TAG, keys, out, found)
    assert hits == np.count_nonzero(found)
    return out, found


class Reader:
    """Reads random keys and remembers the newest version of each."""

    def __init__(self, tier: HostTier, seed: int) -> None:
        self._tier = tier
        self._rng = np.random.default_rng(seed)
        self._newest = np.zeros(N_KEYS, np.int64)
        self.versions: set[int] = set()  # that it has met
        self.hits = 0
        self.misses = 0

    def read(self) -> None:
        keys = self._rng.integers(0, N_KEYS, BATCH)  # some of them twice
        rows, found = fetch(self._tier, keys)
        keys, rows = keys[found], rows[found]
        versions = check_rows(keys, rows)
        assert (versions >= self._newest[keys]).all()
        np.maximum.at(self._newest, keys, versions)
        self.versions.update(versions.tolist())
        self.hits += keys.size
        self.misses += BATCH - keys.size


class Writer:
    """Changes the table at random; ``versions`` says what it should hold."""

    def __init__(self, tier: HostTier, seed: int) -> None:
        self._tier = tier
        self._rng = np.random.default_rng(seed)
        self.versions = np.zeros(N_KEYS, np.int64)  # 0: not there
        self._version = 0

    def write(self) -> None:
        self._version += 1
        keys = self._rng.permutation(N_KEYS)[: self._rng.integers(1, 400)]
        operation = self._rng.random()
        if operation < 0.7:
            self._tier.insert(TAG, keys, rows_of(keys, self._version))
            self.versions[keys] = self._version
        elif operation < 0.84:
            self._tier.delete(TAG, keys)
            self.versions[keys] = 0
        elif operation < 0.97:
            self._tier.evict(TAG, keys)
            self.versions[keys] = 0
        elif operation < 0.99:
            self._load()
        else:
            self._tier.evict(TAG)
            self.versions[:] = 0

    def _load(self) -> None:
        keys = self._rng.permutation(N_KEYS)[: self._rng.integers(1, N_KEYS)]
        parts = np.array_split(keys, 4)
        blocks = (RowBlock(part, rows_of(part, self._version)) for part in parts)
        assert self._tier.load(TAG, blocks) == keys.size
        self.versions[:] = 0
        self.versions[keys] = self._version


def run_all(works: list[Callable[[], None]]) -> None:
    """Run functions in threads and raise what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # reported below
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_partitions": 1},
        {"num_partitions": 3, "overflow_policy": OverflowPolicy.EVICT_OLDEST},
        {"max_bytes": 600_000},
        {
            "max_bytes": 600_000,
            "overflow_policy": OverflowPolicy.EVICT_LEAST_USED,
            "num_partitions": 1,
        },
        {"overflow_margin": 900, "overflow_policy": OverflowPolicy.EVICT_OLDEST},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_readers_see_whole_rows_whose_versions_never_go_back(options):
    with closing(HostTier(**options)) as tier:
        tier.open_table(SPEC)
        readers = [Reader(tier, seed) for seed in range(N_READERS)]
        writer = Writer(tier, 99)
        done = threading.Event()

        def read(reader: Reader) -> None:
            for _ in range(LEAST_BATCHES):
                reader.read()
            while not done.is_set():
                reader.read()

        def write() -> None:
            try:
                for i in range(10 * WRITES):
                    writer.write()
                    if i > WRITES and all(len(r.versions) > 100 for r in readers):
                        break
            finally:
                done.set()

        run_all([write, *(partial(read, reader) for reader in readers)])
        assert sum(r.hits for r in readers) > 50_000
        assert sum(r.misses for r in readers) > 1_000
        assert all(len(r.versions) > 100 for r in readers)
        keys = np.arange(N_KEYS)
        rows, found = fetch(tier, keys)
        versions = check_rows(keys[found], rows[found])
        np.testing.assert_array_equal(versions, writer.versions[found])
        if "max_bytes" in options or "overflow_margin" in options:
            assert tier.stats(TAG).evictions > 100
        else:
            np.testing.assert_array_equal(found, writer.versions > 0)
        assert tier.size(TAG) == np.count_nonzero(found)


def test_a_large_fetch_in_parts_is_right_beside_a_writer():
    n = 40_000
    keys = np.arange(n)
    with closing(HostTier(num_threads=2)) as tier:
        tier.open_table(SPEC)
        done = threading.Event()

        def write() -> None:
            for version in range(1, 30):
                tier.insert(TAG, keys, rows_of(keys, version))
            done.set()

        def read() -> None:
            newest = np.zeros(n, np.int64)
            while not done.is_set():
                rows, found = fetch(tier, keys)
                versions = np.zeros(n, np.int64)
                versions[found] = check_rows(keys[found], rows[found])
                assert (versions >= newest).all()  # nothing is ever removed
                newest = versions

        run_all([write, read])
        rows, found = fetch(tier, keys)
        assert found.all()
        np.testing.assert_array_equal(rows, rows_of(keys, 29))


def test_iterate_beside_a_writer_yields_whole_rows_and_no_key_twice():
    with closing(HostTier(num_partitions=2)) as tier:
        tier.open_table(SPEC)
        writer = Writer(tier, 3)
        kept = np.arange(N_KEYS, N_KEYS + 500)  # the writer's loads remove them once
        done = threading.Event()

        def write() -> None:
            while not done.is_set():
                writer.write()

        def walk() -> None:
            try:
                for _ in range(120):
                    seen = []
                    for block in tier.iterate(TAG, block_rows=333):
                        assert len(block) <= 333
                        check_rows(block.keys, block.rows)
                        seen.append(block.keys)
                    keys = np.concatenate(seen) if seen else np.empty(0, np.int64)
                    assert np.unique(keys).size == keys.size
                    assert ((keys >= 0) & (keys < N_KEYS + kept.size)).all()
            finally:
                done.set()

        tier.insert(TAG, kept, rows_of(kept, 1))
        run_all([write, walk])
        expected = np.flatnonzero(writer.versions)
        found = np.concatenate([block.keys for block in tier.iterate(TAG)])
        np.testing.assert_array_equal(np.sort(found)[: expected.size], expected)


def test_iterate_yields_every_row_that_nobody_touches():
    kept = np.arange(N_KEYS, N_KEYS + 2_000)
    with closing(HostTier(num_partitions=4)) as tier:
        tier.open_table(SPEC)
        tier.insert(TAG, kept, rows_of(kept, 1))
        others = np.arange(N_KEYS)

        def walk() -> Iterator[int]:
            for block in tier.iterate(TAG, block_rows=100):
                check_rows(block.keys, block.rows)
                yield from block.keys.tolist()

        seen = []
        for i, key in enumerate(walk()):
            seen.append(key)
            if i % 50 == 0:  # grows, updates and shrinks the table under the walk
                part = others[i : i + 300]
                tier.insert(TAG, part, rows_of(part, i))
                tier.delete(TAG, part[::2].copy())
                tier.insert(TAG, kept, rows_of(kept, i + 2))
        assert len(seen) == len(set(seen))
        assert set(kept.tolist()) <= set(seen)


def test_load_keeps_serving_and_then_holds_the_new_rows_only():
    old = np.arange(4_000)
    new = np.arange(2_000, 7_000)
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        tier.insert(TAG, old, rows_of(old, 1))
        loaded = 0

        def look(n_rows: int) -> None:
            nonlocal loaded
            loaded += n_rows
            rows, found = fetch(tier, old)
            assert found.all()
            versions = check_rows(old, rows)
            newer = old[versions == 2]
            np.testing.assert_array_equal(newer, np.arange(2_000, 2_000 + newer.size))
            assert newer.size == min(loaded, 2_000)
            assert set(versions.tolist()) <= {1, 2}

        parts = np.array_split(new, 10)
        blocks = [RowBlock(part, rows_of(part, 2)) for part in parts]
        assert tier.load(TAG, blocks, progress=look) == new.size
        assert loaded == new.size
        rows, found = fetch(tier, np.arange(7_000))
        np.testing.assert_array_equal(np.flatnonzero(found), new)
        np.testing.assert_array_equal(rows[found], rows_of(new, 2))


def test_load_of_nothing_empties_the_table():
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        keys = np.arange(100)
        tier.insert(TAG, keys, rows_of(keys, 1))
        assert tier.load(TAG, []) == 0
        assert tier.size(TAG) == 0
        assert not fetch(tier, keys)[1].any()


def test_of_a_repeated_key_the_last_loaded_row_wins():
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        keys = np.array([5, 6, 5, 7])
        again = np.array([6, 8])
        blocks = [
            RowBlock(keys, rows_of(keys, [1, 2, 3, 4])),
            RowBlock(again, rows_of(again, 5)),
        ]
        for _ in range(2):  # into an empty table, and into one with rows
            assert tier.load(TAG, blocks) == 6
            rows, found = fetch(tier, np.array([5, 6, 7, 8]))
            assert found.all()
            assert rows[:, 0].tolist() == [3, 5, 4, 5]
            assert tier.size(TAG) == 4


def test_a_backfill_that_began_before_an_update_never_undoes_it():
    """Both are let go at once, in every order that the scheduler finds."""
    keys = np.arange(50)
    stored = 0
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        start = threading.Barrier(2)
        rounds = range(1, 400)

        def update() -> None:
            for version in rounds:
                start.wait()
                with tier.hold(TAG, keys):
                    tier.insert(TAG, keys, rows_of(keys, 2 * version))
                start.wait()
                rows, found = fetch(tier, keys)
                assert found.all()
                assert (rows[:, 0] == 2 * version).all()
                start.wait()

        def backfill() -> None:
            nonlocal stored
            for version in rounds:
                epoch = tier.epoch(TAG)
                old = rows_of(keys, 2 * version - 1)
                start.wait()
                stored += tier.backfill(TAG, keys, old, epoch)
                start.wait()
                start.wait()

        run_all([update, backfill])
        refused = tier.stats(TAG).refused_backfills
    assert stored + refused == keys.size * len(rounds)
    assert refused > 0


@pytest.mark.parametrize("held", [np.arange(5), None], ids=["keys", "all"])
def test_a_hold_refuses_backfills_until_it_ends_and_those_begun_in_it(held):
    keys = np.arange(5)
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        before = tier.epoch(TAG)
        with tier.hold(TAG, held):
            during = tier.epoch(TAG)
            for epoch in (before, during):
                assert tier.backfill(TAG, keys, rows_of(keys, 1), epoch) == 0
            tier.insert(TAG, keys[:2], rows_of(keys[:2], 2))
            written = tier.epoch(TAG)
            # A write does not end the hold, of its own keys or of others.
            assert tier.backfill(TAG, keys, rows_of(keys, 1), written) == 0
        for epoch in (before, during, written):
            assert tier.backfill(TAG, keys, rows_of(keys, 1), epoch) == 0
        assert tier.backfill(TAG, keys, rows_of(keys, 3), tier.epoch(TAG)) == 5
        assert tier.stats(TAG).refused_backfills == 6 * keys.size


def test_a_load_inside_a_hold_does_not_end_it():
    keys = np.arange(5)
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        with tier.hold(TAG):
            tier.load(TAG, [RowBlock(keys, rows_of(keys, 2))])
            epoch = tier.epoch(TAG)
            assert tier.backfill(TAG, keys, rows_of(keys, 1), epoch) == 0
        assert tier.backfill(TAG, keys, rows_of(keys, 1), epoch) == 0
        assert (fetch(tier, keys)[0][:, 0] == 2).all()


def test_a_hold_that_fails_is_released():
    keys = np.arange(5)
    with closing(HostTier()) as tier:
        tier.open_table(SPEC)
        with pytest.raises(ZeroDivisionError), tier.hold(TAG):
            raise ZeroDivisionError
        assert tier.backfill(TAG, keys, rows_of(keys, 1), tier.epoch(TAG)) == 5
