# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""A simulation of the GPU cache's sets: what each rule of eviction would have hit.

It follows keys, scores, ticks and admission, batch by batch, and holds no rows. A batch
is looked up in the cache as it stood, occurrence by occurrence; then its unique misses
are inserted in a random order, as the warps of the insert kernel would.

Keys come as dense numbers ``0 .. n - 1`` with the hash of each, so that an exact LRU
list over the whole cache can keep an array entry a key. Compiled functions are typed by
Numba.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.hashing import hash_key
from hps_numba.types import Keys

LRU, LFU, STATIC, EXACT_LRU = range(4)
LOWEST_WAY, ROTATING = range(2)
NO_AGEING, SUBTRACT, HALVE = range(3)

WAYS = 28

_SEED = 20_240_601
_EMPTY = np.int32(-1)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_GREATEST = 255  # of a score that is a byte


class Stream(NamedTuple):
    """Keys in the order of their lookups, int32, and the hash of each number."""

    numbers: NDArray[np.int32]
    hashes: NDArray[np.uint64]


class Rules(NamedTuple):
    """What decides which row leaves, and which may enter.

    Parameters
    ----------
    score
        ``LRU`` (a byte of the epoch), ``LFU`` (a byte that counts logarithmically),
        ``STATIC`` (no row leaves) or ``EXACT_LRU`` (the time itself, of any width).
    tick
        Keys of one epoch.
    capped
        1 if a batch moves the clock by one epoch at most, 0 if by all its keys.
    early
        1 if a batch moves the clock before it is looked up, so that its hits and its
        inserts have one epoch; 0 if between the two.
    aged
        Age of a new row, in epochs.
    tie
        Of equal scores the ``LOWEST_WAY`` leaves, or each in turn (``ROTATING``).
    clamp
        Greatest age that an insert leaves in a full set; 255 leaves ages alone.
    log_shift, start
        A hit of a row that counts c adds one with probability
        ``2 ** -(c >> log_shift)``; a new row counts ``start``.
    once
        1 if the occurrences of a key in a batch count as one.
    ageing, period
        How counts fall: not at all; by what the leaving row had above ``start``
        (``SUBTRACT``); by half, after ``period`` writes to the set (``HALVE``).
    door
        Bytes of the doorkeeper, a power of two; 0 admits every key at first sight.
    """

    score: int = LRU
    tick: int = 65_536
    capped: int = 1
    early: int = 1
    aged: int = 2
    tie: int = ROTATING
    clamp: int = _GREATEST
    log_shift: int = 3
    start: int = 1
    once: int = 0
    ageing: int = HALVE
    period: int = 2 * WAYS
    door: int = 0


class Sets(NamedTuple):
    """The cache: of every slot its key or -1 and its score, of every set its writes."""

    keys: NDArray[np.int32]
    scores: NDArray[np.int64]
    writes: NDArray[np.int64]
    door: NDArray[np.uint8]
    clock: NDArray[np.int64]


class Counts(NamedTuple):
    """What happened, in keys; ``stamps`` are scores that hits changed."""

    keys: int
    hits: int
    unique: int
    unique_hits: int
    inserts: int
    stamps: int


class _Progress(NamedTuple):
    seen: Any  # of every key the batch it was last seen in
    missing: Any  # unique misses of the batch
    counts: Any  # as Counts


def stream_of(keys: Keys) -> Stream:
    """Return a sequence of lookups with its keys numbered."""
    unique, numbers = np.unique(keys, return_inverse=True)
    return Stream(numbers.astype(np.int32), hashes_of(unique))


