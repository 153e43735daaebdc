"""Writing model directories."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hps_numba.tiers.model_files import open_model_directory, write_model_directory


def numbered_rows(n_rows: int, dim: int) -> np.ndarray:
    """Rows in which every value is different and exact in float16."""
    return np.arange(n_rows * dim, dtype=np.float32).reshape(n_rows, dim)


def test_written_files_have_the_bytes_that_hugectr_writes(tmp_path: Path) -> None:
    write_model_directory(
        tmp_path / "t", [1, -2], np.array([[1.5], [-2.0]], np.float32)
    )
    assert (tmp_path / "t" / "key").read_bytes() == bytes(
        [1, 0, 0, 0, 0, 0, 0, 0, 0xFE, 255, 255, 255, 255, 255, 255, 255]
    )
    assert (tmp_path / "t" / "emb_vector").read_bytes() == bytes(
        [0, 0, 0xC0, 0x3F, 0, 0, 0, 0xC0]
    )


@pytest.mark.parametrize(
    ("keys", "rows", "error", "message"),
    [
        ([1.0], np.ones((1, 2), np.float32), TypeError, "dtype float64: give integers"),
        ([[1]], np.ones((1, 2), np.float32), ValueError, r"shape \(1, 1\): give one"),
        ([1], np.ones((1, 2), np.float64), TypeError, "give float32 or float16"),
        (
            [1],
            np.ones((2, 2), np.float32),
            ValueError,
            r"shape \(2, 2\): give \(1, dim",
        ),
        ([1], np.ones(2, np.float32), ValueError, r"shape \(2,\)"),
        ([1], np.ones((1, 0), np.float32), ValueError, "dim >= 1"),
        (np.uint64([2**63]), np.ones((1, 2), np.float32), ValueError, "largest int64"),
    ],
)
def test_bad_tables_are_not_written(
    tmp_path: Path, keys: object, rows: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_model_directory(tmp_path / "t", keys, rows)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.uint64, ">i8"])
def test_any_integers_can_be_written(tmp_path: Path, dtype: str) -> None:
    rows = np.float16([[1.5], [2.5]])
    write_model_directory(tmp_path, np.array([7, 3], dtype), rows)
    directory = open_model_directory(tmp_path, 1)
    assert directory.keys.tolist() == [7, 3]
    assert directory.rows.tolist() == [[1.5], [2.5]]


def test_strided_input_is_written_in_its_order(tmp_path: Path) -> None:
    keys, rows = np.arange(8)[::2], numbered_rows(4, 6)[:, ::-2]
    write_model_directory(tmp_path, keys, rows)
    directory = open_model_directory(tmp_path, 3)
    assert directory.keys.tolist() == [0, 2, 4, 6]
    assert directory.rows.tolist() == rows.tolist()


def test_an_open_directory_keeps_the_version_that_it_opened(tmp_path: Path) -> None:
    write_model_directory(tmp_path, [1, 2], numbered_rows(2, 3))
    before = open_model_directory(tmp_path, 3)
    write_model_directory(tmp_path, [9], -numbered_rows(1, 3))
    assert before.keys.tolist() == [1, 2]
    assert before.rows.tolist() == numbered_rows(2, 3).tolist()
    assert open_model_directory(tmp_path, 3).keys.tolist() == [9]


@pytest.mark.parametrize("n_written", [0, 1])
def test_a_failed_write_leaves_the_old_files_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    write_model_directory(tmp_path, [1, 2], numbered_rows(2, 3))
    results = iter([None] * n_written)

    def full_disk(_handle: int) -> None:
        if next(results, OSError) is OSError:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_model_directory(tmp_path, [9], numbered_rows(1, 3))
    assert sorted(os.listdir(tmp_path)) == ["emb_vector", "key"]
    assert open_model_directory(tmp_path, 3).keys.tolist() == [1, 2]
