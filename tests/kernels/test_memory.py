from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from hps_numba.kernels.host.memory import (
    copy_row,
    count_leading_zeros,
    load_pair,
    load_word,
    move_bytes,
)
from hps_numba.kernels.host.scatter import scatter_rows


@njit
def copy_between(dst, src, dst_offset, src_offset, n_bytes):
    copy_row(
        np.int64(dst.ctypes.data) + dst_offset,
        np.int64(src.ctypes.data) + src_offset,
        n_bytes,
    )


@njit
def word_and_pair_at(data, offset):
    address = np.int64(data.ctypes.data) + offset
    return load_word(address), load_pair(address)


@njit
def move_within(data, dst_offset, src_offset, n_bytes):
    base = np.int64(data.ctypes.data)
    move_bytes(base + dst_offset, base + src_offset, n_bytes)


@njit
def leading_zeros_of(words):
    counts = np.empty(words.size, np.int64)
    for i in range(words.size):
        counts[i] = count_leading_zeros(words[i])
    return counts


def test_copy_row_copies_each_width_and_nothing_around_it():
    rng = np.random.default_rng(1)
    src = rng.integers(0, 256, 1_400, dtype=np.uint8)
    for n_bytes in range(1, 601):
        dst_offset, src_offset = rng.integers(1, 400, 2)
        dst = rng.integers(0, 256, 1_400, dtype=np.uint8)
        expected = dst.copy()
        expected[dst_offset : dst_offset + n_bytes] = src[
            src_offset : src_offset + n_bytes
        ]
        copy_between(dst, src, dst_offset, src_offset, n_bytes)
        np.testing.assert_array_equal(dst, expected)


@pytest.mark.parametrize("n_bytes", [4_000, 40_001])
def test_copy_row_copies_long_rows(n_bytes):
    src = np.random.default_rng(2).integers(0, 256, n_bytes + 2, dtype=np.uint8)
    dst = np.zeros(n_bytes + 2, np.uint8)
    copy_between(dst, src, 1, 1, n_bytes)
    np.testing.assert_array_equal(dst[1:-1], src[1:-1])
    assert dst[0] == dst[-1] == 0


def test_count_leading_zeros_on_random_words_and_every_power_of_two():
    rng = np.random.default_rng(3)
    shifts = rng.integers(0, 63, 5_000)
    random = rng.integers(1, np.iinfo(np.int64).max, 5_000) >> shifts
    powers = np.int64(1) << np.arange(63, dtype=np.int64)
    words = np.concatenate([random[random > 0], powers, powers - 1, [-1]])
    words = words[words != 0]
    expected = [64 - (w & (1 << 64) - 1).bit_length() for w in words.tolist()]
    assert leading_zeros_of(words).tolist() == expected


@pytest.mark.parametrize("row_bytes", [1, 2, 4, 31, 32, 33, 64, 400, 513, 4_000])
def test_scatter_copies_found_rows_to_all_who_asked(row_bytes):
    rng = np.random.default_rng(row_bytes)
    rows = rng.integers(0, 256, (50, row_bytes), dtype=np.uint8)
    row_found = rng.random(50) < 0.6
    targets = rng.permutation(300)[:200]
    sources = rng.integers(0, 50, 200)
    out = rng.integers(0, 256, (300, row_bytes), dtype=np.uint8)
    found = rng.random(300) < 0.1
    expected_out, expected_found, copied = out.copy(), found.copy(), 0
    for source, target in zip(sources, targets, strict=True):
        if row_found[source]:
            expected_out[target] = rows[source]
            expected_found[target] = True
            copied += 1
    assert scatter_rows(rows, row_found, sources, targets, out, found) == copied
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_array_equal(found, expected_found)


def test_loads_of_any_alignment_have_the_first_byte_lowest():
    data = np.random.default_rng(4).integers(0, 256, 64, dtype=np.uint8)
    for offset in range(57):
        word, pair = word_and_pair_at(data, offset)
        assert int(word) == int.from_bytes(
            data[offset : offset + 8].tobytes(), "little"
        )
        assert int(pair) == int.from_bytes(
            data[offset : offset + 2].tobytes(), "little"
        )


@pytest.mark.parametrize("shift", [-300, -9, -1, 0, 1, 9, 300])
def test_bytes_may_move_onto_themselves(shift):
    data = np.random.default_rng(5).integers(0, 256, 2_000, dtype=np.uint8)
    for n_bytes in (0, 1, 8, 100, 1_000):
        expected = data.copy()
        expected[500 + shift : 500 + shift + n_bytes] = data[500 : 500 + n_bytes]
        move_within(data, 500 + shift, 500, n_bytes)
        np.testing.assert_array_equal(data, expected)
