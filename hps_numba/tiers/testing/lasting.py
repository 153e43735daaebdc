"""Contract: what a tier that outlives its process remembers of its rows' origin."""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hps_numba.tiers.base import LastingTier
from hps_numba.tiers.testing.suite import (
    SPEC,
    TierSuite,
    assert_absent,
    assert_rows,
    filled_rows,
    keys_of,
    random_rows,
)
from hps_numba.types import RowBlock

ORIGIN: dict[str, Any] = {"n_rows": 7, "files": [["key", 56, "0f"]], "name": "a"}
KEYS = np.arange(100, dtype=np.int64)


class LastingContract(TierSuite):
    """Fingerprints, and rows that are still there."""

    persistent: ClassVar[bool] = True

    @pytest.fixture
    def lasting(self, tmp_path: Path) -> Iterator[LastingTier]:
        """Yield a tier with the empty table ``SPEC``."""
        tier = self._made(tmp_path)
        yield tier
        tier.close()

    def _made(self, directory: Path) -> LastingTier:
        tier = self.make_tier(directory / "tier")
        assert isinstance(tier, LastingTier)
        tier.open_table(SPEC)
        return tier

    def test_a_new_table_has_no_fingerprint(self, lasting: LastingTier) -> None:
        assert lasting.fingerprint(SPEC.tag) is None
        lasting.insert(SPEC.tag, KEYS, random_rows(SPEC, KEYS.size))
        assert lasting.fingerprint(SPEC.tag) is None

    def test_a_load_replaces_the_fingerprint(self, lasting: LastingTier) -> None:
        block = RowBlock(KEYS, random_rows(SPEC, KEYS.size))
        lasting.load(SPEC.tag, [block], fingerprint=ORIGIN)
        assert lasting.fingerprint(SPEC.tag) == ORIGIN
        lasting.load(SPEC.tag, [block], fingerprint={"n_rows": 8})
        assert lasting.fingerprint(SPEC.tag) == {"n_rows": 8}
        lasting.load(SPEC.tag, [block])
        assert lasting.fingerprint(SPEC.tag) is None

    def test_writes_keep_the_fingerprint(self, lasting: LastingTier) -> None:
        block = RowBlock(KEYS, random_rows(SPEC, KEYS.size))
        lasting.load(SPEC.tag, [block], fingerprint=ORIGIN)
        lasting.insert(SPEC.tag, KEYS[:3], filled_rows(SPEC, 3, 2.0))
        lasting.delete(SPEC.tag, KEYS[3:5])
        assert lasting.fingerprint(SPEC.tag) == ORIGIN

    def test_a_load_that_fails_leaves_no_new_fingerprint(
        self, lasting: LastingTier
    ) -> None:
        def blocks() -> Iterator[RowBlock]:
            yield RowBlock(KEYS, filled_rows(SPEC, KEYS.size, 1.0))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            lasting.load(SPEC.tag, blocks(), fingerprint=ORIGIN)
        assert lasting.fingerprint(SPEC.tag) is None

    def test_ascending_rows_are_loaded(self, lasting: LastingTier) -> None:
        rows = random_rows(SPEC, KEYS.size)
        blocks = [RowBlock(KEYS[:40], rows[:40]), RowBlock(KEYS[40:], rows[40:])]
        assert lasting.load(SPEC.tag, blocks, ascending=True) == KEYS.size
        assert_rows(lasting, SPEC, KEYS, rows)

    def test_a_tier_made_again_remembers(
        self, lasting: LastingTier, tmp_path: Path
    ) -> None:
        rows = random_rows(SPEC, KEYS.size)
        lasting.load(SPEC.tag, [RowBlock(KEYS, rows)], fingerprint=ORIGIN)
        lasting.insert(SPEC.tag, keys_of(5), filled_rows(SPEC, 1, 2.0))
        lasting.delete(SPEC.tag, keys_of(6))
        lasting.close()
        again = self._made(tmp_path)
        assert again.fingerprint(SPEC.tag) == ORIGIN
        assert again.tables(SPEC.model) == [SPEC.name]
        assert_rows(again, SPEC, keys_of(4, 7), rows[[4, 7]])
        assert_rows(again, SPEC, keys_of(5), filled_rows(SPEC, 1, 2.0))
        assert_absent(again, SPEC, keys_of(6))
        again.close()

    def test_a_dropped_table_forgets_its_fingerprint(
        self, lasting: LastingTier
    ) -> None:
        block = RowBlock(KEYS, random_rows(SPEC, KEYS.size))
        lasting.load(SPEC.tag, [block], fingerprint=ORIGIN)
        lasting.drop_table(SPEC.tag)
        lasting.open_table(SPEC)
        assert lasting.fingerprint(SPEC.tag) is None
        assert_absent(lasting, SPEC, KEYS)

    def test_a_table_is_loaded_by_one_at_a_time(self, lasting: LastingTier) -> None:
        block = RowBlock(KEYS, random_rows(SPEC, KEYS.size))
        for _ in range(2):  # and the first one's end lets the second in
            with lasting.loading(SPEC.tag):
                lasting.load(SPEC.tag, [block], fingerprint=ORIGIN)
        with pytest.raises(ZeroDivisionError), lasting.loading(SPEC.tag):
            raise ZeroDivisionError
        with lasting.loading(SPEC.tag):
            assert lasting.fingerprint(SPEC.tag) == ORIGIN
