"""The bytes of keys and rows in byte-ordered stores.

A key is its int64 value, big-endian, with the sign bit flipped, so that byte order is
key order. A row is its values as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hps_numba.types import Keys, Rows

KEY_BYTES = 8
_SIGN = np.uint64(1 << 63)


def encode_keys(keys: Keys) -> list[bytes]:
    """Return each key of int64 (n,) as 8 bytes that sort like the keys."""
    flipped = keys.view(np.uint64) ^ _SIGN
    encoded: list[bytes] = flipped.astype(">u8").view("V8").tolist()
    return encoded


def decode_keys(encoded: Sequence[bytes]) -> Keys:
    """Return the int64 (n,) keys that ``encode_keys`` encoded."""
    flipped = np.frombuffer(b"".join(encoded), ">u8").astype(np.uint64)
    keys: Keys = (flipped ^ _SIGN).view(np.int64)
    return keys


def encode_rows(rows: Rows) -> list[bytes]:
    """Return the bytes of each row of a C-contiguous (n, dim) array."""
    row = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    encoded: list[Any] = rows.view(row).ravel().tolist()
    return encoded


def decode_rows(encoded: Sequence[bytes], dim: int, dtype: np.dtype[Any]) -> Rows:
    """Return rows (n, dim) from their bytes; read-only, all of one width."""
    return np.frombuffer(b"".join(encoded), dtype).reshape(len(encoded), dim)
