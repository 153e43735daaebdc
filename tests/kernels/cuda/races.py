"""Readers beside writers: what each of them may see, and what must be left behind.

Every 4 bytes of a row name its key, its version and their own place, so that a torn
row, another key's row and an old row are told apart wherever they turn up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import Outcome, Policy, RowLayout, TableLayout
from tests.kernels.cuda.harness import Answer, Array, CpuCache

EDGES = (0, -1, 1, 2**63 - 1, -(2**63))  # keys that others keep for themselves
_KEY_SHIFT, _VERSION_SHIFT = 20, 8
DEFAULT = -1.5  # each value of the default row
MAX_STEPS = 4_000_000


def numbered_keys(n: int, seed: int) -> Array:
    """Return distinct int64 keys; number i of the list is what rows say of key i."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-(2**62), 2**62, 2 * n)
    return np.array(list(dict.fromkeys([*EDGES, *drawn.tolist()]))[:n], np.int64)


def rows_of(numbers: Array, versions: Array, dim: int) -> Array:
    """Return float32 rows whose bits are number, version and place."""
    words = numbers.astype(np.uint32) << np.uint32(_KEY_SHIFT)
    words = words | versions.astype(np.uint32) << np.uint32(_VERSION_SHIFT)
    places = np.arange(dim, dtype=np.uint32) & np.uint32(0xFF)
    return (words[:, None] | places).view(np.float32)


