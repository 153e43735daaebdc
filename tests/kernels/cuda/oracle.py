"""What a cache does, in plain Python: the model that kernels are compared with.

One key at a time, in the order given; ``orders`` finds the order in which the warps of
a launch came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.kernels.cuda.layout import (
    SCORES,
    SET_BYTES,
    WAYS,
    Outcome,
    Policy,
    RowLayout,
    TableLayout,
)
from tests.kernels.cuda.hashes import (
    digest_of,
    door_mark_of,
    door_of,
    second_set_of,
    set_of,
    stamp_of,
)

Array = npt.NDArray[Any]

HOME_ROOM = 8  # empty ways with which a home set is taken, however empty the other is
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_WORD = 2**64 - 1


# -- rows ---------------------------------------------------------------------------


def handed_out(stored: Array, rows: RowLayout) -> Array:
    """Return rows of the stored type as queries give them."""
    if rows.out == rows.stored:
        return stored
    if rows.stored == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return stored.astype(np.float32)


def _unpacked(packed: Sequence[bytes], rows: RowLayout) -> Array:
    stored = np.frombuffer(b"".join(packed), STORED[rows.stored])
    return handed_out(stored.reshape(len(packed), rows.dim), rows)


# -- one table ----------------------------------------------------------------------


@dataclass
class Set:
    """One set as memory has it, what is left over in empty ways included."""

    seq: int
    digests: list[int]
    keys: list[int]
    scores: list[int]
    rows: list[bytes]

    def copy(self) -> Set:
        return Set(
            self.seq, self.digests[:], self.keys[:], self.scores[:], self.rows[:]
        )

    def way_of(self, key: int) -> int | None:
        return next(
            (w for w in range(WAYS) if self.digests[w] and self.keys[w] == key), None
        )

    def wrote(self) -> None:
        self.seq = (self.seq + 2) % 2**32


@dataclass
class OracleTable:
    """One table: its sets, and what guards and scores them.

    ``meta`` is the address of the sets' metadata: LFU draws lots with a score's.
    """

    layout: TableLayout
    policy: Policy
    sets: list[Set]
    default: bytes
    meta: int = 0
    stamps: list[int] = field(default_factory=list)
    door: list[int] = field(default_factory=list)
    floor: int = 0
    clock: int = 0
    totals: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.stamps = [0] * self.layout.n_stamps
        self.door = [0] * self.layout.n_door

    def set_of(self, key: int) -> int:
        return set_of(key, self.layout.n_sets)

    def sets_of(self, key: int) -> list[int]:
        """Return the sets where a key may live, its home set first."""
        home = self.set_of(key)
        if self.policy != Policy.STATIC or self.layout.n_sets == 1:
            return [home]
        return [home, second_set_of(key, self.layout.n_sets)]

    def find(self, key: int) -> tuple[int, int] | None:
        """Return the set and the way of a key that is there."""
        for n_set in self.sets_of(key):
            way = self.sets[n_set].way_of(key)
            if way is not None:
                return n_set, way
        return None

    def place_for(self, key: int) -> tuple[int, int | None]:
        """Return the set that a key is in or goes to, and its way or None."""
        place = self.find(key)
        if place is not None:
            return place
        homes = self.sets_of(key)
        room = [self.sets[n_set].digests.count(0) for n_set in homes]
        if room[0] >= HOME_ROOM:
            return homes[0], None
        return homes[room.index(max(room))], None

    def contents(self) -> dict[int, bytes]:
        return {
            one.keys[way]: one.rows[way]
            for one in self.sets
            for way in range(WAYS)
            if one.digests[way]
        }

    # -- scores

    def tick(self, more_keys: int = 0) -> int:
        """Return the clock's tick after ``more_keys``, modulo 256."""
        return (self.clock + more_keys >> self.layout.tick_shift) % 256

    def step(self, n_keys: int) -> int:
        """Return how far a query of ``n_keys`` moves the clock."""
        return min(n_keys, 1 << self.layout.tick_shift)

    def chance(self, n_set: int, way: int, count: int) -> bool:
        """Return whether a use counts that finds a way's count at ``count``."""
        address = self.meta + n_set * SET_BYTES + SCORES + way
        mixed = (address ^ self.clock) * 0x9E3779B97F4A7C15 & _WORD
        return mixed >> 32 & (1 << (count >> 3)) - 1 == 0

    def touch(self, n_set: int, way: int, n_keys: int) -> None:
        """Count one use, of a query of ``n_keys`` of this table."""
        scores = self.sets[n_set].scores
        if self.policy == Policy.LRU:
            scores[way] = self.tick(self.step(n_keys))
        elif self.policy == Policy.LFU:
            count = scores[way]
            if count < 255 and self.chance(n_set, way, count):
                scores[way] = count + 1

    def score_at_insert(self, before: int) -> int:
        if self.policy == Policy.LRU:
            return (self.tick() - 2) % 256
        return 1 if self.policy == Policy.LFU else before

    def victim(self, one: Set) -> int:
        """Return the way of a full set that yields; LFU's counts may be halved."""
        turn = (one.seq >> 1) % WAYS
        if self.policy == Policy.LRU:
            worth = [255 - (self.tick() - score) % 256 for score in one.scores]
        else:
            if ((one.seq >> 1) + 1) % 56 == 0:
                one.scores = [score >> 1 for score in one.scores]
            worth = one.scores
        return min(range(WAYS), key=lambda way: (worth[way], (way - turn) % WAYS))

    # -- single keys

    def is_stale(self, key: int, epoch: int) -> bool:
        return max(self.stamps[stamp_of(key, len(self.stamps))], self.floor) > epoch

    def insert(
        self,
        key: int,
        row: bytes,
        *,
        epoch: int,
        admit: bool = False,
        make_room: bool = True,
    ) -> tuple[Outcome, int | None]:
        """Return what became of a key, and which key made room for it."""
        if self.is_stale(key, epoch):
            return Outcome.STALE, None
        n_set, way = self.place_for(key)
        one, outcome, gone = self.sets[n_set], Outcome.REPLACED, None
        if way is None:
            if 0 in one.digests:
                way, outcome = one.digests.index(0), Outcome.INSERTED
            elif self.policy == Policy.STATIC or not make_room:
                return Outcome.FULL, None
            elif admit and not self._seen(key):
                return Outcome.TURNED_AWAY, None
            else:
                way, outcome = self.victim(one), Outcome.EVICTED
                gone = one.keys[way]
            one.keys[way], one.digests[way] = key, digest_of(key)
            one.scores[way] = self.score_at_insert(one.scores[way])
        one.rows[way] = row
        one.wrote()
        return outcome, gone

    def _seen(self, key: int) -> bool:
        entry, mark = door_of(key, len(self.door)), door_mark_of(key)
        seen = self.door[entry] == mark
        self.door[entry] = mark
        return seen

    def count(self, outcome: Outcome) -> None:
        """Add one key of an insert to the totals."""
        self.totals["size"] += outcome == Outcome.INSERTED
        self.totals["inserted"] += outcome in (Outcome.INSERTED, Outcome.EVICTED)
        self.totals["evicted"] += outcome == Outcome.EVICTED
        self.totals["refused"] += outcome == Outcome.STALE

    def update(self, key: int, row: bytes, *, epoch: int) -> Outcome:
        self.stamps[stamp_of(key, len(self.stamps))] = epoch
        place = self.find(key)
        if place is None:
            return Outcome.ABSENT
        one = self.sets[place[0]]
        one.rows[place[1]] = row
        one.wrote()
        self.totals["updated"] += 1
        return Outcome.REPLACED

    def evict(self, key: int, *, epoch: int) -> Outcome:
        self.stamps[stamp_of(key, len(self.stamps))] = epoch
        place = self.find(key)
        if place is None:
            return Outcome.ABSENT
        one = self.sets[place[0]]
        one.digests[place[1]] = 0
        one.wrote()
        self.totals["size"] -= 1
        return Outcome.EVICTED

    def clear(self, *, epoch: int) -> None:
        self.floor = max(self.floor, epoch)
        for one in self.sets:
            self.totals["size"] -= sum(digest != 0 for digest in one.digests)
            one.digests = [0] * WAYS
            one.wrote()

    def dump(self, first: int, n_sets: int) -> set[int]:
        return {
            one.keys[way]
            for one in self.sets[first : first + n_sets]
            for way in range(WAYS)
            if one.digests[way]
        }


