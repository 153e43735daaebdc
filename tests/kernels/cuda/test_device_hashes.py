"""What kernels derive from a key's hash, against the host's hash and Python."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from hps_numba.kernels.cuda.hashing import (
    claim_of,
    digest_of,
    door_mark_of,
    door_of,
    hash_key,
    second_set_of,
    set_of,
    stamp_of,
)
from hps_numba.kernels.cuda.ptx import load_u64, store_u64
from hps_numba.kernels.host import hashing as host
from tests.kernels.cuda import hashes
from tests.kernels.cuda.device_kernels import Array, run_threads

u64 = np.uint64

WORD = 2**64 - 1
N = 2048
HASH, DIGEST, STAMP, DOOR, MARK, CLAIM = range(6)
EXTREME_KEYS = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**31, 2**32, 2**63 - 2, 2**63 - 1]


def some_keys() -> Array:
    rng = np.random.default_rng(11)
    keys = rng.integers(-(2**63), 2**63, N, dtype=np.int64, endpoint=False)
    keys[: len(EXTREME_KEYS)] = EXTREME_KEYS
    keys[100:200] = np.arange(-50, 50)
    return keys


def derived_kernel(keys, masks, out):
    i = u64(cuda.grid(1))
    hashed = hash_key(load_u64(keys + i * u64(8)))
    mask = load_u64(masks + i * u64(8))
    out += i * u64(48)
    store_u64(out, hashed)
    store_u64(out + u64(8), u64(digest_of(hashed)))
    store_u64(out + u64(16), stamp_of(hashed, mask))
    store_u64(out + u64(24), door_of(hashed, mask))
    store_u64(out + u64(32), u64(door_mark_of(hashed)))
    store_u64(out + u64(40), claim_of(hashed, i, mask))


@pytest.fixture(scope="module")
def derived() -> Array:
    """Return uint64 (N, 6): what is derived from each of ``some_keys``."""
    out = np.full((N, 6), 0xEE, np.uint64)
    return run_threads(derived_kernel, N, some_keys(), masks(), out=out)


def masks() -> Array:
    """Return a mask a key, of 0 to 31 bits."""
    return np.array([2 ** (i % 32) - 1 for i in range(N)], np.uint64)


def test_a_kernel_hashes_a_key_as_the_host_does(derived: Array) -> None:
    keys = some_keys()
    assert derived[:, HASH].tolist() == [int(host.hash_key(key)) for key in keys]
    assert derived[:, HASH].tolist() == [hashes.hash_of(int(key)) for key in keys]


def test_stamps_doors_marks_and_claims_are_bits_of_the_hash(derived: Array) -> None:
    for i, key in enumerate(some_keys().tolist()):
        n = int(masks()[i]) + 1
        assert derived[i, DIGEST] == hashes.digest_of(key)
        assert derived[i, STAMP] == hashes.stamp_of(key, n)
        assert derived[i, DOOR] == hashes.door_of(key, n)
        assert derived[i, MARK] == hashes.door_mark_of(key)
        assert derived[i, CLAIM] == hashes.claim_of(key, i, n)


def marks_kernel(hashed, out):
    i = u64(cuda.grid(1))
    word = load_u64(hashed + i * u64(8))
    store_u64(out + i * u64(16), u64(digest_of(word)))
    store_u64(out + i * u64(16) + u64(8), u64(door_mark_of(word)))


@pytest.mark.parametrize(("column", "shift"), [(0, 0), (1, 36)])
def test_a_mark_takes_255_values_and_never_0(column: int, shift: int) -> None:
    around = np.random.default_rng(12).integers(0, 2**64, 1024, np.uint64)
    bits = np.arange(1024, dtype=np.uint64) % np.uint64(256) << np.uint64(shift)
    hashed = around & np.uint64(WORD ^ 0xFF << shift) | bits
    out = np.full((1024, 2), 0xEE, np.uint64)
    marks = run_threads(marks_kernel, 1024, hashed, out=out)[:, column].tolist()
    assert marks == [1 + bits * 255 // 256 for bits in range(256)] * 4
    # Two of 256 bit patterns share a mark, and no more.
    assert np.bincount(marks[:256]).tolist() == [0, 2, *[1] * 254]


def set_kernel(hashed, counts, out):
    i = u64(cuda.grid(1)) * u64(8)
    store_u64(out + i, set_of(load_u64(hashed + i), load_u64(counts + i)))


def test_a_set_is_the_hash_as_a_fraction_of_the_sets() -> None:
    rng = np.random.default_rng(13)
    hashed = rng.integers(0, 2**64, N, np.uint64)
    hashed[:64] = WORD
    hashed[64:128] = 0
    counts = rng.integers(1, 2**32 // 28, N, np.uint64)
    counts[:4] = counts[64:68] = [1, 2, 3, 2**32 // 28]
    counts[-4:] = [2**63, WORD, 2**32, 2**40 + 1]
    got = run_threads(set_kernel, N, hashed, counts, out=np.full(N, 0xEE, np.uint64))
    pairs = zip(hashed.tolist(), counts.tolist(), strict=True)
    assert got.tolist() == [one * n_sets >> 64 for one, n_sets in pairs]
    assert np.all(got < counts)


def second_set_kernel(keys, counts, out):
    i = u64(cuda.grid(1)) * u64(8)
    hashed = hash_key(load_u64(keys + i))
    store_u64(out + i, second_set_of(hashed, load_u64(counts + i)))


def test_a_second_set_is_any_but_the_home_set() -> None:
    rng = np.random.default_rng(14)
    keys, counts = some_keys(), rng.integers(1, 2**32 // 28, N, np.uint64)
    counts[:1024] = np.arange(1024) % 8 + 1
    counts[-8:] = 2**32 // 28
    got = run_threads(
        second_set_kernel, N, keys, counts, out=np.full(N, 0xEE, np.uint64)
    )
    for key, n_sets, second in zip(
        keys.tolist(), counts.tolist(), got.tolist(), strict=True
    ):
        assert second == hashes.second_set_of(key, n_sets) < n_sets
        assert (second == hashes.set_of(key, n_sets)) == (n_sets == 1)


def test_home_and_second_sets_are_spread_over_all_pairs_alike() -> None:
    n_sets, n = 16, 60_000
    times = np.zeros((n_sets, n_sets))
    for key in range(n):
        home = hashes.set_of(key, n_sets)
        times[home, hashes.second_set_of(key, n_sets)] += 1
    assert (np.diag(times) == 0).all()
    pairs = times[~np.eye(n_sets, dtype=bool)]
    chi2 = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    # Of 239 degrees of freedom: 239 is expected, and 311 exceeded once in 1,000.
    assert chi2 < 311


def bounds_kernel(counts, firsts, out):
    i = u64(cuda.grid(1)) * u64(8)
    n_sets, first = load_u64(counts + i), load_u64(firsts + i)
    store_u64(out + i * u64(2), set_of(u64(first - u64(1)), n_sets))
    store_u64(out + i * u64(2) + u64(8), set_of(first, n_sets))


def test_set_1_begins_where_the_fraction_does() -> None:
    counts = np.arange(2, 130, dtype=np.uint64)
    firsts = np.array([-(-(2**64) // int(n)) for n in counts], np.uint64)
    out = np.full((128, 2), 0xEE, np.uint64)
    got = run_threads(bounds_kernel, 128, counts, firsts, out=out)
    assert got.tolist() == [[0, 1]] * 128
