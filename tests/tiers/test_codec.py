"""The bytes of keys and rows."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps_numba.tiers.codec import (
    KEY_BYTES,
    decode_keys,
    decode_rows,
    encode_keys,
    encode_rows,
)
from hps_numba.tiers.testing.suite import EXTREME_KEYS, assert_same_bits, random_rows
from hps_numba.types import RowDtype, TableSpec

int64s = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(int64s | st.sampled_from(EXTREME_KEYS.tolist()), max_size=50))
def test_bytes_sort_like_keys_and_come_back(numbers: list[int]) -> None:
    keys = np.array(numbers, np.int64)
    encoded = encode_keys(keys)
    assert encoded == [struct.pack(">Q", key + (1 << 63)) for key in numbers]
    np.testing.assert_array_equal(decode_keys(sorted(encoded)), np.sort(keys))


def test_random_keys_sort_like_their_bytes() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 64, 10_000, np.uint64)
    keys = np.concatenate([bits.view(np.int64), EXTREME_KEYS])
    encoded = encode_keys(keys)
    assert set(map(len, encoded)) == {KEY_BYTES}
    order = sorted(range(keys.size), key=encoded.__getitem__)
    np.testing.assert_array_equal(keys[order], np.sort(keys))
    np.testing.assert_array_equal(decode_keys(encoded), keys)


@pytest.mark.parametrize("dtype", list(RowDtype))
@pytest.mark.parametrize("dim", [1, 3, 16, 128, 1000])
def test_rows_are_their_bytes_and_come_back(dim: int, dtype: RowDtype) -> None:
    spec = TableSpec("model", "table", dim, dtype)
    rows = random_rows(spec, 50)
    encoded = encode_rows(rows)
    assert encoded == [row.tobytes() for row in rows]
    assert_same_bits(decode_rows(encoded, dim, spec.numpy_dtype), rows)


def test_nothing_is_encoded_and_decoded() -> None:
    assert encode_keys(np.empty(0, np.int64)) == []
    assert decode_keys([]).shape == (0,)
    assert encode_rows(np.empty((0, 4), np.float32)) == []
    assert decode_rows([], 4, np.dtype(np.float32)).shape == (0, 4)
