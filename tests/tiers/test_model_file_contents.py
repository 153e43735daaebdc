"""Model directories: checks of their contents, summaries and fingerprints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hps_numba.errors import ModelFileError
from hps_numba.tiers.model_files import (
    FileReport,
    Fingerprint,
    ModelDirectory,
    check,
    checks,
    fingerprint,
    matches,
    open_model_directory,
    summarise,
    write_model_directory,
)
from hps_numba.tiers.model_files.checks import count_unique

MANY_ROWS = 700_000  # of dim 4: three chunks of a pass over the rows


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """Rows over several chunks, with repeats, zeros, infinities and NaN."""
    rng = np.random.default_rng(11)
    keys = rng.integers(0, 600_000, MANY_ROWS)
    rows = rng.normal(5.0, 2.0, (MANY_ROWS, 4)).astype(np.float32)
    rows[::1000] = 0
    rows[1::1000, :3] = 0
    rows[5::100_000, 1] = np.nan
    rows[5::100_000, 2] = np.inf
    rows[-1, 3] = -np.inf
    folder = tmp_path_factory.mktemp("large")
    write_model_directory(folder, keys, rows)
    return open_model_directory(folder, 4, table="wdl.deep")


def small(tmp_path: Path, keys: list[int], rows: object) -> ModelDirectory:
    write_model_directory(tmp_path, keys, np.asarray(rows, np.float32))
    return open_model_directory(tmp_path, np.shape(rows)[1], table="wdl.deep")


@pytest.mark.parametrize("n_rows", [0, 3])
def test_a_clean_table_has_nothing_to_report(tmp_path: Path, n_rows: int) -> None:
    directory = small(tmp_path, list(range(n_rows)), np.ones((n_rows, 2)))
    report = check(directory, duplicate_keys="refuse", non_finite="refuse")
    assert report == FileReport(n_rows, n_rows, 0, 0, 0)


def test_repeats_and_non_finite_values_are_counted(large: ModelDirectory) -> None:
    unique = len(set(large.keys.tolist()))
    steps: list[int] = []
    report = check(large, progress=steps.append)
    assert report == FileReport(MANY_ROWS, unique, MANY_ROWS - unique, 15, 8)
    assert sum(steps) == MANY_ROWS
    assert len(steps) > 1


@given(
    keys=hnp.arrays(np.int64, st.integers(0, 200), elements=st.integers(-20, 20)),
    sort_keys=st.integers(1, 40),
)
def test_unique_keys_are_counted_in_parts(keys: np.ndarray, sort_keys: int) -> None:
    assert count_unique(keys, sort_keys=sort_keys) == len(set(keys.tolist()))


def test_repeats_are_refused_with_the_key(tmp_path: Path) -> None:
    directory = small(tmp_path, [4, -7, 9, -7, -7], np.ones((5, 2)))
    with pytest.raises(ModelFileError) as caught:
        check(directory, duplicate_keys="refuse")
    message = str(caught.value)
    assert f"table wdl.deep: model directory {tmp_path}:" in message
    assert "2 of 5 rows repeat a key, for example key -7" in message
    assert 'duplicate_keys to "last_wins"' in message


def test_repeats_in_four_byte_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(np.uint32([8, 3, 0xFFFFFFFF, 8]).tobytes())
    (tmp_path / "emb_vector").write_bytes(bytes(16))
    directory = open_model_directory(tmp_path, 1)
    assert check(directory).n_unique == 3
    with pytest.raises(ModelFileError, match="for example key 8"):
        check(directory, duplicate_keys="refuse")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_is_refused_with_its_place(
    tmp_path: Path, value: float
) -> None:
    directory = small(tmp_path, [4, 5, 6], [[1, 2], [3, value], [value, 1]])
    with pytest.raises(ModelFileError) as caught:
        check(directory, non_finite="refuse")
    assert f"row 1 (key 5) has {value} at column 1" in str(caught.value)
    assert 'non_finite to "allow"' in str(caught.value)


def test_the_place_of_a_non_finite_value_counts_all_chunks(
    large: ModelDirectory, tmp_path: Path
) -> None:
    rows = np.nan_to_num(large.rows)
    rows[650_000, 2] = np.nan
    write_model_directory(tmp_path, large.keys, rows)
    with pytest.raises(
        ModelFileError, match=f"row 650000 .key {large.keys[650_000]}. "
    ):
        check(open_model_directory(tmp_path, 4), non_finite="refuse")


def test_values_too_large_for_float16_are_not_finite_there(tmp_path: Path) -> None:
    directory = small(tmp_path, [1, 2], [[65519.0, 0], [65520.0, -1e9]])
    assert check(directory).n_non_finite == 0
    report = check(directory, dtype=np.float16)
    assert (report.n_non_finite, report.n_non_finite_rows) == (2, 1)
    with pytest.raises(ModelFileError, match=r"65520\.0 at column 0.* as float16"):
        check(directory, dtype=np.float16, non_finite="refuse")


def test_a_summary_agrees_with_numpy(large: ModelDirectory) -> None:
    steps: list[int] = []
    summary = summarise(large, progress=steps.append)
    values = large.rows[np.isfinite(large.rows)].astype(np.float64)
    assert sum(steps) == MANY_ROWS
    assert summary.path == str(large.path)
    assert (summary.n_rows, summary.dim) == (MANY_ROWS, 4)
    assert summary.total_bytes == MANY_ROWS * (8 + 16)
    assert summary.key_dtype == "int64"
    assert (summary.min_key, summary.max_key) == (large.keys.min(), large.keys.max())
    assert summary.n_unique == len(set(large.keys.tolist()))
    assert summary.n_duplicates == MANY_ROWS - summary.n_unique
    assert (summary.min_value, summary.max_value) == (values.min(), values.max())
    assert summary.mean == pytest.approx(values.mean(), rel=1e-12)
    assert summary.std == pytest.approx(values.std(), rel=1e-12)
    assert summary.n_non_finite == 15
    assert summary.n_zero_rows == 700


def test_the_deviation_around_a_large_mean_is_exact(tmp_path: Path) -> None:
    rows = np.full((MANY_ROWS, 4), 16_000_000.0, np.float32)
    rows[::2] += 1
    summary = summarise(small(tmp_path, list(range(MANY_ROWS)), rows))
    assert (summary.mean, summary.std) == (16_000_000.5, 0.5)


def test_a_summary_of_nothing_has_no_statistics(tmp_path: Path) -> None:
    empty = summarise(small(tmp_path, [], np.empty((0, 3))))
    assert (empty.n_rows, empty.n_unique, empty.total_bytes) == (0, 0, 0)
    assert (empty.min_key, empty.max_key) == (None, None)
    no_values = summarise(small(tmp_path, [1], [[np.nan, np.inf]]))
    for summary in (empty, no_values):
        assert summary.min_value is summary.max_value is None
        assert summary.mean is summary.std is None
    assert no_values.n_non_finite == 2


def test_a_summary_is_json_also_without_statistics(tmp_path: Path) -> None:
    summary = summarise(small(tmp_path, [], np.empty((0, 3))))
    read = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert read["n_rows"] == 0
    assert read["mean"] is None


def test_a_fingerprint_survives_json(large: ModelDirectory) -> None:
    steps: list[int] = []
    taken = fingerprint(large, progress=steps.append)
    assert sum(steps) == MANY_ROWS
    assert len(taken.digest) == 32
    assert Fingerprint.from_json(json.loads(json.dumps(taken.to_json()))) == taken


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("digest"),
        lambda stored: stored.update(row_bytes="24"),
        lambda stored: stored.update(dim=True),
        lambda stored: stored.update(digest=None),
    ],
)
def test_damaged_fingerprints_are_refused(
    large: ModelDirectory, damage: Callable[[dict[str, object]], object]
) -> None:
    stored = fingerprint(large).to_json()
    damage(stored)
    with pytest.raises(ValueError, match="fingerprint: "):
        Fingerprint.from_json(stored)


def test_unchanged_files_match_without_being_read(tmp_path: Path) -> None:
    directory = small(tmp_path, [1, 2], np.ones((2, 3)))
    stored = replace(fingerprint(directory), digest="never compared")
    assert matches(open_model_directory(tmp_path, 3), stored)


def test_copied_and_touched_files_match_by_their_contents(tmp_path: Path) -> None:
    stored = fingerprint(small(tmp_path / "t", [1, 2], np.ones((2, 3))))
    shutil.copytree(tmp_path / "t", tmp_path / "copy")
    for name in ("key", "emb_vector"):
        os.utime(tmp_path / "copy" / name, ns=(1, 1))
    copy = open_model_directory(tmp_path / "copy", 3)
    steps: list[int] = []
    assert matches(copy, stored, progress=steps.append)
    assert steps == [2]
    assert fingerprint(copy).digest == stored.digest


@pytest.mark.parametrize("name", ["key", "emb_vector"])
def test_a_file_rewritten_at_its_size_does_not_match(tmp_path: Path, name: str) -> None:
    stored = fingerprint(small(tmp_path, [1, 2], np.ones((2, 3))))
    contents = bytearray((tmp_path / name).read_bytes())
    contents[-1] ^= 1
    (tmp_path / name).write_bytes(contents)
    os.utime(tmp_path / name, ns=(2, 2))
    assert not matches(open_model_directory(tmp_path, 3), stored)


def test_bytes_moved_between_the_files_change_the_digest(tmp_path: Path) -> None:
    one = fingerprint(small(tmp_path, [0, 0], np.zeros((2, 4)))).digest
    other = fingerprint(small(tmp_path, [0, 0, 0], np.zeros((3, 2)))).digest
    assert one != other


@pytest.mark.parametrize("n_rows", [1, 3])
def test_another_number_of_rows_does_not_match(tmp_path: Path, n_rows: int) -> None:
    stored = fingerprint(small(tmp_path, [1, 2], np.ones((2, 3))))
    changed = small(tmp_path, list(range(n_rows)), np.ones((n_rows, 3)))
    same_times = replace(
        stored, key_mtime_ns=changed.key_mtime_ns, row_mtime_ns=changed.row_mtime_ns
    )
    assert not matches(changed, same_times)


def test_another_dim_does_not_match(tmp_path: Path) -> None:
    keys = np.random.default_rng(5).integers(0, 1 << 62, 8).tolist()
    stored = fingerprint(small(tmp_path, keys, np.ones((8, 6))))
    assert not matches(open_model_directory(tmp_path, 3), stored)


def test_refusal_finds_a_repeat_beyond_the_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*range(500), 499]
    directory = small(tmp_path, keys, np.ones((501, 1)))
    monkeypatch.setattr(checks, "SORT_KEYS", 50)
    with pytest.raises(ModelFileError, match=r"1 of 501 rows .* key 499;"):
        check(directory, duplicate_keys="refuse")
