from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from hps_numba.kernels.host.hashing import group_by_partition, hash_key

WORD = (1 << 64) - 1
INT64 = np.iinfo(np.int64)
EXTREME_KEYS = [INT64.min, INT64.min + 1, -1, 0, 1, INT64.max - 1, INT64.max]


def rotate_right(x: int, n: int) -> int:
    return ((x >> n) | (x << (64 - n))) & WORD


def reference_hash(key: int) -> int:
    """The mixer in unbounded integers, cut to 64 bits after each step."""
    x = key & WORD
    x ^= rotate_right(x, 25) ^ rotate_right(x, 50)
    x = (x * 0xA24BAED4963EE407) & WORD
    x ^= rotate_right(x, 24) ^ rotate_right(x, 49)
    x = (x * 0x9FB21C651E98DF25) & WORD
    return x ^ (x >> 28)


@njit
def hash_all(keys):
    hashes = np.empty(keys.size, np.uint64)
    for i in range(keys.size):
        hashes[i] = hash_key(keys[i])
    return hashes


def some_keys(n: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    wide = rng.integers(INT64.min, INT64.max, n, endpoint=True)
    return np.concatenate([np.array(EXTREME_KEYS), np.arange(-50, 50), wide])


def test_hash_equals_the_formula_in_unbounded_integers():
    keys = some_keys(20_000)
    assert hash_all(keys).tolist() == [reference_hash(k) for k in keys.tolist()]


def test_hash_never_changes():
    keys = np.array([0, 1, -1, INT64.min, INT64.max])
    assert hash_all(keys).tolist() == [
        0,
        985654925471400243,
        16399884477989705468,
        8202776869289805531,
        2387706527826741422,
    ]


@pytest.mark.parametrize("n_partitions", [1, 2, 3, 4, 7, 8, 16, 61, 1000])
def test_partition_is_the_hash_modulo_their_number(n_partitions):
    keys = some_keys(3_000)
    order, bounds = group_by_partition(keys, n_partitions)
    parts = np.array([reference_hash(k) % n_partitions for k in keys.tolist()])
    np.testing.assert_array_equal(order, np.argsort(parts, kind="stable"))
    counts = np.bincount(parts, minlength=n_partitions)
    np.testing.assert_array_equal(bounds, np.concatenate([[0], np.cumsum(counts)]))


@pytest.mark.parametrize("n_partitions", [1, 5])
def test_no_keys_give_empty_partitions(n_partitions):
    order, bounds = group_by_partition(np.empty(0, np.int64), n_partitions)
    assert order.tolist() == []
    assert bounds.tolist() == [0] * (n_partitions + 1)
