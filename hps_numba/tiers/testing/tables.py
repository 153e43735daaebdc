"""Contract: tables, loads, iteration, and the end of a tier."""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hps_numba.errors import ClosedError, ConfigError, UnknownTableError
from hps_numba.tiers.base import Epoch, Tier
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

USES: dict[str, Callable[[Tier, str, Epoch], object]] = {
    "fetch": lambda tier, tag, _: tier.fetch(
        tag, keys_of(1), filled_rows(SPEC, 1, 0.0), np.zeros(1, np.bool_)
    ),
    "insert": lambda tier, tag, _: tier.insert(
        tag, keys_of(1), filled_rows(SPEC, 1, 0.0)
    ),
    "delete": lambda tier, tag, _: tier.delete(tag, keys_of(1)),
    "load": lambda tier, tag, _: tier.load(tag, []),
    "epoch": lambda tier, tag, _: tier.epoch(tag),
    "hold": lambda tier, tag, _: tier.hold(tag).__enter__(),
    "backfill": lambda tier, tag, epoch: tier.backfill(
        tag, keys_of(1), filled_rows(SPEC, 1, 0.0), epoch
    ),
    "evict": lambda tier, tag, _: tier.evict(tag),
    "iterate": lambda tier, tag, _: list(tier.iterate(tag)),
    "size": lambda tier, tag, _: tier.size(tag),
    "stats": lambda tier, tag, _: tier.stats(tag),
}


