"""One large table on a device beside its oracle, which handles all keys at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import (
    TABLE_BYTES,
    WAYS,
    Outcome,
    Policy,
    RowLayout,
    TableLayout,
)
from tests.gpu.mirrored import MirroredMemory, mirrored_cache
from tests.gpu.vectors import (
    by_chunks,
    differing,
    digests_of,
    second_sets_of,
    sets_of,
    stamps_of,
    stored_rows,
)
from tests.kernels.cuda.comparisons import CANARY
from tests.kernels.cuda.harness import dumped
from tests.kernels.cuda.launcher import Answer
from tests.kernels.cuda.oracle import Array
from tests.kernels.cuda.sequences import EXTREME

RowsOf = Callable[[RowLayout, Array, Array], Array]
WROTE = (Outcome.REPLACED, Outcome.INSERTED, Outcome.EVICTED)


def key_pool(n: int, rng: np.random.Generator) -> Array:
    """Return unique keys, the extreme ones first; number i of the list is key i's."""
    drawn = np.unique(rng.integers(-(2**63), 2**63, 2 * n, np.int64))
    drawn = rng.permutation(drawn[~np.isin(drawn, EXTREME)])
    return np.concatenate([np.array(EXTREME, np.int64), drawn])[:n]


class BigTable:
    """A table, what it must hold by the keys' numbers, and checks of all its memory.

    Parameters
    ----------
    memory
        Of the device.
    rows, policy
        Of the cache.
    n_keys
        Keys that there are; about half of them have room.
    rows_of
        What rows are made of.
    """

    def __init__(
        self,
        memory: MirroredMemory,
        rows: RowLayout,
        policy: Policy,
        *,
        n_keys: int,
        seed: int,
        rows_of: RowsOf = stored_rows,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows, self.policy, self.rows_of = rows, policy, rows_of
        self.table = TableLayout.for_rows(n_keys // 2)
        self.cpu = mirrored_cache(memory, rows, [self.table], policy)
        self.default = rows_of(rows, np.array([2**31]), np.zeros(1))
        self.cpu.set_default(0, self.default[0])
        self.keys = key_pool(n_keys, self.rng)
        self.order = np.argsort(self.keys)
        self.home = self.second = sets_of(self.keys, self.table.n_sets)
        if policy == Policy.STATIC:
            self.second = second_sets_of(self.keys, self.table.n_sets)
        self.versions = np.zeros(n_keys, np.int64)
        self.slots = np.full(n_keys, -1, np.int64)  # where a key is; -1 if it is not
        self.writes = np.zeros(self.table.n_sets, np.int64)
        self.stamps = np.zeros(self.table.n_stamps, np.uint64)
        self.image = self.cpu.block.copy()
        self.compared = 0

    @property
    def inside(self) -> Array:
        return self.slots >= 0

    def numbers_of(self, keys: Array) -> Array:
        """Return the numbers of keys; fails for one that nobody gave."""
        places = np.searchsorted(self.keys, keys, sorter=self.order)
        numbers = self.order[np.minimum(places, len(self.keys) - 1)]
        assert (self.keys[numbers] == keys).all(), "a key from nowhere"
        return numbers

    def rows_now(self, numbers: Array) -> Array:
        return self.rows_of(self.rows, numbers, self.versions[numbers])

    # -- memory -------------------------------------------------------------------

    def check_memory(self, inside: Array) -> None:
        """Fail if anything but the keys ``inside``, in their rows, is in the table."""
        digests = self.cpu.digests().reshape(-1)
        slots = np.flatnonzero(digests)
        keys = self.cpu.stored_keys().reshape(-1)[slots]
        numbers = self.numbers_of(keys)
        assert len(np.unique(numbers)) == len(numbers), "a key is there twice"
        assert np.array_equal(np.sort(numbers), np.flatnonzero(inside))
        its_own = self.home[numbers] == slots // WAYS
        its_own |= self.second[numbers] == slots // WAYS
        assert its_own.all(), "a key in another's set"
        assert (digests[slots] == digests_of(keys)).all()
        seqs = self.cpu.seqs().astype(np.int64)
        assert (seqs == 2 * self.writes).all(), "a set was left held, or written unseen"
        assert self.cpu.total("size") == len(slots)
        start = self.cpu.layout.offset("stamps", 0)
        stamps = self.cpu.block[start : start + 8 * self.table.n_stamps]
        assert (stamps.view(np.uint64) == self.stamps).all()
        self._check_rows(slots, numbers)
        self.slots[:] = -1
        self.slots[numbers] = slots
        self.image[:] = self.cpu.block
        self.compared += len(numbers)

    def _check_rows(self, slots: Array, numbers: Array) -> None:
        stride, row_bytes = self.rows.stride_bytes, self.rows.row_bytes
        n_bytes = self.table.n_slots * stride
        now = self.cpu.part("rows", 0, n_bytes).reshape(-1, stride)
        start = self.cpu.layout.offset("rows", 0)
        before = self.image[start : start + n_bytes].reshape(-1, stride)
        wanted = np.full(self.table.n_slots, -1, np.int64)
        wanted[slots] = numbers

        def wrong(which: slice) -> Array:
            given = before[which].copy()
            taken = np.flatnonzero(wanted[which] >= 0)
            rows = self.rows_now(wanted[which][taken]).view(np.uint8)
            given[taken, :row_bytes] = rows.reshape(len(taken), row_bytes)
            differ = (now[which] != given).any(1)
            # What is left in a way that was emptied is its old row, or another one's.
            empty_now = np.ones(len(given), bool)
            empty_now[taken] = False
            differ &= ~(empty_now & self._was_taken[which])
            return differ

        self._was_taken = np.zeros(self.table.n_slots, bool)
        self._was_taken[self.slots[self.inside]] = True
        found = np.flatnonzero(by_chunks(wrong, self.table.n_slots))
        assert not len(found), f"{len(found)} rows are wrong, that of slot {found[:3]}"

    # -- writers ------------------------------------------------------------------

    def insert_new(self, numbers: Array, *, epoch: int) -> None:
        """Insert keys that are not there; stale ones must be refused."""
        keys, before = self.keys[numbers], self.inside
        assert not before[numbers].any()
        outcomes, evicted = self.cpu.insert(keys, self.rows_now(numbers), epoch=epoch)
        stale = self.stamps[stamps_of(keys, self.table.n_stamps)] > epoch
        assert ((outcomes == Outcome.STALE) == stale).all()
        inserted = outcomes == Outcome.INSERTED
        if self.policy == Policy.STATIC:
            self._check_full(numbers[~(inserted | stale)])
            other = Outcome.FULL
        else:
            self._check_room(numbers[~stale], numbers[inserted])
            other = Outcome.EVICTED
        assert (outcomes[~(inserted | stale)] == other).all()
        gone = outcomes == Outcome.EVICTED
        untouched = evicted[~gone].view(np.uint8)
        assert (untouched == CANARY).all()
        inside = before.copy()
        inside[numbers[inserted | gone]] = True
        left = self.numbers_of(evicted[gone])
        assert len(np.unique(left)) == len(left)
        assert (self.home[left] == self.home[numbers[gone]]).all()
        inside[left] = False
        self._wrote(numbers, outcomes)
        self.check_memory(inside)

    def _check_room(self, new: Array, inserted: Array) -> None:
        """Fail unless as many keys took empty ways as there were for them."""
        n_sets = self.table.n_sets
        wanted = np.bincount(self.home[new], minlength=n_sets)
        free = WAYS - np.bincount(self.home[self.inside], minlength=n_sets)
        into_room = np.bincount(self.home[inserted], minlength=n_sets)
        assert (into_room == np.minimum(wanted, free)).all()

    def _check_full(self, left_out: Array) -> None:
        """Fail unless both sets of the keys that had no place are full."""
        full = (self.cpu.digests() != 0).all(1)
        assert full[self.home[left_out]].all()
        assert full[self.second[left_out]].all()

    def replace(self, numbers: Array, *, epoch: int) -> None:
        """Insert keys that are there, with new rows; none is stale."""
        self.versions[numbers] += 1
        rows = self.rows_now(numbers)
        outcomes, _ = self.cpu.insert(self.keys[numbers], rows, epoch=epoch)
        assert (outcomes == Outcome.REPLACED).all()
        self._wrote(numbers, outcomes)
        self.check_memory(self.inside)

    def update(self, numbers: Array, *, epoch: int) -> None:
        self.versions[numbers] += 1
        keys = self.keys[numbers]
        outcomes = self.cpu.update(keys, self.rows_now(numbers), epoch=epoch)
        there = self.inside[numbers]
        assert (outcomes[there] == Outcome.REPLACED).all()
        assert (outcomes[~there] == Outcome.ABSENT).all()
        self.stamps[stamps_of(keys, self.table.n_stamps)] = epoch
        self._wrote(numbers, outcomes)
        self.check_memory(self.inside)

    def evict(self, numbers: Array, *, epoch: int) -> None:
        keys, there = self.keys[numbers], self.inside[numbers]
        outcomes = self.cpu.evict(keys, epoch=epoch)
        assert (outcomes[there] == Outcome.EVICTED).all()
        assert (outcomes[~there] == Outcome.ABSENT).all()
        self.stamps[stamps_of(keys, self.table.n_stamps)] = epoch
        inside = self.inside
        inside[numbers] = False
        self._wrote(numbers, outcomes)
        self.check_memory(inside)

    def clear(self, *, epoch: int) -> None:
        busy = self.cpu.clear(epoch=epoch)
        assert not busy.any()
        assert self.cpu.total("floor") == epoch
        self.writes += 1
        self.check_memory(np.zeros(len(self.keys), bool))

    def _wrote(self, numbers: Array, outcomes: Array) -> None:
        written = numbers[np.isin(outcomes, WROTE)]
        sets = self.home[written]
        if self.policy == Policy.STATIC:
            slots = self.slots[written]
            sets = np.where(slots < 0, self._slots_now()[written], slots) // WAYS
        self.writes += np.bincount(sets, minlength=self.table.n_sets)

    def _slots_now(self) -> Array:
        """Return the slot of each key as the cache's memory has it, or -1."""
        slots = np.flatnonzero(self.cpu.digests().reshape(-1))
        found = np.full(len(self.keys), -1, np.int64)
        found[self.numbers_of(self.cpu.stored_keys().reshape(-1)[slots])] = slots
        return found

    # -- readers ------------------------------------------------------------------

    def query(self, numbers: Array, *, fill: bool = False, **options: Any) -> Answer:
        """Look keys up, compare rows, misses, counts and scores."""
        keys, hit = self.keys[numbers], self.inside[numbers]
        answer = self.cpu.query(keys, fill=fill, **options)
        rows = self.rows_now(numbers)
        if fill:
            rows[~hit] = self.default
        written = np.flatnonzero(hit | fill)
        wrong = differing(answer.out[written], rows[written], self.rows)
        assert not len(wrong), f"{len(wrong)} rows are wrong"
        left = answer.out[~(hit | fill)]
        assert (np.ascontiguousarray(left).view(np.uint8) == CANARY).all()
        self._check_misses(answer, keys, hit)
        unique_hits = len(np.unique(numbers[hit])) if options.get("count_unique") else 0
        n_missing, n_unique, n_hits, n_unique_hits = answer.results()
        assert (n_missing, n_hits) == (int((~hit).sum()), int(hit.sum()))
        assert n_unique == len(np.unique(numbers[~hit]))
        assert n_unique_hits == unique_hits
        self._check_scores(numbers[hit])
        self.compared += len(numbers)
        return answer

    def _check_misses(self, answer: Answer, keys: Array, hit: Array) -> None:
        missing, unique = answer.missing().astype(np.int64), answer.unique()
        positions, firsts = missing[:, 0], missing[:, 1]
        assert np.array_equal(np.sort(positions), np.flatnonzero(~hit))
        assert np.array_equal(np.sort(unique), np.unique(keys[~hit]))
        assert (unique[answer.numbers()] == keys[positions]).all()
        assert (keys[firsts] == keys[positions]).all()
        assert len(np.unique(firsts)) == len(unique)

    def _check_scores(self, touched: Array) -> None:
        scores = self.cpu.scores().reshape(-1)
        start = self.cpu.layout.offset("meta", 0)
        n_bytes = self.table.n_sets * 64
        before = self.image[start : start + n_bytes].reshape(-1, 64)[:, 32 : 32 + WAYS]
        wanted = before.reshape(-1).copy()
        slots = np.unique(self.slots[touched])
        if self.policy == Policy.LRU:
            wanted[slots] = self.cpu.total("clock") >> self.table.tick_shift & 255
        if self.policy == Policy.LFU:
            # Counts are drawn by lot; they go up, and by no more than there were hits.
            uses = np.bincount(self.slots[touched], minlength=len(scores))
            grown = scores.astype(np.int64) - before.reshape(-1)
            assert ((grown >= 0) & (grown <= uses)).all()
            wanted = scores
        assert (scores == wanted).all()
        before[...] = scores.reshape(-1, WAYS)
        # The clock and the totals are in the descriptor.
        self.image[:TABLE_BYTES] = self.cpu.block[:TABLE_BYTES]
        same = by_chunks(self._same_bytes, len(self.image))
        assert same.all(), "a query wrote to keys or rows"

    def _same_bytes(self, part: slice) -> Array:
        return np.array([np.array_equal(self.image[part], self.cpu.block[part])])

    def scatter(self, answer: Answer, numbers: Array, window: int) -> None:
        """Hand out the rows of missing keys, some at a time."""
        unique = self.numbers_of(answer.unique().copy())
        for first in range(0, len(unique), window):
            part = unique[first : first + window]
            self.cpu.scatter(answer, 0, self.rows_now(part), first)
        wrong = differing(answer.out, self.rows_now(numbers), self.rows)
        assert not len(wrong), f"{len(wrong)} rows are wrong after the scatter"
        self.compared += len(unique)

    def dump(self) -> None:
        keys, n_busy = dumped(self.cpu.dump())
        assert n_busy == 0
        numbers = np.sort(self.numbers_of(keys.copy()))
        assert np.array_equal(numbers, np.flatnonzero(self.inside))
        self.compared += len(numbers)
