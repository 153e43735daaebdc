"""What the contract's tests stand on: a tier, its back doors, and sample rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Mask, Rows, TableSpec

SPEC = TableSpec("model", "table", 4)
INT64 = np.iinfo(np.int64)
EXTREME_KEYS = np.array([INT64.min, INT64.min + 1, -1, 0, 1, INT64.max], np.int64)


class TierSuite:
    """Base of the contract's parts.

    A subclass says how its tier is made, and how the store beneath it is written and
    read without the tier's own methods.
    """

    persistent: ClassVar[bool] = False
    """Whether a tier made again in the same directory has the rows of the last one."""

    def make_tier(self, directory: Path) -> Tier:
        """Return a tier without a budget; ``directory`` is its own and may be new."""
        raise NotImplementedError

    def write_beneath(self, tier: Tier, tag: str, keys: Keys, rows: Rows) -> None:
        """Store rows of an open table by a back door."""
        raise NotImplementedError

    def read_beneath(self, tier: Tier, tag: str, keys: Keys) -> tuple[Rows, Mask]:
        """Return rows (n, dim) by a back door, and which of them are there."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """Yield a tier with the empty table ``SPEC``."""
        tier = self.make_tier(tmp_path / "tier")
        tier.open_table(SPEC)
        yield tier
        tier.close()


def keys_of(*keys: int) -> Keys:
    """Return a key array."""
    return np.array(keys, np.int64)


def random_rows(spec: TableSpec, n_rows: int, seed: int = 0) -> Rows:
    """Return rows of random bits: NaNs with payloads and subnormals among them."""
    bits = np.random.default_rng(seed).bytes(n_rows * spec.row_bytes)
    return np.frombuffer(bits, spec.numpy_dtype).reshape(n_rows, spec.dim)


def filled_rows(spec: TableSpec, n_rows: int, value: float) -> Rows:
    """Return rows whose values are all ``value``."""
    return np.full((n_rows, spec.dim), value, spec.numpy_dtype)


def fetch(tier: Tier, spec: TableSpec, keys: Keys) -> tuple[Rows, Mask]:
    """Fetch into zeros and check the returned count."""
    out = np.zeros((keys.size, spec.dim), spec.numpy_dtype)
    found = np.zeros(keys.size, np.bool_)
    assert tier.fetch(spec.tag, keys, out, found) == np.count_nonzero(found)
    return out, found


def assert_same_bits(actual: Rows, expected: Rows) -> None:
    """Compare rows bit by bit, since a NaN equals nothing."""
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(np.uint8),
        np.ascontiguousarray(expected).view(np.uint8),
    )


def assert_rows(tier: Tier, spec: TableSpec, keys: Keys, rows: Rows) -> None:
    """Check that every key is there with its row."""
    out, found = fetch(tier, spec, keys)
    np.testing.assert_array_equal(found, True)
    assert_same_bits(out, rows)


def assert_absent(tier: Tier, spec: TableSpec, keys: Keys) -> None:
    """Check that no key is there."""
    _, found = fetch(tier, spec, keys)
    np.testing.assert_array_equal(found, False)
