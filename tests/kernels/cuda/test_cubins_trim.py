"""A directory of cubins does not grow for ever, whoever shares it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda import cubins, ptx
from hps_numba.kernels.cuda.compiling import Cubin, KernelSpec
from hps_numba.kernels.cuda.cubins import DAY_S, CubinCache, encode, trim

CC = (9, 0)
SIZE = 1000  # bytes of a file of ``make``


def spec_of(amount: int) -> KernelSpec:
    def add(address):
        ptx.store_u32(address, np.uint32(amount))

    return KernelSpec(f"add_{amount}", add, "U")


def make(directory: Path, name: str, days: float) -> Path:
    """Write a file of this name that was used so many days ago."""
    path = directory / name
    path.write_bytes(bytes(SIZE))
    used_at = time.time() - days * DAY_S
    os.utime(path, (used_at, used_at))
    return path


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def cubin_name(number: int) -> str:
    return f"query.sm_90.{number:032x}.cubin"


def age_in_days(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / DAY_S


def test_files_that_nobody_has_used_for_90_days_go(tmp_path: Path) -> None:
    for number, days in enumerate([0, 1, 89, 91, 400]):
        make(tmp_path, cubin_name(number), days)
    trim(tmp_path)
    assert names_in(tmp_path) == {cubin_name(number) for number in range(3)}


def test_the_longest_unused_go_where_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cubins, "MAX_BYTES", 3 * SIZE)
    for number, days in enumerate([3, 0, 4, 1, 2]):
        make(tmp_path, cubin_name(number), days)
    trim(tmp_path)
    assert names_in(tmp_path) == {cubin_name(number) for number in (1, 3, 4)}


def test_files_that_are_no_cubins_of_ours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cubins, "MAX_BYTES", 0)
    others = {"notes.txt", "other.cubin", "x.sm_90.short.cubin", ".new-thing"}
    for name in others:
        make(tmp_path, name, 1000)
    (tmp_path / cubin_name(1)).mkdir()
    (tmp_path / cubin_name(2)).symlink_to(tmp_path / "notes.txt")
    make(tmp_path, cubin_name(3), 0)
    trim(tmp_path)
    assert names_in(tmp_path) == others | {cubin_name(1), cubin_name(2)}


def test_half_written_files_of_processes_that_died_go_after_a_day(
    tmp_path: Path,
) -> None:
    make(tmp_path, ".new-dead.cubin", 2)
    make(tmp_path, ".new-busy.cubin", 0.5)
    trim(tmp_path)
    assert names_in(tmp_path) == {".new-busy.cubin"}


def test_a_file_that_is_used_stays_and_one_that_is_not_goes(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path)
    cache.get(spec_of(1), CC)
    (used,) = tmp_path.iterdir()
    unused = make(tmp_path, cubin_name(1), 91)
    os.utime(used, (0, 0))
    CubinCache(tmp_path).get(spec_of(1), CC)
    assert age_in_days(used) < 1
    assert unused.exists()  # reading deletes nothing
    cache.get(spec_of(2), CC)
    assert used.exists()
    assert not unused.exists()


def test_a_use_is_noted_once_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Any] = []
    CubinCache(tmp_path).get(spec_of(1), CC)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "utime", noted.append)
    CubinCache(tmp_path).get(spec_of(1), CC)
    assert noted == []
    monkeypatch.undo()
    os.utime(path, (0, 0))
    monkeypatch.setattr(os, "utime", noted.append)
    CubinCache(tmp_path).get(spec_of(1), CC)
    assert noted == [path]


def test_a_use_that_cannot_be_noted_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CubinCache(tmp_path).get(spec_of(1), CC)
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    assert CubinCache(tmp_path).get(spec_of(1), CC) == first


def test_what_has_just_been_written_stays_however_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cubins, "MAX_BYTES", 10)
    cache = CubinCache(tmp_path)
    for amount in (1, 2):
        cache.get(spec_of(amount), CC)
        (path,) = tmp_path.iterdir()
        assert path.name.startswith(f"add_{amount}.sm_90.")


def test_a_file_that_another_process_deletes_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink

    def twice(path: Path) -> None:
        unlink(path)
        unlink(path)

    make(tmp_path, cubin_name(1), 100)
    make(tmp_path, cubin_name(2), 100)
    monkeypatch.setattr(os, "unlink", twice)
    trim(tmp_path)
    assert names_in(tmp_path) == set()


def test_processes_that_delete_each_others_files_all_get_theirs(
    tmp_path: Path,
) -> None:
    size = len(encode(CubinCache(None).get(spec_of(0), CC)))
    code = (
        "from tests.kernels.cuda.test_cubins_trim import *\n"
        f"cubins.MAX_BYTES = {2 * size + size // 2}\n"
        f"print(*codes_of(Path({str(tmp_path)!r})))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = {worker.communicate(timeout=120)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    wanted = [hash_of(CubinCache(None).get(spec_of(i), CC)) for i in range(4)]
    assert results == {" ".join([*wanted, *wanted]) + "\n"}
    # Two fit, and whoever wrote last keeps what it wrote.
    assert len(names_in(tmp_path)) <= 3


def codes_of(directory: Path) -> list[str]:
    cache = CubinCache(directory)
    return [hash_of(cache.get(spec_of(i % 4), CC)) for i in range(8)]


def hash_of(cubin: Cubin) -> str:
    return f"{cubin.name}:{sum(cubin.code)}"