def versions_in(rows: Array, numbers: Array) -> Array:
    """Return the version of each row; fails if one is torn or another key's."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    versions = (words[:, 0] >> np.uint32(_VERSION_SHIFT)) & np.uint32(0xFFF)
    whole = rows_of(numbers, versions, words.shape[1]).view(np.uint32)
    wrong = np.flatnonzero((words != whole).any(1))
    assert wrong.size == 0, (
        f"row of key {numbers[wrong[0]]} is {[hex(w) for w in words[wrong[0]]]}"
    )
    return versions.astype(np.int64)


@dataclass
class Reads:
    """What readers saw."""

    n_hits: int = 0
    n_misses: int = 0

    def __iadd__(self, other: Reads) -> Reads:
        self.n_hits += other.n_hits
        self.n_misses += other.n_misses
        return self


@dataclass
class Asked:
    """A query that was launched: which keys, by their numbers, and its answer."""

    numbers: Array
    answer: Answer
    oldest: Array  # versions that it may return, by number
    fill: bool = False


def hits_of(asked: Asked) -> Array:
    """Return which positions hit; fails if the results contradict the misses."""
    answer = asked.answer
    n_missing, n_unique, n_hits, _ = answer.results()
    missing = answer.missing()
    hit = np.ones(len(asked.numbers), bool)
    hit[missing[:, 0]] = False
    assert (~hit).sum() == n_missing, "a position is missing twice"
    assert n_missing + n_hits == len(asked.numbers)
    keys = answer.keys
    assert keys is not None
    unique = answer.unique()
    assert sorted(set(keys[~hit].tolist())) == sorted(unique.tolist())
    assert len(unique) == n_unique
    assert (unique[answer.numbers()] == keys[missing[:, 0]]).all()
    return hit


@dataclass
class Reader:
    """Queries of one stream, whose versions must not go back."""

    seen: Array  # the newest version seen, by number
    asked: list[Asked] = field(default_factory=list)

    def check(self, newest: Array) -> Reads:
        """Look at what was returned since the last time; ``newest`` versions exist."""
        total = Reads()
        for asked in self.asked:
            hit = hits_of(asked)
            numbers = asked.numbers[hit]
            versions = versions_in(asked.answer.out[hit], numbers)
            oldest = np.maximum(asked.oldest, self.seen)[numbers]
            assert (versions >= oldest).all(), "a row from before an update"
            assert (versions <= newest[numbers]).all(), "a version nobody wrote"
            np.maximum.at(self.seen, numbers, versions)
            if asked.fill:
                assert (asked.answer.out[~hit] == DEFAULT).all(), "no default row"
            total += Reads(int(hit.sum()), int((~hit).sum()))
        self.asked.clear()
        return total


class Arena:
    """A small table, the truth below it, and readers whose answers are checked.

    ``versions`` are those below the cache: what a lookup that starts now must find at
    least. Keys are known by their numbers.
    """

    def __init__(
        self,
        seed: int,
        *,
        n_sets: int,
        n_keys: int,
        dim: int = 12,
        n_stamps: int = 64,
        policy: Policy = Policy.LRU,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.keys = numbered_keys(n_keys, seed)
        self.dim, self.policy = dim, policy
        self.cache = CpuCache(
            RowLayout(dim),
            [TableLayout(n_sets, n_stamps=n_stamps, tick_shift=5)],
            policy,
            max_steps=MAX_STEPS,
        )
        self.cache.set_default(0, np.full(dim, DEFAULT, np.float32))
        self.versions = np.zeros(n_keys, np.int64)
        self.epoch = 0
        self.readers = [Reader(np.zeros(n_keys, np.int64)) for _ in range(3)]

    def some(self, n: int) -> Array:
        """Return numbers of distinct keys."""
        return self.rng.choice(len(self.keys), min(n, len(self.keys)), replace=False)

    def insert(
        self, numbers: Array, *, epoch: int, stream: Any = None, versions: Any = None
    ) -> Array:
        """Insert rows as they are below, unless told; return the outcomes."""
        given = self.versions if versions is None else versions
        rows = rows_of(numbers, given[numbers], self.dim)
        return self.cache.insert(self.keys[numbers], rows, epoch=epoch, stream=stream)[
            0
        ]

    def update(self, numbers: Array, *, stream: Any = None) -> Array:
        """Write new rows below, then in the cache."""
        self.epoch += 1
        self.versions[numbers] += 1
        rows = rows_of(numbers, self.versions[numbers], self.dim)
        return self.cache.update(
            self.keys[numbers], rows, epoch=self.epoch, stream=stream
        )

    def evict(self, numbers: Array, *, stream: Any = None) -> Array:
        """Remove keys of the cache."""
        self.epoch += 1
        keys = self.keys[numbers]
        return self.cache.evict(keys, epoch=self.epoch, stream=stream)

    def clear(self, *, stream: Any = None) -> Array:
        """Remove all keys of the cache."""
        self.epoch += 1
        return self.cache.clear(epoch=self.epoch, stream=stream)

    def query(
        self,
        reader: int,
        n: int,
        oldest: Array,
        *,
        stream: Any,
        fill: bool = False,
        **options: Any,
    ) -> None:
        """Ask for keys, duplicates among them; ``oldest`` are versions by number."""
        numbers = self.rng.integers(0, len(self.keys), n)
        answer = self.cache.query(
            self.keys[numbers], stream=stream, fill=fill, **options
        )
        asked = Asked(numbers, answer, oldest.copy(), fill)
        self.readers[reader].asked.append(asked)

    def check_readers(self) -> Reads:
        """Look at all answers so far; return how many reads hit and missed."""
        total = Reads()
        for reader in self.readers:
            total += reader.check(self.versions)
        return total

    def check_cache(self) -> None:
        """Look at what is left behind: whole, current rows, each key once."""
        contents = self.cache.contents()
        numbers = {int(key): i for i, key in enumerate(self.keys)}
        held = np.array([numbers[key] for key in contents], np.int64)
        if held.size:
            rows = np.stack([np.frombuffer(r, np.float32) for r in contents.values()])
            versions = versions_in(rows, held)
            assert (versions == self.versions[held]).all(), "an old row has come back"
        assert (self.cache.seqs() % 2 == 0).all(), "a set was left held"
        assert self.cache.total("size") == len(contents)


def settle(outcomes: Array, *allowed: Outcome) -> None:
    """Fail if a key had another outcome than one of ``allowed``."""
    wrong = sorted(set(outcomes.tolist()) - {int(one) for one in allowed})
    assert not wrong, f"outcomes {[Outcome(one).name for one in wrong]}"
