"""Model directories: opening them and reading them in blocks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hps_numba.errors import ModelFileError
from hps_numba.tiers.model_files import open_model_directory, write_model_directory
from hps_numba.tiers.model_files.directory import BLOCK_ROWS
from hps_numba.types import RowBlock

INT64 = np.iinfo(np.int64)
EXTREME_KEYS = np.array([-1, INT64.max, 0, INT64.min, 1], np.int64)

small_tables = st.integers(1, 5).flatmap(
    lambda dim: hnp.arrays(
        np.int64, st.integers(0, 40), elements=st.integers(-9, 9)
    ).map(lambda keys: (keys, numbered_rows(len(keys), dim)))
)


def numbered_rows(n_rows: int, dim: int) -> np.ndarray:
    """Rows in which every value is different and exact in float16."""
    return np.arange(n_rows * dim, dtype=np.float32).reshape(n_rows, dim)


def write_raw(folder: Path, key_file: bytes, row_file: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "key").write_bytes(key_file)
    (folder / "emb_vector").write_bytes(row_file)
    return folder


def joined(blocks: list[RowBlock], dim: int) -> tuple[np.ndarray, np.ndarray]:
    keys = [block.keys for block in blocks]
    rows = [block.rows for block in blocks]
    return (
        np.concatenate([np.empty(0, np.int64), *keys]),
        np.concatenate([np.empty((0, dim), np.float32), *rows]),
    )


def test_every_int64_key_and_every_bit_of_a_row_survive(tmp_path: Path) -> None:
    bits = np.random.default_rng(7).integers(0, 1 << 32, (5, 3), dtype=np.uint32)
    write_model_directory(tmp_path, EXTREME_KEYS, bits.view(np.float32))
    directory = open_model_directory(tmp_path, 3)
    assert directory.keys.tolist() == EXTREME_KEYS.tolist()
    assert directory.rows.view(np.uint32).tolist() == bits.tolist()
    assert (directory.n_rows, directory.dim, directory.key_bytes) == (5, 3, 8)
    assert directory.nbytes == 5 * 8 + 5 * 3 * 4


def test_mapped_files_cannot_be_written_through_the_arrays(tmp_path: Path) -> None:
    write_model_directory(tmp_path, [1], numbered_rows(1, 2))
    directory = open_model_directory(tmp_path, 2)
    for array in (directory.keys, directory.rows):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(table=small_tables, block_rows=st.integers(1, 50))
def test_blocks_give_the_file_in_its_order(
    tmp_path: Path, table: tuple[np.ndarray, np.ndarray], block_rows: int
) -> None:
    keys, rows = table
    write_model_directory(tmp_path, keys, rows)
    directory = open_model_directory(tmp_path, rows.shape[1])
    blocks = list(directory.blocks(np.float32, block_rows))
    got_keys, got_rows = joined(blocks, rows.shape[1])
    assert got_keys.tolist() == keys.tolist()
    assert got_rows.tolist() == rows.tolist()
    assert all(1 <= len(block) <= block_rows for block in blocks)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(table=small_tables, block_rows=st.integers(1, 50))
def test_sorted_blocks_give_each_key_once_with_its_last_row(
    tmp_path: Path, table: tuple[np.ndarray, np.ndarray], block_rows: int
) -> None:
    keys, rows = table
    last = {key: row.tolist() for key, row in zip(keys.tolist(), rows, strict=True)}
    write_model_directory(tmp_path, keys, rows)
    directory = open_model_directory(tmp_path, rows.shape[1])
    blocks = list(directory.sorted_blocks(np.float32, block_rows))
    got_keys, got_rows = joined(blocks, rows.shape[1])
    assert got_keys.tolist() == sorted(last)
    assert got_rows.tolist() == [last[key] for key in sorted(last)]
    assert all(1 <= len(block) <= block_rows for block in blocks)


def test_sorted_blocks_keep_the_last_row_over_many_blocks(tmp_path: Path) -> None:
    keys = np.random.default_rng(3).integers(-50_000, 50_000, 200_000)
    rows = numbered_rows(len(keys), 1)
    write_model_directory(tmp_path, keys, rows)
    blocks = list(open_model_directory(tmp_path, 1).sorted_blocks(block_rows=1000))
    got_keys, got_rows = joined(blocks, 1)
    expected = dict(zip(keys.tolist(), rows[:, 0].tolist(), strict=True))
    assert got_keys.tolist() == sorted(expected)
    assert got_rows[:, 0].tolist() == [expected[key] for key in sorted(expected)]


def test_one_key_out_of_order_between_blocks_is_noticed(tmp_path: Path) -> None:
    keys = np.arange(2 * BLOCK_ROWS)
    keys[[BLOCK_ROWS - 1, BLOCK_ROWS]] = keys[[BLOCK_ROWS, BLOCK_ROWS - 1]]
    write_model_directory(tmp_path, keys, keys.astype(np.float32).reshape(-1, 1))
    blocks = list(open_model_directory(tmp_path, 1).sorted_blocks())
    got_keys, got_rows = joined(blocks, 1)
    np.testing.assert_array_equal(got_keys, np.arange(2 * BLOCK_ROWS))
    np.testing.assert_array_equal(got_rows[:, 0], got_keys)


@pytest.mark.parametrize("kind", ["blocks", "sorted_blocks"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_have_the_types_that_tiers_take(
    tmp_path: Path, kind: str, dtype: type
) -> None:
    rows = np.array([[0.1, 65519.0], [1e30, -1e30], [np.nan, 1e-9]], np.float32)
    write_model_directory(tmp_path, [3, 1, 2], rows)
    directory = open_model_directory(tmp_path, 2)
    with np.errstate(over="ignore"):
        expected = dict(zip([3, 1, 2], rows.astype(dtype), strict=True))
    for block in getattr(directory, kind)(dtype, 2):
        assert (block.keys.dtype, block.rows.dtype) == (np.int64, dtype)
        assert block.keys.flags.c_contiguous
        assert block.rows.flags.c_contiguous
        wanted = np.array([expected[key] for key in block.keys.tolist()])
        np.testing.assert_array_equal(block.rows, wanted)


@pytest.mark.parametrize("kind", ["blocks", "sorted_blocks"])
def test_a_block_without_rows_is_refused(tmp_path: Path, kind: str) -> None:
    write_model_directory(tmp_path, [1], numbered_rows(1, 2))
    with pytest.raises(ValueError, match="block_rows=0"):
        next(getattr(open_model_directory(tmp_path, 2), kind)(np.float32, 0))


def test_keys_of_four_bytes_become_unsigned_int64(tmp_path: Path) -> None:
    keys = np.array([7, 0xFFFFFFFF, 3, 0x80000000, 5], np.uint32)
    rows = numbered_rows(5, 4)
    write_raw(tmp_path, keys.tobytes(), rows.tobytes())
    directory = open_model_directory(tmp_path, 4)
    assert (directory.n_rows, directory.key_bytes) == (5, 4)
    assert directory.keys.dtype == np.int64
    assert directory.keys.tolist() == keys.tolist()
    got_keys, got_rows = joined(list(directory.sorted_blocks()), 4)
    assert got_keys.tolist() == [3, 5, 7, 0x80000000, 0xFFFFFFFF]
    assert got_rows.tolist() == rows[[2, 4, 0, 3, 1]].tolist()


@pytest.mark.parametrize("key_bytes", [None, 4, 8])
def test_two_empty_files_are_an_empty_table(
    tmp_path: Path, key_bytes: int | None
) -> None:
    write_raw(tmp_path, b"", b"")
    directory = open_model_directory(tmp_path, 16, key_bytes=key_bytes)
    assert (directory.n_rows, directory.nbytes) == (0, 0)
    assert directory.key_bytes == (key_bytes or 8)
    assert directory.rows.shape == (0, 16)
    assert directory.keys.shape == (0,)
    assert list(directory.blocks()) == list(directory.sorted_blocks()) == []


def test_an_empty_table_can_be_written(tmp_path: Path) -> None:
    write_model_directory(tmp_path, [], np.empty((0, 8), np.float32))
    assert open_model_directory(tmp_path, 8).n_rows == 0


def test_other_files_of_the_directory_are_ignored(tmp_path: Path) -> None:
    write_raw(tmp_path, b"\1" + bytes(7), np.float32([1, 2]).tobytes())
    (tmp_path / "meta").write_bytes(b"odd")
    (tmp_path / "slot_id").write_bytes(b"odder")
    assert open_model_directory(tmp_path, 2).rows.tolist() == [[1, 2]]


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_the_dim_follows_from_eight_byte_keys(tmp_path: Path, dim: int) -> None:
    write_model_directory(tmp_path, EXTREME_KEYS, numbered_rows(5, dim))
    assert open_model_directory(tmp_path, None).dim == dim


def test_the_dim_follows_from_keys_of_a_known_size(tmp_path: Path) -> None:
    write_raw(tmp_path, np.uint32([9, 8]).tobytes(), numbered_rows(2, 3).tobytes())
    directory = open_model_directory(tmp_path, None, key_bytes=4)
    assert (directory.dim, directory.keys.tolist()) == (3, [9, 8])


def two_rows(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "t", bytes(16), bytes(2 * 4 * 3))


@pytest.mark.parametrize(
    ("name", "dim"), [("key", 3), ("emb_vector", 3), ("key", None)]
)
def test_one_missing_byte_is_told_with_all_sizes(
    tmp_path: Path, name: str, dim: int | None
) -> None:
    folder = two_rows(tmp_path)
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(ModelFileError) as caught:
        open_model_directory(folder, dim, table="wdl.deep")
    sizes = {"key": "key has 15 bytes, emb_vector 24", "emb_vector": "16 bytes"}
    assert sizes[name] in str(caught.value)
    assert f"table wdl.deep: model directory {folder}" in str(caught.value)


@pytest.mark.parametrize(
    ("key_file", "row_file", "dim", "message"),
    [
        (
            b"",
            bytes(24),
            3,
            "2 rows of dim 3 need 16 bytes of int64 keys or 8 of uint32",
        ),
        (bytes(16), b"", 3, "0 rows of dim 3 need 0 bytes"),
        (bytes(24), bytes(24), 3, "2 rows of dim 3 need 16 bytes"),
        (bytes(17), bytes(24), 3, "2 rows of dim 3 need 16 bytes"),
        (bytes(9), bytes(24), 3, "2 rows of dim 3 need 16 bytes"),
        (
            bytes(16),
            bytes(24),
            4,
            "dim 4 needs 16 bytes a row, which leaves 1 rows and 8",
        ),
        (bytes(16), bytes(24), 6, "1 rows of dim 6 need 8 bytes"),
        (
            bytes(16),
            bytes(20),
            None,
            "2 keys of 8 bytes, but no whole number of float32",
        ),
        (bytes(16), b"", None, "no whole number of float32 values a key"),
        (b"", b"", None, "give the dim"),
        (b"", bytes(24), None, "give the dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, key_file: bytes, row_file: bytes, dim: int | None, message: str
) -> None:
    write_raw(tmp_path, key_file, row_file)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_model_directory(tmp_path, dim)
    sizes = f"key has {len(key_file)} bytes, emb_vector {len(row_file)}:"
    assert sizes in str(caught.value)


@pytest.mark.parametrize("keys", [[5, 6, 7, 8], [-5, -6, -7, -8], [-1, 2, -3, 4]])
def test_half_the_dim_is_not_taken_for_keys_of_four_bytes(
    tmp_path: Path, keys: list[int]
) -> None:
    write_model_directory(tmp_path, keys, numbered_rows(4, 6))
    with pytest.raises(ModelFileError, match=r"like 4 int64 keys: .* maybe to 6"):
        open_model_directory(tmp_path, 3)


def test_a_known_key_size_decides_where_sizes_cannot(tmp_path: Path) -> None:
    random_keys = np.random.default_rng(1).integers(INT64.min, INT64.max, 10)
    write_model_directory(tmp_path, random_keys, numbered_rows(10, 6))
    assert open_model_directory(tmp_path, 3).n_rows == 20
    with pytest.raises(ModelFileError, match=r"4 bytes a key, 8 are expected"):
        open_model_directory(tmp_path, 3, key_bytes=8)


def test_four_byte_keys_that_repeat_are_read_if_their_size_is_known(
    tmp_path: Path,
) -> None:
    write_raw(tmp_path, np.uint32([5, 0, 6, 0]).tobytes(), bytes(4 * 4))
    directory = open_model_directory(tmp_path, 1, key_bytes=4)
    assert directory.keys.tolist() == [5, 0, 6, 0]


def test_a_dim_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dim=0"):
        open_model_directory(tmp_path, 0)


@pytest.mark.parametrize("name", ["key", "emb_vector"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = two_rows(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=f"{folder}: no file '{name}'"):
        open_model_directory(folder, 3)


def test_a_directory_of_model_directories_names_them(tmp_path: Path) -> None:
    two_rows(tmp_path)
    with pytest.raises(
        ModelFileError, match=r"no file 'key'; did you mean one of t in"
    ):
        open_model_directory(tmp_path, 3)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        open_model_directory(tmp_path / "gone", 3)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    folder = two_rows(tmp_path)
    with pytest.raises(ModelFileError, match="is a file; give the directory"):
        open_model_directory(folder / "key", 3)


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(ModelFileError, match="cannot read 'key': Is a directory"):
        open_model_directory(tmp_path, 3)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    folder = two_rows(tmp_path)
    (folder / "emb_vector").unlink()
    (folder / "emb_vector").symlink_to("emb_vector")
    with pytest.raises(ModelFileError, match="cannot read 'emb_vector': Too many"):
        open_model_directory(folder, 3)


def test_a_remote_path_is_refused_as_such() -> None:
    with pytest.raises(ModelFileError, match="s3://bucket/t: not a local path"):
        open_model_directory("s3://bucket/t", 3)