class TableContract(TierSuite):
    """Tables are apart, are replaced whole, and outlive their readers."""

    def test_models_with_equal_table_names_are_apart(self, tier: Tier) -> None:
        other = TableSpec("other", SPEC.name, SPEC.dim)
        tier.open_table(other)
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        tier.insert(other.tag, keys_of(1), filled_rows(other, 1, 2.0))
        assert_rows(tier, SPEC, keys_of(1), filled_rows(SPEC, 1, 1.0))
        tier.delete(SPEC.tag, keys_of(1))
        assert_rows(tier, other, keys_of(1), filled_rows(other, 1, 2.0))

    def test_tables_lists_the_tables_of_a_model(self, tier: Tier) -> None:
        for model, name in (("model", "a"), ("model2", "b"), ("model.x", "c")):
            tier.open_table(TableSpec(model, name, 4))
        assert tier.tables("model") == ["a", "table"]
        assert tier.tables("model2") == ["b"]
        assert tier.tables("absent") == []

    def test_opening_again_changes_nothing(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        tier.open_table(TableSpec("model", "table", 4))
        assert_rows(tier, SPEC, keys_of(1), filled_rows(SPEC, 1, 1.0))

    @pytest.mark.parametrize(
        "spec",
        [
            TableSpec("model", "table", 5),
            TableSpec("model", "table", 4, RowDtype.FLOAT16),
        ],
        ids=["dim", "dtype"],
    )
    def test_another_shape_is_refused(self, tier: Tier, spec: TableSpec) -> None:
        with pytest.raises(ConfigError, match=r"hps_et\.model\.table.* dim 4, float32"):
            tier.open_table(spec)
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))

    @pytest.mark.parametrize("use", list(USES))
    def test_unknown_tables_are_refused(self, tier: Tier, use: str) -> None:
        with pytest.raises(UnknownTableError, match=r"hps_et\.model\.absent"):
            USES[use](tier, "hps_et.model.absent", tier.epoch(SPEC.tag))

    def test_a_dropped_table_is_gone(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        tier.drop_table(SPEC.tag)
        assert tier.tables("model") == []
        with pytest.raises(UnknownTableError):
            tier.size(SPEC.tag)
        tier.drop_table(SPEC.tag)
        wider = TableSpec("model", "table", 7)
        tier.open_table(wider)
        assert_absent(tier, wider, keys_of(1))

    def test_size_and_stats_count_rows(self, tier: Tier) -> None:
        keys = np.arange(1000, dtype=np.int64)
        tier.insert(SPEC.tag, keys, random_rows(SPEC, 1000))
        assert tier.size(SPEC.tag) == 1000
        assert 900 <= tier.stats(SPEC.tag).rows <= 1100  # it may be an estimate
        assert tier.stats(SPEC.tag).bytes >= 1000 * SPEC.row_bytes
        tier.delete(SPEC.tag, keys[:10])
        assert tier.size(SPEC.tag) == 990

    def test_a_load_replaces_all_rows(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, np.arange(50, dtype=np.int64), random_rows(SPEC, 50))
        keys = np.random.default_rng(3).permutation(np.arange(40, 140))
        rows = random_rows(SPEC, 100, seed=3)
        done: list[int] = []
        blocks = (
            RowBlock(keys[i : i + 30], rows[i : i + 30]) for i in range(0, 100, 30)
        )
        assert tier.load(SPEC.tag, blocks, progress=done.append) == 100
        assert sum(done) == 100
        assert_rows(tier, SPEC, keys, rows)
        assert_absent(tier, SPEC, np.arange(40, dtype=np.int64))
        assert tier.size(SPEC.tag) == 100

    def test_a_load_takes_every_int64(self, tier: Tier) -> None:
        rows = random_rows(SPEC, EXTREME_KEYS.size)
        tier.load(SPEC.tag, [RowBlock(EXTREME_KEYS, rows)])
        assert_rows(tier, SPEC, EXTREME_KEYS, rows)

    def test_the_last_row_of_a_key_is_loaded(self, tier: Tier) -> None:
        blocks = [
            RowBlock(keys_of(1, 2, 1), random_rows(SPEC, 3, seed=1)),
            RowBlock(keys_of(3, 2, 3), random_rows(SPEC, 3, seed=2)),
        ]
        assert tier.load(SPEC.tag, blocks) == 6
        expected = [blocks[0].rows[2], blocks[1].rows[1], blocks[1].rows[2]]
        assert_rows(tier, SPEC, keys_of(1, 2, 3), np.array(expected))
        assert tier.size(SPEC.tag) == 3

    def test_a_load_of_nothing_empties_the_table(self, tier: Tier) -> None:
        tier.insert(SPEC.tag, keys_of(1), filled_rows(SPEC, 1, 1.0))
        assert tier.load(SPEC.tag, []) == 0
        assert_absent(tier, SPEC, keys_of(1))
        tier.insert(SPEC.tag, keys_of(2), filled_rows(SPEC, 1, 2.0))
        assert_rows(tier, SPEC, keys_of(2), filled_rows(SPEC, 1, 2.0))

    @pytest.mark.parametrize("block_rows", [1, 7, 1000, 65_536])
    def test_iterate_yields_every_row_once(self, tier: Tier, block_rows: int) -> None:
        keys = np.append(np.arange(-500, 500) * 3, EXTREME_KEYS[[0, -1]])
        rows = random_rows(SPEC, keys.size)
        tier.insert(SPEC.tag, keys, rows)
        blocks = list(tier.iterate(SPEC.tag, block_rows=block_rows))
        assert all(0 < len(block) <= block_rows for block in blocks)
        seen = np.concatenate([block.keys for block in blocks])
        order = np.argsort(seen)
        np.testing.assert_array_equal(seen[order], np.sort(keys))
        values = np.concatenate([block.rows for block in blocks])
        assert_same_bits(values[order], rows[np.argsort(keys)])

    def test_iterate_yields_nothing_of_an_empty_table(self, tier: Tier) -> None:
        assert list(tier.iterate(SPEC.tag)) == []

    def test_rows_outlive_the_tier_if_it_persists(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path / "tier")
        tier.open_table(SPEC)
        keys, rows = np.arange(100, dtype=np.int64), random_rows(SPEC, 100)
        tier.insert(SPEC.tag, keys, rows)
        tier.delete(SPEC.tag, keys[:10])
        tier.close()
        again = self.make_tier(tmp_path / "tier")
        again.open_table(SPEC)
        out, found = fetch(again, SPEC, keys)
        np.testing.assert_array_equal(found, self.persistent & (keys >= 10))
        assert_same_bits(out[found], rows[found])
        again.close()

    @pytest.mark.parametrize("use", list(USES))
    def test_a_closed_tier_refuses_use(self, tier: Tier, use: str) -> None:
        epoch = tier.epoch(SPEC.tag)
        tier.close()
        tier.close()
        with pytest.raises(ClosedError):
            USES[use](tier, SPEC.tag, epoch)

    def test_a_closed_tier_refuses_tables(self, tier: Tier) -> None:
        tier.close()
        with pytest.raises(ClosedError):
            tier.open_table(SPEC)
        with pytest.raises(ClosedError):
            tier.tables("model")
        with pytest.raises(ClosedError):
            tier.drop_table(SPEC.tag)