# -- a cache ------------------------------------------------------------------------


@dataclass
class Looked:
    """What a query of one table found."""

    places: list[tuple[int, int] | None]  # of each key
    rows: Array  # (n, dim) as handed out; of misses the default row
    unique_missing: list[int]  # in order of first occurrence
    n_unique_hits: int
    touched: Counter[tuple[int, int]]  # how often each way was hit

    @property
    def hit(self) -> Array:
        return np.array([place is not None for place in self.places], bool)


@dataclass
class Pooled:
    """What a pooled query of one table found; float64."""

    looked: Looked
    sums: Array  # (n_bags, dim)
    slack: Array  # what rounding to float32 at every step may make of it
    missed: list[int]  # bags with misses


class OracleCache:
    """Tables of one cache; see :class:`OracleTable`."""

    def __init__(
        self,
        rows: RowLayout,
        tables: Sequence[TableLayout],
        policy: Policy = Policy.LRU,
        *,
        rubbish: int = 0xA5,
    ) -> None:
        self.rows = rows
        row = bytes([rubbish]) * rows.row_bytes
        key = int.from_bytes(bytes([rubbish]) * 8, "little", signed=True)
        unused = Set(0, [0] * WAYS, [key] * WAYS, [0] * WAYS, [row] * WAYS)
        self.tables = [
            OracleTable(
                layout,
                policy,
                [unused.copy() for _ in range(layout.n_sets)],
                bytes(rows.row_bytes),
            )
            for layout in tables
        ]

    def query(self, n_table: int, keys: Sequence[int], *, touch: bool = True) -> Looked:
        """Look keys up; with ``touch`` hits count as uses, and the clock moves on."""
        table = self.tables[n_table]
        places = [table.find(key) for key in keys]
        missing: dict[int, None] = {}
        touched: Counter[tuple[int, int]] = Counter()
        packed = []
        for key, place in zip(keys, places, strict=True):
            if place is None:
                missing[key] = None
                packed.append(table.default)
                continue
            touched[place] += 1
            packed.append(table.sets[place[0]].rows[place[1]])
            if touch:
                table.touch(*place, len(keys))
        if touch:
            n_missing = places.count(None)
            table.clock += table.step(len(keys))
            table.totals["hits"] += len(keys) - n_missing
            table.totals["misses"] += n_missing
        rows = _unpacked(packed, self.rows)
        return Looked(places, rows, list(missing), len(touched), touched)

    def pooled_query(
        self,
        n_table: int,
        bags: Sequence[Sequence[int]],
        *,
        weights: Sequence[Sequence[float]] | None = None,
        mean: bool = False,
        fill: bool = False,
    ) -> Pooled:
        """Sum each bag's rows, over hits or, with ``fill``, over all keys."""
        looked = self.query(n_table, [key for bag in bags for key in bag])
        wanted = looked.hit | fill
        sums, slack = pool(looked.rows, bags, weights, mean=mean, wanted=wanted)
        ends = np.cumsum([0, *map(len, bags)])
        missed = [
            i for i in range(len(bags)) if not looked.hit[ends[i] : ends[i + 1]].all()
        ]
        return Pooled(looked, sums, slack, missed)


