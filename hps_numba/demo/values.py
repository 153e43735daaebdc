"""The value that a row must have: a function of table, key and version.

Each value is 23 hashed bits scaled to [-0.5, 0.5): finite, exact in float32, and a
different one in each version but for one chance in 8 million. So half of one version
and half of another is no version at all. Version 0 means that the key is unknown; its
row is the default row, whose value lies outside that range.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNKNOWN = 0
"""Version of a key that no tier knows."""

MAX_DIM = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.random.default_rng(1).integers(
    1 << 62, 1 << 63, MAX_DIM, dtype=np.uint64
) | np.uint64(1)
_MANTISSA_BITS = 23
_ONE = np.uint32(0x3F800000)  # the bits of 1.0


def known_rows(
    salt: int,
    keys: NDArray[np.int64],
    versions: NDArray[np.int32] | int,
    *,
    dim: int,
    default: float,
) -> NDArray[np.float32]:
    """Return the rows that these versions of these keys have.

    Parameters
    ----------
    salt
        Distinguishes the tables of a model.
    keys
        int64 (n,).
    versions
        int32 (n,), or one version for all; ``UNKNOWN`` gives the default row.
    dim
        Values per row, at most ``MAX_DIM``.
    default
        Every value of the default row.

    Returns
    -------
    numpy.ndarray
        float32 (n, dim).
    """
    numbers = np.broadcast_to(np.asarray(versions, np.uint64), keys.shape)
    salts = np.full(1, salt, np.uint64)
    rows = _hashed_rows(_mix(_mix(keys.view(np.uint64), salts), numbers), dim)
    rows[numbers == UNKNOWN] = default
    return rows


def _mix(state: NDArray[np.uint64], more: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash two 64-bit words into one with the finaliser of splitmix64."""
    mixed = state + more * _GOLDEN + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _hashed_rows(states: NDArray[np.uint64], dim: int) -> NDArray[np.float32]:
    words = states[:, None] * _MULTIPLIERS[:dim]
    mantissas = (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.uint32)
    rows = (mantissas | _ONE).view(np.float32)
    rows -= np.float32(1.5)
    return rows
