"""Contract: which rows a fetch returns after rows were inserted, deleted, evicted."""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hps_numba.tiers.base import Tier
from hps_numba.tiers.testing.suite import (
    EXTREME_KEYS,
    SPEC,
    TierSuite,
    assert_absent,
    assert_rows,
    assert_same_bits,
    fetch,
    filled_rows,
    keys_of,
    random_rows,
)
from hps_numba.types import RowBlock, RowDtype, TableSpec

MANY = 20_000  # more keys than a tier reads in one piece


class ValueContract(TierSuite):
    """What is stored comes back, bit by bit."""

    @pytest.mark.parametrize("dtype", list(RowDtype))
    @pytest.mark.parametrize("dim", [1, 3, 16, 128])
    def test_rows_come_back_bit_by_bit(
        self, tier: Tier, dim: int, dtype: RowDtype
    ) -> None:
        spec = TableSpec("model", f"{dtype.value}-{dim}", dim, dtype)
        tier.open_table(spec)
        keys = np.arange(100, dtype=np.int64)
        rows = random_rows(spec, 100)
        tier.insert(spec.tag, keys, rows)
        assert_rows(tier, spec, keys[::-1].copy(), rows[::-1])

    def test_values_that_are_not_finite_are_kept(self, tier: Tier) -> None:
        bits = [0x7FC00001, 0xFF800001, 0x7F800000, 0x80000000]
        rows = np.array([bits], np.uint32).view(np.float32)
        tier.insert(SPEC.tag, keys_of(7), rows)
        assert_rows(tier, SPEC, keys_of(7), rows)

    def test_every_int64_is_a_key(self, tier: Tier) -> None:
        rows = random_rows(SPEC, EXTREME_KEYS.size)
        tier.insert(SPEC.tag, EXTREME_KEYS, rows)
        assert_rows(tier, SPEC, EXTREME_KEYS, rows)
        assert tier.delete(SPEC.tag, EXTREME_KEYS[:1]) == 1
        assert_absent(tier, SPEC, EXTREME_KEYS[:1])
        assert_rows(tier, SPEC, EXTREME_KEYS[1:], rows[1:])

    def test_many_keys_in_any_order(self, tier: Tier) -> None:
        keys = np.random.default_rng(1).permutation(np.arange(-MANY, MANY, 2))
        rows = random_rows(SPEC, keys.size, seed=1)
        tier.insert(SPEC.tag, keys, rows)
        asked = np.random.default_rng(2).permutation(np.arange(-MANY, MANY))
        out, found = fetch(tier, SPEC, asked)
        np.testing.assert_array_equal(found, asked % 2 == 0)
        by_key = np.argsort(keys)
        at = by_key[np.searchsorted(keys[by_key], asked[found])]
        assert_same_bits(out[found], rows[at])

    def test_insert_replaces_rows(self, tier: Tier) -> None:
        keys = np.arange(10, dtype=np.int64)
        tier.insert(SPEC.tag, keys, random_rows(SPEC, 10, seed=1))
        tier.insert(SPEC.tag, keys[5:], random_rows(SPEC, 5, seed=2))
        assert_rows(tier, SPEC, keys[:5], random_rows(SPEC, 10, seed=1)[:5])
        assert_rows(tier, SPEC, keys[5:], random_rows(SPEC, 5, seed=2))
        assert tier.size(SPEC.tag) == 10

    def test_missing_keys_leave_the_output_as_it_was(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(2), filled_rows(SPEC, 1, 2.0))
        out = filled_rows(SPEC, 3, 9.0)
        found = np.zeros(3, np.bool_)
        assert tier.fetch(SPEC.tag, keys_of(1, 2, 3), out, found) == 1
        np.testing.assert_array_equal(found, [False, True, False])
        np.testing.assert_array_equal(out[:, 0], [9.0, 2.0, 9.0])

    def test_resolved_keys_are_skipped(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1, 2, 3), filled_rows(SPEC, 3, 5.0))
        out = filled_rows(SPEC, 3, 9.0)
        found = np.array([True, False, True])
        assert tier.fetch(SPEC.tag, keys_of(1, 2, 3), out, found) == 1
        np.testing.assert_array_equal(found, True)
        np.testing.assert_array_equal(out[:, 0], [9.0, 5.0, 9.0])

    def test_fetch_answers_repeated_keys(self, tier: Tier) -> None:
        rows = random_rows(SPEC, 2)
        tier.insert(SPEC.tag, keys_of(1, 2), rows)
        assert_rows(tier, SPEC, keys_of(2, 1, 2, 2), rows[[1, 0, 1, 1]])

    @pytest.mark.parametrize("budget_s", [-1.0, 0.0, math.inf])
    def test_a_budget_may_shorten_the_answer_only(
        self, tier: Tier, budget_s: float
    ) -> None:
        keys = np.arange(MANY, dtype=np.int64)
        rows = random_rows(SPEC, MANY)
        tier.insert(SPEC.tag, keys, rows)
        out = np.zeros_like(rows)
        found = np.zeros(MANY, np.bool_)
        n_found = tier.fetch(SPEC.tag, keys, out, found, budget_s=budget_s)
        assert n_found == np.count_nonzero(found)
        assert found.all() or budget_s < math.inf
        assert_same_bits(out[found], rows[found])
        assert not out[~found].any()

    def test_empty_batches_do_nothing(self, tier: Tier) -> None:
        keys, rows = keys_of(), random_rows(SPEC, 0)
        tier.insert(SPEC.tag, keys, rows)
        assert tier.delete(SPEC.tag, keys) == 0
        assert tier.evict(SPEC.tag, keys) == 0
        assert tier.backfill(SPEC.tag, keys, rows, tier.epoch(SPEC.tag)) == 0
        assert tier.load(SPEC.tag, []) == 0
        assert tier.load(SPEC.tag, [RowBlock(keys, rows)]) == 0
        assert tier.fetch(SPEC.tag, keys, rows.copy(), np.zeros(0, np.bool_)) == 0
        assert tier.size(SPEC.tag) == 0

    def test_arrays_are_not_kept(self, tier: Tier) -> None:
        keys, rows = keys_of(1, 2), filled_rows(SPEC, 2, 1.0)
        tier.load(SPEC.tag, [RowBlock(keys, rows)])
        keys[:], rows[:] = [3, 4], 2.0
        tier.insert(SPEC.tag, keys, rows)
        keys[:], rows[:] = [5, 6], 3.0
        tier.backfill(SPEC.tag, keys, rows, tier.epoch(SPEC.tag))
        keys[:], rows[:] = 7, 4.0
        out, found = fetch(tier, SPEC, np.arange(8, dtype=np.int64))
        np.testing.assert_array_equal(out[:, 0], [0, 1, 1, 2, 2, 3, 3, 0])
        np.testing.assert_array_equal(found, out[:, 0] > 0)

    @pytest.mark.parametrize("n_keys", [0, 1, 1000])
    def test_an_order_has_every_position_once(self, tier: Tier, n_keys: int) -> None:
        keys = np.random.default_rng(4).permutation(np.arange(-500, 500))[:n_keys]
        rows = random_rows(SPEC, n_keys)
        tier.insert(SPEC.tag, keys, rows)
        order = tier.arrange(SPEC.tag, keys)
        if order is not None:
            np.testing.assert_array_equal(np.sort(order), np.arange(n_keys))
            assert_rows(tier, SPEC, keys[order], rows[order])

    def test_delete_removes_keys_and_counts_them(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1, 2, 3), filled_rows(SPEC, 3, 1.0))
        assert tier.delete(SPEC.tag, keys_of(2, 3, 4)) == 2
        assert_absent(tier, SPEC, keys_of(2, 3, 4))
        assert_rows(tier, SPEC, keys_of(1), filled_rows(SPEC, 1, 1.0))
        assert tier.delete(SPEC.tag, keys_of(2)) == 0

    def test_a_deleted_key_can_be_inserted_again(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        tier.delete(SPEC.tag, keys_of(1))
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 2.0))
        assert_rows(tier, SPEC, keys_of(1), filled_rows(SPEC, 1, 2.0))

    def test_evict_forgets_keys_and_counts_them(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1, 2, 3), filled_rows(SPEC, 3, 1.0))
        assert tier.evict(SPEC.tag, keys_of(2, 4)) == 1
        assert_absent(tier, SPEC, keys_of(2, 4))
        assert tier.evict(SPEC.tag) == 2
        assert tier.size(SPEC.tag) == 0
        tier.insert(SPEC.tag, keys_of(2), filled_rows(SPEC, 1, 3.0))
        assert_rows(tier, SPEC, keys_of(2), filled_rows(SPEC, 1, 3.0))

    def test_inserted_rows_are_beneath(self, tier: Tier) -> None:
        rows = random_rows(SPEC, EXTREME_KEYS.size)
        tier.insert(SPEC.tag, EXTREME_KEYS, rows)
        beneath, there = self.read_beneath(tier, SPEC.tag, EXTREME_KEYS)
        np.testing.assert_array_equal(there, True)
        assert_same_bits(beneath, rows)
        tier.delete(SPEC.tag, EXTREME_KEYS[1:])
        _, there = self.read_beneath(tier, SPEC.tag, EXTREME_KEYS)
        np.testing.assert_array_equal(there, [True] + [False] * (there.size - 1))

    def test_rows_written_beneath_are_fetched(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        rows = random_rows(SPEC, EXTREME_KEYS.size)
        self.write_beneath(tier, SPEC.tag, EXTREME_KEYS, rows)
        assert_rows(tier, SPEC, EXTREME_KEYS, rows)

    def test_arrays_that_do_not_fit_are_refused(self, tier: Tier) -> None:
        keys, rows = keys_of(1, 2), filled_rows(SPEC, 2, 1.0)
        found = np.zeros(2, np.bool_)
        misfits: list[tuple[NDArray[Any], NDArray[Any]]] = [
            (keys[:1], rows),
            (keys.astype(np.int32), rows),
            (keys.reshape(2, 1), rows),
            (keys, rows[:, :3].copy()),
            (keys, rows.astype(np.float64)),
            (keys, rows.astype(np.float16)),
            (keys, np.asfortranarray(rows)),
            (np.repeat(keys, 2)[::2], rows),
        ]
        for bad_keys, bad_rows in misfits:
            with pytest.raises(ValueError, match=r"hps_et\.model\.table"):
                tier.insert(SPEC.tag, bad_keys, bad_rows)
            with pytest.raises(ValueError, match=r"hps_et\.model\.table"):
                tier.fetch(SPEC.tag, bad_keys, bad_rows, found)
        assert tier.size(SPEC.tag) == 0

    def test_read_only_arrays_are_read(self, tier: Tier) -> None:
        keys, rows = keys_of(1, 2), filled_rows(SPEC, 2, 1.0)
        keys.flags.writeable = rows.flags.writeable = False
        tier.insert(SPEC.tag, keys, rows)
        assert_rows(tier, SPEC, keys, rows)
        tier.load(SPEC.tag, [RowBlock(keys, rows)])
        assert_rows(tier, SPEC, keys, rows)
        assert tier.delete(SPEC.tag, keys) == 2