def new_sets(slots: int, rules: Rules, ways: int = WAYS) -> Sets:
    """Return an empty cache of as many sets as ``slots`` need."""
    n_sets = -(-slots // ways)
    return Sets(
        np.full((n_sets, ways), _EMPTY, np.int32),
        np.zeros((n_sets, ways), np.int64),
        np.zeros(n_sets, np.int64),
        np.zeros(max(rules.door, 1), np.uint8),
        np.zeros(1, np.int64),
    )


def replay(
    stream: Stream, sets: Sets, rules: Rules, *, batch: int, warm: int = 0
) -> Counts:
    """Look up all whole batches; count what happens after the first ``warm``."""
    return Counts(*_replay(stream, sets, rules, batch, warm).tolist())


def replay_whole_lru(
    stream: Stream, capacity: int, *, batch: int, warm: int = 0
) -> Counts:
    """Do as ``replay`` with one exact LRU list; a batch touches in order of sight."""
    return Counts(*_replay_whole_lru(stream, capacity, batch, warm).tolist())


@njit(cache=True)
def hashes_of(keys):
    """Return the hash of each int64 key."""
    out = np.empty(keys.size, np.uint64)
    for i in range(keys.size):
        out[i] = hash_key(keys[i])
    return out


@njit(cache=True, inline="always")
def set_of(hashed, n_sets):
    """Return the high word of the 128-bit product of a hash and the number of sets."""
    n = np.uint64(n_sets)
    low = ((hashed & _LOW_WORD) * n) >> np.uint64(32)
    return np.int64(((hashed >> np.uint64(32)) * n + low) >> np.uint64(32))


@njit(cache=True)
def _replay(stream, sets, rules, batch, warm):
    np.random.seed(_SEED)
    progress = _Progress(
        np.full(stream.hashes.size, np.int64(-1)),
        np.empty(batch, np.int32),
        np.zeros(6, np.int64),
    )
    for b in range(stream.numbers.size // batch):
        if b == warm:
            progress.counts[:] = 0
        if rules.early:
            _advance(sets.clock, batch, rules)
        part = stream.numbers[b * batch : (b + 1) * batch]
        n_missing = _query(part, b, stream.hashes, sets, rules, progress)
        if not rules.early:
            _advance(sets.clock, batch, rules)
        _shuffle(progress.missing, n_missing)
        for key in progress.missing[:n_missing]:
            progress.counts[4] += _insert(key, stream.hashes[key], sets, rules)
    return progress.counts


@njit(cache=True)
def _query(part, b, hashes, sets, rules, progress):
    """Count hits, touch them, and list the unique misses; return how many."""
    seen, missing, counts = progress.seen, progress.missing, progress.counts
    n_missing = 0
    for i in range(part.size):
        key = part[i]
        s = set_of(hashes[key], sets.writes.size)
        way = _find(sets.keys[s], key)
        first = seen[key] != b
        seen[key] = b
        counts[0] += 1
        counts[2] += first
        if way >= 0:
            counts[1] += 1
            counts[3] += first
            if first or not rules.once:
                now = sets.clock[0] + i * (rules.score == EXACT_LRU)
                counts[5] += _touch(sets.scores[s], way, now, rules)
        elif first:
            missing[n_missing] = key
            n_missing += 1
    return n_missing


@njit(cache=True, inline="always")
def _find(keys, key):
    for way in range(keys.size):
        if keys[way] == key:
            return way
    return -1


@njit(cache=True)
def _touch(scores, way, now, rules):
    """Score a hit; return whether that changed the score."""
    old = scores[way]
    if rules.score == LRU:
        scores[way] = _epoch(now, rules)
    elif rules.score == EXACT_LRU:
        scores[way] = now
    elif (
        rules.score == LFU
        and old < _GREATEST
        and np.random.random() < 2.0 ** -(old >> rules.log_shift)
    ):
        scores[way] = old + 1
    return scores[way] != old


@njit(cache=True, inline="always")
def _epoch(clock, rules):
    return (clock // rules.tick) & 255


@njit(cache=True)
def _advance(clock, n, rules):
    clock[0] += min(n, rules.tick) if rules.capped else n


@njit(cache=True)
def _shuffle(values, n):
    for i in range(n - 1, 0, -1):
        j = np.random.randint(0, i + 1)
        values[i], values[j] = values[j], values[i]


@njit(cache=True)
def _insert(key, hashed, sets, rules):
    """Insert an absent key; return whether it was let in."""
    s, clock = set_of(hashed, sets.writes.size), sets.clock[0]
    keys, scores = sets.keys[s], sets.scores[s]
    way = _find(keys, _EMPTY)
    if way < 0:
        if rules.score == STATIC:
            return False
        if rules.door > 0 and not _second_sight(sets.door, hashed):
            return False
        way = _leaving_way(scores, sets.writes[s], clock, rules)
    keys[way] = key
    if rules.score == LRU:
        scores[way] = (_epoch(clock, rules) - rules.aged) & 255
    else:
        scores[way] = clock if rules.score == EXACT_LRU else rules.start
    sets.writes[s] += 1
    return True


@njit(cache=True)
def _second_sight(door, hashed):
    """Return whether the door holds this key's mark; leave the mark there."""
    place = (hashed >> np.uint64(16)) & np.uint64(door.size - 1)
    mark = max(np.uint8(hashed >> np.uint64(8)), np.uint8(1))
    known = door[place] == mark
    door[place] = mark
    return known


@njit(cache=True)
def _leaving_way(scores, writes, clock, rules):
    """Choose the row that leaves a full set, and age the others."""
    if (
        rules.score == LFU
        and rules.ageing == HALVE
        and (writes + 1) % rules.period == 0
    ):
        scores >>= 1
    way = _least(scores, writes, clock, rules)
    if rules.score == LFU and rules.ageing == SUBTRACT and scores[way] > rules.start:
        scores -= scores[way] - rules.start
    elif rules.score == LRU and rules.clamp < _GREATEST:
        epoch = _epoch(clock, rules)
        for w in range(scores.size):
            if ((epoch - scores[w]) & 255) > rules.clamp:
                scores[w] = (epoch - rules.clamp) & 255
    return way


@njit(cache=True)
def _least(scores, writes, clock, rules):
    """Return the way with the least score, ties broken as the rules say."""
    ways = scores.size
    way = writes % ways if rules.tie == ROTATING else 0
    best, least = way, np.int64(1) << 62
    for _ in range(ways):
        rank = scores[way]
        if rules.score == LRU:
            rank = -((_epoch(clock, rules) - rank) & 255)
        if rank < least:
            best, least = way, rank
        way = way + 1 if way + 1 < ways else 0
    return best


@njit(cache=True)
def _replay_whole_lru(stream, capacity, batch, warm):
    n_keys = stream.hashes.size
    # A ring of all cached keys, from the last touched to the next to leave and back;
    # entry n_keys is where it begins and ends.
    after = np.full(n_keys + 1, n_keys, np.int64)
    before = np.full(n_keys + 1, n_keys, np.int64)
    cached = np.zeros(n_keys, np.bool_)
    seen = np.full(n_keys, np.int64(-1))
    counts = np.zeros(6, np.int64)
    unique, room = np.empty(batch, np.int64), capacity
    for b in range(stream.numbers.size // batch):
        if b == warm:
            counts[:] = 0
        n_unique = 0
        for key in stream.numbers[b * batch : (b + 1) * batch]:
            counts[0] += 1
            counts[1] += cached[key]
            if seen[key] != b:
                seen[key] = b
                unique[n_unique] = key
                n_unique += 1
                counts[3] += cached[key]
        counts[2] += n_unique
        for key in unique[:n_unique]:
            if cached[key]:
                _unlink(after, before, key)
            else:
                counts[4] += 1
                cached[key] = True
                room -= 1
            _link_first(after, before, key)
            if room < 0:
                last = before[n_keys]
                _unlink(after, before, last)
                cached[last] = False
                room += 1
    return counts


@njit(cache=True)
def _unlink(after, before, key):
    after[before[key]] = after[key]
    before[after[key]] = before[key]


@njit(cache=True)
def _link_first(after, before, key):
    end = after.size - 1
    after[key], before[key] = after[end], end
    before[after[end]] = key
    after[end] = key
