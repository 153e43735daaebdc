"""Rows sorted in bounded memory, the last of each key."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hps_numba.tiers.sorted_runs import check_ascending, sorted_unique
from hps_numba.tiers.testing.suite import EXTREME_KEYS, assert_same_bits
from hps_numba.types import Keys, RowBlock, Rows

ROW_BYTES = 8 + 2 * 4


def numbered_blocks(keys: Keys, sizes: list[int], dtype: str = "f4") -> list[RowBlock]:
    """Cut keys into blocks; the rows hold the position of their key."""
    positions = np.arange(keys.size).astype(dtype)
    rows = np.stack([positions, positions + 0.5], axis=1).astype(dtype)
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == keys.size
    return [RowBlock(keys[low:high], rows[low:high]) for low, high in pairwise(edges)]


def last_rows(blocks: list[RowBlock]) -> tuple[Keys, Rows]:
    """Return what the blocks leave, by way of a dict."""
    rows = {
        int(key): row
        for block in blocks
        for key, row in zip(block.keys, block.rows, strict=True)
    }
    keys = sorted(rows)
    return np.array(keys, np.int64), np.array([rows[key] for key in keys])


def check(blocks: list[RowBlock], directory: Path, run_bytes: int) -> int:
    """Compare with the dict; return the number of runs that were written."""
    merged = list(sorted_unique(blocks, directory, run_bytes=run_bytes))
    keys, rows = last_rows(blocks)
    np.testing.assert_array_equal(np.concatenate([b.keys for b in merged]), keys)
    assert_same_bits(np.concatenate([b.rows for b in merged]), rows)
    return len(list(directory.iterdir()))


@pytest.mark.parametrize("run_rows", [1, 7, 100, 999, 1000, 10_000])
@pytest.mark.parametrize("n_distinct", [1, 10, 800, 1 << 62])
def test_runs_give_what_a_dict_gives(
    tmp_path: Path, run_rows: int, n_distinct: int
) -> None:
    keys = np.random.default_rng(run_rows).integers(-n_distinct, n_distinct, 1000)
    blocks = numbered_blocks(keys, [300, 1, 0, 399, 300])
    n_runs = check(blocks, tmp_path, run_rows * ROW_BYTES)
    assert (n_runs > 1) == (run_rows < 700)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.lists(
            st.integers(-9, 9) | st.sampled_from(EXTREME_KEYS.tolist()), max_size=9
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 12),
)
def test_any_blocks_in_runs_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[list[int]], run_rows: int
) -> None:
    keys = np.array([*chain.from_iterable(numbers)], np.int64)
    if keys.size:
        blocks = numbered_blocks(keys, [len(part) for part in numbers])
        check(blocks, tmp_path_factory.mktemp("runs"), run_rows * ROW_BYTES)


def test_half_precision_rows_are_kept(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 50, 200)
    check(numbered_blocks(keys, [100, 100], "f2"), tmp_path, 300)


def test_no_rows_give_no_rows(tmp_path: Path) -> None:
    empty = RowBlock(np.empty(0, np.int64), np.empty((0, 2), np.float32))
    for blocks in ([], [empty], [empty, empty]):
        merged = sorted_unique(blocks, tmp_path, run_bytes=1)
        assert sum(len(block) for block in merged) == 0


def test_blocks_are_not_kept(tmp_path: Path) -> None:
    def blocks() -> Iterator[RowBlock]:
        keys, rows = np.zeros(3, np.int64), np.zeros((3, 2), np.float32)
        for value in range(4):
            keys[:] = [value, value + 10, value + 20]
            rows[:] = value
            yield RowBlock(keys, rows)

    (merged,) = sorted_unique(blocks(), tmp_path)
    np.testing.assert_array_equal(merged.rows[:, 0], merged.keys % 10)


@pytest.mark.parametrize("n_distinct", [1000, 1 << 40], ids=["repeating", "distinct"])
def test_memory_stays_within_its_bound(tmp_path: Path, n_distinct: int) -> None:
    """40 MB of rows in runs of 2 MB."""
    run_bytes, row_bytes = 2 << 20, 8 + 128 * 4

    def blocks() -> Iterator[RowBlock]:
        random = np.random.default_rng(0)
        for _ in range(800):
            keys = random.integers(0, n_distinct, 100)
            yield RowBlock(keys, random.random((100, 128), np.float32))

    tracemalloc.start()
    n_rows = largest = 0
    for block in sorted_unique(blocks(), tmp_path, run_bytes=run_bytes):
        n_rows += len(block)
        largest = max(largest, len(block) * row_bytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_rows == (n_distinct if n_distinct == 1000 else 80_000)
    assert largest <= run_bytes
    assert peak <= 2.5 * run_bytes


def test_ascending_blocks_pass() -> None:
    blocks = numbered_blocks(EXTREME_KEYS, [0, 2, 0, 1, 3])
    assert list(check_ascending(blocks)) == blocks


@pytest.mark.parametrize(
    ("keys", "sizes", "message"),
    [
        ([1, 3, 2], [3], "key 2 follows 3"),
        ([1, 2, 2], [3], "key 2 follows 2"),
        ([1, 5, 4], [2, 1], "key 4 follows 5"),
        ([1, 5, 5], [2, 1], "key 5 follows 5"),
        ([1, 5, 4], [2, 0, 1], "key 4 follows 5"),
        ([-(1 << 63), (1 << 63) - 1, -(1 << 63)], [3], "key -9223372036854775808"),
    ],
)
def test_keys_that_do_not_ascend_are_named(
    keys: list[int], sizes: list[int], message: str
) -> None:
    blocks = numbered_blocks(np.array(keys, np.int64), sizes)
    with pytest.raises(ValueError, match=message):
        list(check_ascending(blocks))
