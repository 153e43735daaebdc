"""Readers beside writers on real threads, whose interleavings no seed repeats."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.kernels.cuda.harness import Array
from tests.kernels.cuda.race_scenarios import SCHEDULES, mixed_races
from tests.kernels.cuda.races import Arena, Reads, rows_of, versions_in

N_KEYS, N_ROUNDS = 40, 120


class SharedTable:
    """A cache that one thread updates and others read, and what must be seen."""

    def __init__(self) -> None:
        self.arena = Arena(5, n_sets=2, n_keys=N_KEYS)
        everyone = np.arange(N_KEYS)
        self.arena.insert(everyone, epoch=0)
        # Versions whose update has returned, and those whose update has begun.
        self.done = np.zeros(N_KEYS, np.int64)
        self.begun = np.zeros(N_KEYS, np.int64)
        self.ended = threading.Event()
        # Nothing is compiled while the threads race.
        self.write(0, np.random.default_rng(0))
        self.read(np.random.default_rng(0), np.zeros(N_KEYS, np.int64))

    def write(self, epoch: int, rng: np.random.Generator) -> None:
        """Change some keys: update them, or evict them and bring them back."""
        arena = self.arena
        changed = rng.choice(N_KEYS, 10, replace=False)
        self.begun[changed] += 1
        rows = rows_of(changed, self.begun[changed], arena.dim)
        keys = arena.keys[changed]
        if epoch % 4 == 3:
            arena.cache.evict(keys, epoch=epoch)
            arena.cache.insert(keys, rows, epoch=epoch)
        else:
            arena.cache.update(keys, rows, epoch=epoch)
        self.done[changed] = self.begun[changed]

    def read(self, rng: np.random.Generator, seen: Array) -> Reads:
        """Query once and check; ``seen`` are the newest versions of this reader."""
        oldest = np.maximum(self.done, seen)
        numbers = rng.integers(0, N_KEYS, 512)
        answer = self.arena.cache.query(self.arena.keys[numbers])
        newest = self.begun.copy()
        hit = np.ones(len(numbers), bool)
        hit[answer.missing()[:, 0]] = False
        versions = versions_in(answer.out[hit], numbers[hit])
        assert (versions >= oldest[numbers[hit]]).all()
        assert (versions <= newest[numbers[hit]]).all()
        np.maximum.at(seen, numbers[hit], versions)
        return Reads(int(hit.sum()), int((~hit).sum()))

    def write_all(self) -> None:
        rng = np.random.default_rng(1)
        try:
            for epoch in range(1, N_ROUNDS):
                self.write(epoch, rng)
        finally:
            self.ended.set()

    def read_on(self, seed: int) -> Reads:
        rng, seen, total = (
            np.random.default_rng(seed),
            np.zeros(N_KEYS, np.int64),
            Reads(),
        )
        while not self.ended.is_set():
            total += self.read(rng, seen)
        total += self.read(rng, seen)
        return total


def test_readers_on_other_threads_see_whole_rows_that_do_not_go_back() -> None:
    table = SharedTable()
    with ThreadPoolExecutor(3) as threads:
        writer = threads.submit(table.write_all)
        readers = [threads.submit(table.read_on, seed) for seed in range(2)]
        writer.result()
        totals = [reader.result() for reader in readers]
    assert all(total.n_hits > 0 for total in totals)
    table.arena.versions[:] = table.done
    table.arena.check_cache()
    assert table.arena.cache.total("size") == N_KEYS


def test_blocks_on_two_threads_race_as_those_on_one() -> None:
    total = Reads()
    for seed in range(12):
        schedule = SCHEDULES[seed % len(SCHEDULES)]
        total += mixed_races(seed, 4, workers=2, **schedule)
    assert total.n_hits > 0
