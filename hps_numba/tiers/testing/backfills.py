"""Contract: a backfill never brings back what was replaced or deleted meanwhile."""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hps_numba.tiers.base import Tier
from hps_numba.tiers.testing.suite import (
    SPEC,
    TierSuite,
    assert_absent,
    assert_rows,
    fetch,
    filled_rows,
    keys_of,
)
from hps_numba.types import RowBlock

KEY = keys_of(5)
OLD = filled_rows(SPEC, 1, 1.0)
NEW = filled_rows(SPEC, 1, 2.0)

WRITES: dict[str, Callable[[Tier], object]] = {
    "insert": lambda tier: tier.insert(SPEC.tag, KEY, NEW),
    "delete": lambda tier: tier.delete(SPEC.tag, KEY),
    "load": lambda tier: tier.load(SPEC.tag, [RowBlock(KEY, NEW)]),
    "load of nothing": lambda tier: tier.load(SPEC.tag, []),
}


class BackfillContract(TierSuite):
    """Epochs, holds, and what they refuse."""

    def test_epochs_are_of_one_kind_and_ordered(self, tier: Tier) -> None:
        epochs: list[Any] = [tier.epoch(SPEC.tag)]
        for write in WRITES.values():
            write(tier)
            tier.evict(SPEC.tag, KEY)
            epochs.append(tier.epoch(SPEC.tag))
        assert epochs == sorted(epochs)
        widths = {len(e) if isinstance(e, tuple) else 0 for e in epochs}
        assert len(widths) == 1
        assert all(isinstance(e, int | tuple) for e in epochs)

    def test_a_backfill_stores_rows(self, tier: Tier) -> None:
        keys = np.arange(100, dtype=np.int64)
        rows = filled_rows(SPEC, 100, 1.0)
        assert tier.backfill(SPEC.tag, keys, rows, tier.epoch(SPEC.tag)) == 100
        assert_rows(tier, SPEC, keys, rows)
        assert tier.stats(SPEC.tag).refused_backfills == 0

    @pytest.mark.parametrize("write", list(WRITES))
    def test_the_epoch_grows_with_every_write(self, tier: Tier, write: str) -> None:
        epochs = [tier.epoch(SPEC.tag)]
        for _ in range(3):
            WRITES[write](tier)
            epochs.append(tier.epoch(SPEC.tag))
        assert epochs == sorted(set(epochs))

    @pytest.mark.parametrize("write", list(WRITES))
    def test_a_write_refuses_backfills_begun_before(
        self, tier: Tier, write: str
    ) -> None:
        tier.insert(SPEC.tag, KEY, OLD)
        epoch = tier.epoch(SPEC.tag)
        WRITES[write](tier)
        expected = fetch(tier, SPEC, KEY)
        assert tier.backfill(SPEC.tag, KEY, OLD, epoch) == 0
        for actual, before in zip(fetch(tier, SPEC, KEY), expected, strict=True):
            np.testing.assert_array_equal(actual, before)
        assert tier.stats(SPEC.tag).refused_backfills == 1

    @pytest.mark.parametrize("write", list(WRITES))
    def test_a_write_admits_backfills_begun_after(self, tier: Tier, write: str) -> None:
        WRITES[write](tier)
        tier.evict(SPEC.tag, KEY)
        assert tier.backfill(SPEC.tag, KEY, OLD, tier.epoch(SPEC.tag)) == 1
        assert_rows(tier, SPEC, KEY, OLD)

    def test_only_written_keys_must_be_refused(self, tier: Tier) -> None:
        epoch = tier.epoch(SPEC.tag)
        tier.insert(SPEC.tag, KEY, NEW)
        keys = np.arange(10, dtype=np.int64)
        stored = tier.backfill(SPEC.tag, keys, filled_rows(SPEC, 10, 1.0), epoch)
        out, found = fetch(tier, SPEC, keys)
        assert out[5, 0] == 2.0
        assert np.count_nonzero(out[found, 0] == 1.0) == stored
        assert stored + tier.stats(SPEC.tag).refused_backfills == 10

    def test_evict_does_not_lift_the_refusal(self, tier: Tier) -> None:
        epoch = tier.epoch(SPEC.tag)
        tier.insert(SPEC.tag, KEY, NEW)
        for evicted in (KEY, None):
            tier.evict(SPEC.tag, evicted)
            assert tier.backfill(SPEC.tag, KEY, OLD, epoch) == 0
            assert_absent(tier, SPEC, KEY)

    def test_a_lower_tier_brings_back_what_was_evicted(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, KEY, NEW)
        epoch = tier.epoch(SPEC.tag)
        tier.evict(SPEC.tag, KEY)
        assert tier.backfill(SPEC.tag, KEY, NEW, epoch) == 1
        assert_rows(tier, SPEC, KEY, NEW)

    @pytest.mark.parametrize("held", [KEY, None], ids=["the key", "all keys"])
    def test_held_keys_are_refused(
        self, tier: Tier, held: np.ndarray[tuple[int], np.dtype[np.int64]] | None
    ) -> None:
        before = tier.epoch(SPEC.tag)
        with tier.hold(SPEC.tag, held):
            during = tier.epoch(SPEC.tag)
            assert tier.backfill(SPEC.tag, KEY, OLD, before) == 0
            assert tier.backfill(SPEC.tag, KEY, OLD, during) == 0
        assert tier.backfill(SPEC.tag, KEY, OLD, before) == 0
        assert tier.backfill(SPEC.tag, KEY, OLD, during) == 0
        assert_absent(tier, SPEC, KEY)
        assert tier.backfill(SPEC.tag, KEY, OLD, tier.epoch(SPEC.tag)) == 1

    def test_a_write_does_not_end_a_hold(self, tier: Tier) -> None:
        with tier.hold(SPEC.tag, KEY):
            tier.insert(SPEC.tag, KEY, NEW)
            tier.evict(SPEC.tag, KEY)
            assert tier.backfill(SPEC.tag, KEY, OLD, tier.epoch(SPEC.tag)) == 0
        assert_absent(tier, SPEC, KEY)

    def test_held_keys_can_be_written(self, tier: Tier) -> None:
        with tier.hold(SPEC.tag):
            tier.insert(SPEC.tag, KEY, NEW)
            assert_rows(tier, SPEC, KEY, NEW)
        assert_rows(tier, SPEC, KEY, NEW)

    def test_an_error_ends_the_hold(self, tier: Tier) -> None:
        with pytest.raises(ZeroDivisionError), tier.hold(SPEC.tag, KEY):
            raise ZeroDivisionError
        assert tier.backfill(SPEC.tag, KEY, OLD, tier.epoch(SPEC.tag)) == 1
