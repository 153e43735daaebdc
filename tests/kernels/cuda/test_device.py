"""What kernels have in common, on many words, against plain Python."""

from __future__ import annotations

import itertools

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.device import (
    equal_bytes,
    first_bit,
    lanes_below,
    matching_ways,
)
from hps_numba.kernels.cuda.layout import WAYS
from hps_numba.kernels.cuda.ptx import load_quad, load_u32, store_u8, store_u32
from tests.kernels.cuda.device_kernels import Array, run_threads

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
