"""What kernels have in common, on many words, against plain Python."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numba import cuda

from hps_numba.kernels.cuda.device import (
    BUSY,
    equal_bytes,
    first_bit,
    lanes_below,
    lock_set,
    matching_ways,
    probe,
    reserve,
    segment,
    unlock_set,
    way_in_locked,
)
from hps_numba.kernels.cuda.layout import WAYS
from hps_numba.kernels.cuda.ptx import (
    load_quad,
    load_u32,
    load_u64,
    store_u8,
    store_u32,
    store_u64,
)
from tests.kernels.cuda.device_kernels import Array, run_threads
from tests.kernels.cuda.race_scenarios import SCHEDULES, WEAK_SCHEDULES

u32, u64 = np.uint32, np.uint64

# Where a borrow or a carry would run from one byte into the next.
EDGES = [0x00, 0x01, 0x7F, 0x80, 0x81, 0xFE, 0xFF]


def random_words(seed: int, n: int) -> Array:
    return np.random.default_rng(seed).integers(0, 2**32, n, np.uint32)


def edge_words() -> Array:
    """Return every word of four bytes from ``EDGES``."""
    words = np.array(list(itertools.product(EDGES, repeat=4)), np.uint8)
    return words.view(np.uint32).ravel()


def equal_bytes_of(words: Array, patterns: Array) -> Array:
    """Return 4 bits for each pair, from the bytes one by one."""
    same = words.view(np.uint8).reshape(-1, 4) == patterns.view(np.uint8).reshape(-1, 4)
    return (same @ np.array([1, 2, 4, 8])).astype(np.uint8)


def every_digest_kernel(words, out):
    i = u64(cuda.grid(1))
    word = load_u32(words + i * u64(4))
    for digest in range(256):
        pattern = u32(u32(digest) * u32(0x01010101))
        store_u8(out + i * u64(256) + u64(digest), equal_bytes(word, pattern))


def test_the_bytes_equal_to_a_digest_are_found_for_all_digests() -> None:
    words = np.concatenate([edge_words(), random_words(1, 2048)])
    words = words[: len(words) // 128 * 128]
    out = np.full((len(words), 256), 0xEE, np.uint8)
    got = run_threads(every_digest_kernel, len(words), words, out=out)
    patterns = np.arange(256, dtype=np.uint32) * np.uint32(0x01010101)
    pairs = np.broadcast_arrays(words[:, None], patterns[None, :])
    expected = equal_bytes_of(*(np.ascontiguousarray(one).ravel() for one in pairs))
    np.testing.assert_array_equal(got.ravel(), expected)


def pairs_kernel(words, patterns, out):
    i = u64(cuda.grid(1))
    word, pattern = load_u32(words + i * u64(4)), load_u32(patterns + i * u64(4))
    store_u8(out + i, equal_bytes(word, pattern))


def test_no_byte_disturbs_its_neighbour() -> None:
    differ = np.tile(edge_words(), 8)
    differ = differ[: len(differ) // 128 * 128]
    patterns = random_words(2, len(differ))
    words = patterns ^ differ
    out = np.full(len(words), 0xEE, np.uint8)
    got = run_threads(pairs_kernel, len(words), words, patterns, out=out)
    np.testing.assert_array_equal(got, equal_bytes_of(words, patterns))


def ways_kernel(sectors, digests, out):
    i = u64(cuda.grid(1))
    low = load_quad(sectors + i * u64(32))
    high = load_quad(sectors + i * u64(32) + u64(16))
    digest = load_u32(digests + i * u64(4))
    store_u32(out + i * u64(4), matching_ways(low, high, digest))


def test_the_ways_of_a_digest_are_found_in_a_set() -> None:
    n = 2048
    rng = np.random.default_rng(3)
    digests = np.arange(n, dtype=np.uint32) % 256
    sectors = rng.integers(0, 256, (n, 32), np.uint8)
    near = rng.choice([0, 1, 0x7F, 0x80, 0xFF], sectors.shape).astype(np.uint8)
    wanted = digests[:, None].astype(np.uint8)
    sectors = np.where(rng.random(sectors.shape) < 0.5, wanted ^ near, sectors)
    sectors[:256] = wanted[:256]  # in all ways
    sectors[256:512, 4:] = ~wanted[256:512]  # in none, although in seq
    out = np.full(n, 0xEEEEEEEE, np.uint32)
    got = run_threads(ways_kernel, n, sectors, digests, out=out)
    same = sectors[:, 4:] == wanted
    expected = same.astype(np.uint32) @ (1 << np.arange(WAYS, dtype=np.uint32))
    np.testing.assert_array_equal(got, expected)
    assert {0, 2**WAYS - 1} < set(got.tolist())


def bits_kernel(words, out):
    i = u64(cuda.grid(1)) * u64(4)
    store_u32(out + i, first_bit(load_u32(words + i)))


def test_the_first_bit_is_the_lowest_that_is_set() -> None:
    places = np.arange(2048) % 32
    words = random_words(4, 2048) | np.uint32(1)
    words[:32] = 1
    words = words << places.astype(np.uint32)
    words[32:64] |= np.uint32(1 << 31)
    out = np.full(2048, 0xEEEEEEEE, np.uint32)
    got = run_threads(bits_kernel, len(words), words, out=out)
    np.testing.assert_array_equal(got, places)


def below_kernel(out):
    lane = u32(cuda.laneid)
    store_u32(out + u64(lane) * u64(4), lanes_below(lane))


def test_the_lanes_below_are_those_before_a_lane() -> None:
    got = run_threads(below_kernel, 32, out=np.full(32, 0xEEEEEEEE, np.uint32))
    assert got.tolist() == [2**lane - 1 for lane in range(32)]


def segment_kernel(offsets, out):
    i = u64(cuda.grid(1))
    start, end = segment(offsets, i, u64(1 << 40))
    store_u64(out + i * u64(48), start)
    store_u64(out + i * u64(48) + u64(8), end)
    start, end = segment(u64(0), i, u32(1000))
    store_u64(out + i * u64(48) + u64(16), start)
    store_u64(out + i * u64(48) + u64(24), end)
    start, end = segment(offsets, i, u64(1 << 39))
    store_u64(out + i * u64(48) + u64(32), start)
    store_u64(out + i * u64(48) + u64(40), end)


def test_a_segment_is_what_the_offsets_say_or_all() -> None:
    offsets = np.sort(np.random.default_rng(5).integers(0, 2**40, 33, np.uint64))
    out = np.full((32, 6), 0xEE, np.uint64)
    got = run_threads(segment_kernel, 32, offsets, out=out)
    np.testing.assert_array_equal(got[:, 0], offsets[:-1])
    np.testing.assert_array_equal(got[:, 1], offsets[1:])
    assert got[:, 2:4].tolist() == [[0, 1000]] * 32
    # Offsets that promise more than there is give no more.
    np.testing.assert_array_equal(got[:, 4], np.minimum(offsets[:-1], 1 << 39))
    np.testing.assert_array_equal(got[:, 5], np.minimum(offsets[1:], 1 << 39))


def reserve_kernel(masks, out):
    thread, lane = u64(cuda.grid(1)), u32(cuda.laneid)
    lanes = load_u32(masks + (thread >> u64(5)) * u64(4))
    if lanes != u32(0):
        place = reserve(out, lanes, lane)
        if (u32(lanes >> lane) & u32(1)) != u32(0):
            store_u32(out + u64(4) + thread * u64(4), place)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_warps_reserve_distinct_places_in_the_order_of_lanes(
    schedule: dict[str, Any],
) -> None:
    n_warps, first = 64, 2**32 - 100  # the counter passes its end
    masks = random_words(6, n_warps) & random_words(7, n_warps)
    masks[:6] = [0, 1, 1 << 31, 0xFFFFFFFF, 0xFFFFFFFF, 0x80000001]
    out = np.full(1 + 32 * n_warps, 0xEEEEEEEE, np.uint32)
    out[0] = first
    got = run_threads(reserve_kernel, 32 * n_warps, masks, out=out, **schedule)
    taken = (masks[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)
    places = got[1:].reshape(n_warps, 32)
    assert np.all(places[~taken] == 0xEEEEEEEE)
    numbers = (places - np.uint32(first))[taken]
    assert sorted(numbers.tolist()) == list(range(taken.sum()))
    assert int(got[0]) == (first + int(taken.sum())) % 2**32
    for lanes, row in zip(taken, places, strict=True):
        assert np.all(np.diff(row[lanes]) == 1)


def crowd_kernel(out):
    lane = u32(cuda.laneid)
    seq = lock_set(out)
    mine = out + u64(64) + u64(lane) * u64(4)
    store_u32(mine, u32(load_u32(mine) + u32(1)))
    if lane == u32(5):
        turn = load_u32(out + u64(4))
        store_u32(out + u64(256) + u64(turn) * u64(4), seq)
        store_u32(out + u64(4), u32(turn + u32(1)))
    unlock_set(out, u32(seq + u32(2)))


@pytest.mark.parametrize("schedule", [*SCHEDULES, *WEAK_SCHEDULES], ids=str)
@pytest.mark.parametrize("seq", [0, 2**32 - 20])
def test_one_warp_at_a_time_holds_a_set(seq: int, schedule: dict[str, Any]) -> None:
    n_warps = 20
    out = np.zeros(64 + n_warps, np.uint32)
    out[0] = seq
    got = run_threads(crowd_kernel, 32 * n_warps, out=out, block=64, **schedule)
    assert int(got[0]) == (seq + 2 * n_warps) % 2**32
    assert got[1] == n_warps
    assert got[16:48].tolist() == [n_warps] * 32
    # Each turn began with the even number that the one before had left.
    assert got[64:].tolist() == [(seq + 2 * i) % 2**32 for i in range(n_warps)]


def held_kernel(out):
    thread = u64(cuda.grid(1))
    store_u32(out + u64(64) + thread * u64(4), lock_set(out))


@pytest.mark.parametrize("seq", [1, 7, 2**32 - 1])
def test_a_warp_gives_up_on_a_set_that_stays_odd(seq: int) -> None:
    out = np.full(16 + 64, 0xEEEEEEEE, np.uint32)
    out[0] = seq
    got = run_threads(held_kernel, 64, out=out, block=32)
    assert got[16:].tolist() == [BUSY] * 64
    np.testing.assert_array_equal(got[:16], out[:16])


def test_a_lock_makes_a_set_odd_and_tells_all_lanes_the_number_before() -> None:
    out = np.full(16 + 32, 0xEEEEEEEE, np.uint32)
    out[0] = 2**32 - 2
    got = run_threads(held_kernel, 32, out=out)
    assert got[16:].tolist() == [2**32 - 2] * 32
    assert got[0] == 2**32 - 1
    np.testing.assert_array_equal(got[1:16], out[1:16])


def probe_kernel(metas, keys, wanted, out):
    i = u64(cuda.grid(1))
    key = load_u64(wanted + i * u64(16))
    digest = u32(load_u64(wanted + i * u64(16) + u64(8)))
    way, seq = probe(metas + i * u64(64), keys + i * u64(WAYS * 8), key, digest)
    store_u32(out + i * u64(8), way)
    store_u32(out + i * u64(8) + u64(4), seq)


def locked_kernel(metas, keys, wanted, out):
    lane, n_set = u32(cuda.laneid), u64(cuda.grid(1)) >> u64(5)
    key = load_u64(wanted + n_set * u64(16))
    digest = u32(load_u64(wanted + n_set * u64(16) + u64(8)))
    meta, slots = metas + n_set * u64(64), keys + n_set * u64(WAYS * 8)
    way, mine = way_in_locked(meta, slots, key, digest, lane)
    store_u32(out + u64(cuda.grid(1)) * u64(8), way)
    store_u32(out + u64(cuda.grid(1)) * u64(8) + u64(4), mine)


def sets_to_search(n: int) -> tuple[Array, Array, Array, Array]:
    """Return metadata and keys of sets, what to look for there, and in which way it is.

    Digests are few, so that a set has several ways of the digest that is looked for;
    the key lies in other ways, too, whose digest is another one.
    """
    rng = np.random.default_rng(8)
    metas = rng.integers(0, 256, (n, 64), np.uint8)
    metas[:, 4 : 4 + WAYS] = rng.choice([0, 1, 2, 0x80, 0xFF], (n, WAYS))
    keys = rng.integers(0, 2**64, (n, WAYS), np.uint64)
    wanted = np.empty((n, 2), np.uint64)
    wanted[:, 0] = rng.choice(np.array([0, 2**64 - 1, 77, 2**32 + 77], np.uint64), n)
    wanted[:, 1] = rng.choice([1, 2, 0x80, 0xFF], n)
    same = metas[:, 4 : 4 + WAYS] == wanted[:, 1:]
    keys = np.where(~same & (rng.random(keys.shape) < 0.5), wanted[:, :1], keys)
    ways = np.full(n, WAYS, np.uint32)
    for i in range(0, n, 2):
        if same[i].any():
            ways[i] = rng.choice(np.flatnonzero(same[i]))
            keys[i, ways[i]] = wanted[i, 0]
    return metas, keys, wanted, ways


def test_a_probe_finds_a_key_by_digest_and_key_unless_a_writer_is_there() -> None:
    n = 2048
    metas, keys, wanted, ways = sets_to_search(n)
    out = np.full((n, 2), 0xEEEEEEEE, np.uint32)
    got = run_threads(probe_kernel, n, metas, keys, wanted, out=out)
    seqs = metas[:, :4].copy().view(np.uint32).ravel()
    np.testing.assert_array_equal(got[:, 1], seqs)
    np.testing.assert_array_equal(got[:, 0], np.where(seqs % 2 == 1, WAYS, ways))
    assert set(got[:, 0].tolist()) == set(range(WAYS + 1))


def test_a_warp_that_holds_a_set_finds_the_key_whatever_the_number() -> None:
    n = 512
    metas, keys, wanted, ways = sets_to_search(n)
    out = np.full((n, 32, 2), 0xEEEEEEEE, np.uint32)
    got = run_threads(locked_kernel, 32 * n, metas, keys, wanted, out=out)
    np.testing.assert_array_equal(got[:, :, 0], np.repeat(ways[:, None], 32, axis=1))
    np.testing.assert_array_equal(got[:, :WAYS, 1], metas[:, 4 : 4 + WAYS])
    assert np.all(got[:, WAYS:, 1] == 255)
