"""Which keys a cache is warmed up with, and in which order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from hps_numba.config import InferenceParams
from hps_numba.errors import ConfigError
from hps_numba.runtime.gpu.warming import BLOCK_KEYS, WarmKeys, warm_keys
from hps_numba.tiers.model_files import (
    ModelDirectory,
    open_model_directory,
    write_model_directory,
)

NONE = np.zeros(0, np.int64)
EXTREMES = [-(1 << 63), (1 << 63) - 1, -1, 0]


def model(**changes: Any) -> InferenceParams:
    """Return a model of two tables, ``a`` and ``b``."""
    return InferenceParams(
        "m",
        embedding_table_names=["a", "b"],
        embedding_vecsize_per_table=[1, 1],
        maxnum_catfeature_query_per_table_per_sample=[1, 1],
        **changes,
    )


def directory(root: Path, keys: ArrayLike, key_bytes: int = 8) -> ModelDirectory:
    rows = np.zeros((np.size(keys), 1), np.float32)
    write_model_directory(root / "t", keys, rows)
    if key_bytes == 4:
        np.asarray(keys, np.uint32).tofile(root / "t" / "key")
    return open_model_directory(root / "t", 1)


def saved(root: Path, content: ArrayLike) -> dict[str, Any]:
    """Return what makes ``b`` warm up with a file of this content."""
    path = root / "hot.npy"
    np.save(path, np.asarray(content, getattr(content, "dtype", np.int64)))
    return {"warm_up_keys_per_table": ["", str(path)]}


def keys_of(warm: WarmKeys) -> list[int]:
    """Return all keys, after holding the blocks to what they promise."""
    blocks = list(warm.blocks)
    for block in blocks:
        assert block.dtype == np.int64
        assert block.flags.c_contiguous
        assert 1 <= block.size <= BLOCK_KEYS
    keys = [int(key) for block in blocks for key in block]
    assert len(set(keys)) == len(keys) == warm.total
    return keys


def test_the_first_keys_of_the_file_come_in_its_order(tmp_path: Path) -> None:
    files = directory(tmp_path, [5, -3, 9, 1, *EXTREMES])
    assert keys_of(warm_keys(model(), 0, files)) == [5, -3, 9, 1, *EXTREMES]
    assert keys_of(warm_keys(model(), 0, files, limit=3)) == [5, -3, 9]
    some = model(warm_up_rows_per_table=[2, 4])
    assert keys_of(warm_keys(some, 0, files)) == [5, -3]
    assert keys_of(warm_keys(some, 1, files)) == [5, -3, 9, 1]
    assert keys_of(warm_keys(some, 1, files, limit=3)) == [5, -3, 9]
    assert keys_of(warm_keys(some, 0, files, limit=0)) == []


def test_keys_of_four_bytes_are_keys(tmp_path: Path) -> None:
    files = directory(tmp_path, [7, 2**32 - 1, 7, 0], key_bytes=4)
    assert files.key_bytes == 4
    assert keys_of(warm_keys(model(), 0, files)) == [7, 2**32 - 1, 0]


def test_a_key_that_repeats_comes_once_and_another_takes_its_place(
    tmp_path: Path,
) -> None:
    files = directory(tmp_path, [4, 4, 4, 2, 4, 2, 8, 1])
    assert keys_of(warm_keys(model(), 0, files, limit=3)) == [4, 2, 8]
    assert keys_of(warm_keys(model(), 0, files, limit=100)) == [4, 2, 8, 1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    keys=st.lists(st.integers(0, 12), max_size=40),
    limit=st.integers(0, 15),
    ascending=st.booleans(),
)
def test_as_many_keys_come_as_are_wanted_and_there(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[int],
    limit: int,
    ascending: bool,
) -> None:
    ordered = sorted(set(keys)) if ascending else keys
    given_ = saved(tmp_path_factory.mktemp("keys"), ordered)
    expected = list(dict.fromkeys(ordered))[:limit]
    assert keys_of(warm_keys(model(**given_), 1, None, limit=limit)) == expected


@pytest.mark.parametrize("ascending", [True, False])
def test_many_keys_come_in_blocks(ascending: bool, tmp_path: Path) -> None:
    n = 2 * BLOCK_KEYS + 5
    keys = np.arange(n) if ascending else np.random.default_rng(3).permutation(n)
    warm = warm_keys(model(), 0, directory(tmp_path, keys), limit=n - 1)
    assert keys_of(warm) == keys[:-1].tolist()


def test_a_frequency_file_goes_before_the_model_directory(tmp_path: Path) -> None:
    files = directory(tmp_path, [1, 2, 3])
    frequent = model(**saved(tmp_path, [30, 10, 30, -20]))
    assert keys_of(warm_keys(frequent, 1, files)) == [30, 10, -20]
    assert keys_of(warm_keys(frequent, 1, None, limit=2)) == [30, 10]
    assert keys_of(warm_keys(frequent, 0, files)) == [1, 2, 3]  # it has no such file


@pytest.mark.parametrize("order", ["C", "F"])
def test_counts_sort_keys_and_ties_keep_their_order(order: Any, tmp_path: Path) -> None:
    high, low = (1 << 63) - 1, -(1 << 63)
    content = [[1, 5], [2, low], [3, 7], [4, 5], [5, high], [1, 9], [6, 0]]
    frequent = model(**saved(tmp_path, np.array(content, np.int64, order=order)))
    assert keys_of(warm_keys(frequent, 1, None)) == [5, 1, 3, 4, 6, 2]


def test_two_keys_are_no_key_with_its_count(tmp_path: Path) -> None:
    assert keys_of(warm_keys(model(**saved(tmp_path, [8, 9])), 1, None)) == [8, 9]
    assert keys_of(warm_keys(model(**saved(tmp_path, [[8, 9]])), 1, None)) == [8]


@pytest.mark.parametrize("content", [NONE, NONE.reshape(0, 2)], ids=["1d", "2d"])
def test_an_empty_frequency_file_warms_nothing_up(content: Any, tmp_path: Path) -> None:
    frequent = model(**saved(tmp_path, content))
    assert keys_of(warm_keys(frequent, 1, directory(tmp_path, [1]))) == []


def test_without_files_and_without_warm_up_there_is_nothing(tmp_path: Path) -> None:
    assert keys_of(warm_keys(model(), 0, None)) == []
    off = model(init_ec=False, **saved(tmp_path, [1, 2]))
    for index in (0, 1):
        assert keys_of(warm_keys(off, index, directory(tmp_path, [1]))) == []


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (np.zeros(3), "float64 (3,)"),
        (np.zeros((2, 2), np.int32), "int32 (2, 2)"),
        (np.zeros(3, np.uint64), "uint64 (3,)"),
        (np.zeros(3, ">i8"), ">i8 (3,)"),
        (np.zeros((2, 3), np.int64), "int64 (2, 3)"),
        (np.zeros((2, 2, 2), np.int64), "int64 (2, 2, 2)"),
        (np.int64(3), "int64 ()"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_frequency_file_of_another_kind_is_refused(
    content: Any, shown: str, tmp_path: Path
) -> None:
    frequent = model(**saved(tmp_path, content))
    start = f"table hps_et.m.b: warm_up_keys_per_table: {tmp_path}/hot.npy: holds "
    with pytest.raises(ConfigError, match=re.escape(f"{start}{shown};")):
        warm_keys(frequent, 1, None)


@pytest.mark.parametrize("n_bytes", [0, 5, 60, 128 + 79])
def test_a_frequency_file_that_is_cut_short_is_refused(
    n_bytes: int, tmp_path: Path
) -> None:
    frequent = model(**saved(tmp_path, range(10)))
    path = tmp_path / "hot.npy"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ConfigError, match=r"hot\.npy: is no whole \.npy file"):
        warm_keys(frequent, 1, None)


def test_pickles_and_archives_are_never_opened(tmp_path: Path) -> None:
    frequent = model(**saved(tmp_path, [1]))
    np.save(tmp_path / "hot.npy", np.array([{}], object))
    with pytest.raises(ConfigError, match="is no whole"):
        warm_keys(frequent, 1, None)
    np.savez(tmp_path / "hot.npz", keys=NONE)
    (tmp_path / "hot.npz").rename(tmp_path / "hot.npy")
    with pytest.raises(ConfigError, match="is no whole"):
        warm_keys(frequent, 1, None)


def test_a_frequency_file_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = model(warm_up_keys_per_table=[str(tmp_path / "no.npy"), ""])
    with pytest.raises(ConfigError, match=r"m\.a: .*no\.npy: cannot be read: No such"):
        warm_keys(missing, 0, None)
    folder = model(warm_up_keys_per_table=[str(tmp_path), ""])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        warm_keys(folder, 0, None)