def pool(
    rows: Array,
    bags: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None,
    *,
    mean: bool,
    wanted: Array,
) -> tuple[Array, Array]:
    """Return each bag's sum over its wanted rows, and how far off float32 may be.

    A value is rounded when weight and scale, weight and row are multiplied, and at each
    of ``n`` additions; the scale itself has an error of two halves of a last place.
    """
    sums = np.zeros((len(bags), rows.shape[1]))
    slack = np.zeros_like(sums)
    start = 0
    for i, bag in enumerate(bags):
        chosen = np.flatnonzero(wanted[start : start + len(bag)])
        scale = 1 / len(bag) if mean and len(bag) else 1.0
        factors = np.full(len(chosen), scale)
        if weights is not None:
            factors *= np.asarray(weights[i], np.float64)[chosen]
        with np.errstate(invalid="ignore"):
            parts = rows[start + chosen].astype(np.float64) * factors[:, None]
            sums[i] = parts.sum(0)
            slack[i] = (len(bag) + 6) * (2.0**-24 * np.abs(parts).sum(0) + 2.0**-149)
        start += len(bag)
    return sums, slack


def scatter(
    out: Array, looked: Looked, keys: Sequence[int], fetched: dict[int, Array]
) -> Array:
    """Return ``out`` with fetched rows, as handed out, where their keys missed."""
    out = out.copy()
    for i, (key, place) in enumerate(zip(keys, looked.places, strict=True)):
        if place is None and key in fetched:
            out[i] = fetched[key]
    return out


def pooled_scatter(
    pooled: Pooled,
    bags: Sequence[Sequence[int]],
    fetched: dict[int, Array],
    *,
    weights: Sequence[Sequence[float]] | None = None,
    mean: bool = False,
) -> Pooled:
    """Return bags with fetched rows, as handed out, added where their keys missed."""
    keys = [key for bag in bags for key in bag]
    rows = pooled.looked.rows.copy()
    wanted = ~pooled.looked.hit & np.array([key in fetched for key in keys], bool)
    for i in np.flatnonzero(wanted):
        rows[i] = fetched[keys[i]]
    sums, slack = pool(rows, bags, weights, mean=mean, wanted=wanted)
    # What was there is added to once more, rounded once more.
    slack += pooled.slack + 2.0**-23 * np.abs(pooled.sums)
    return replace(pooled, sums=pooled.sums + sums, slack=slack)
