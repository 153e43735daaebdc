"""Cubins are kept on disk, and only the right ones come back."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda import pathfinder
from numba import cuda

from hps_numba.kernels.cuda import compiling, cubins, fingerprint, ptx
from hps_numba.kernels.cuda.compiling import Cubin, KernelCompileError, KernelSpec
from hps_numba.kernels.cuda.cubins import CubinCache, DamagedError, decode, encode
from tests.support.gate_cases import cases

CC = (9, 0)


def add_spec(amount: int = 1, *, name: str = "add", **options: Any) -> KernelSpec:
    @cuda.jit(device=True, forceinline=True)
    def more(value):
        return np.uint32(value + np.uint32(amount))

    def add(address):
        ptx.store_u32(address, more(ptx.load_u32(address)))

    return KernelSpec(name, add, "U", **options)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were compiled, in order."""
    names: list[str] = []

    def counted(spec: KernelSpec, cc: tuple[int, int]) -> Cubin:
        names.append(spec.name)
        return compiling.compile_cubin(spec, cc)

    monkeypatch.setattr(cubins, "compile_cubin", counted)
    return names


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_a_cubin_is_compiled_once_and_then_read(
    tmp_path: Path, compiled: list[str]
) -> None:
    first = CubinCache(tmp_path / "new" / "place").get(add_spec(), CC)
    second = CubinCache(tmp_path / "new" / "place").get(add_spec(), CC)
    assert compiled == ["add"]
    assert first == second
    assert second.code.startswith(b"\x7fELF")
    assert "registers" in second.log
    assert [path.suffix for path in files(tmp_path / "new" / "place")] == [".cubin"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: add_spec(2),
        lambda: add_spec(block=128),
        lambda: add_spec(max_registers=32),
        lambda: add_spec(name="add_other"),
    ],
)
def test_another_constant_or_shape_is_another_cubin(
    tmp_path: Path, compiled: list[str], other: Callable[[], KernelSpec]
) -> None:
    cache = CubinCache(tmp_path)
    one, two = cache.get(add_spec(), CC), cache.get(other(), CC)
    assert len(compiled) == len(files(tmp_path)) == 2
    assert one.code != two.code


def test_another_capability_is_another_cubin(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path)
    assert cache.get(add_spec(), CC).code != cache.get(add_spec(), (8, 0)).code
    assert cache.get(add_spec(), (8, 0)).cc == (8, 0)


def test_argument_types_make_another_fingerprint() -> None:
    def kernel(a):
        ptx.store_u32(np.uint64(a), np.uint32(1))

    kinds = {
        fingerprint.fingerprint(KernelSpec("kernel", kernel, letter), CC)
        for letter in "UuIi"
    }
    assert len(kinds) == 4


def test_a_change_of_the_code_or_of_a_compiler_makes_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one(a):
        ptx.store_u32(a, np.uint32(1))

    def two(a):
        ptx.store_u32(a, np.uint32(2))

    def digest(function: Any) -> str:
        return fingerprint.fingerprint(KernelSpec("kernel", function, "U"), CC)

    before = digest(one)
    assert digest(two) != before
    assert digest(one) == before
    monkeypatch.setattr(fingerprint, "_environment", lambda: "numba-cuda 99")
    assert digest(one) != before


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What fingerprints say of versions, given those of packages and the libraries."""

    def found(versions: dict[str, str], load: Callable[[str], Any] = absent) -> str:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
        return fingerprint._libraries.__wrapped__()

    return found


def absent(name: str) -> Any:
    raise pathfinder.DynamicLibNotFoundError(f"no {name}")


def test_compilers_that_pip_installed_are_told_by_version_and_never_loaded(
    environment: Callable[..., str],
) -> None:
    def loaded(name: str) -> Any:
        raise AssertionError(f"{name} was loaded")

    installed = {"nvidia-nvvm": "13.0.88", "nvidia-nvjitlink-cu12": "12.8.93"}
    before = environment(installed, loaded)
    assert "nvidia-nvvm 13.0.88" in before
    assert "nvidia-nvjitlink-cu12 12.8.93" in before
    for name in installed:
        assert environment({**installed, name: "13.1"}, loaded) != before
    assert environment(installed, loaded) == before


def test_compilers_of_a_toolkit_are_told_by_their_files(
    environment: Callable[..., str], tmp_path: Path
) -> None:
    def load(name: str) -> Any:
        return SimpleNamespace(abs_path=str(tmp_path / name))

    for name in ("nvvm", "nvJitLink"):
        (tmp_path / name).write_bytes(b"1")
    before = environment({}, load)
    assert environment({}, load) == before
    (tmp_path / "nvJitLink").write_bytes(b"12")
    assert environment({}, load) != before


def test_compilers_that_are_missing_have_a_fingerprint_too(
    environment: Callable[..., str],
) -> None:
    def broken(name: str) -> Any:
        raise ChildProcessError(f"asking for {name} failed")

    assert environment({}) == "nvvm: none\nnvJitLink: none"
    assert environment({}, broken) == environment({})


def test_cubins_of_any_compilers_serve_where_there_are_none(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CubinCache(tmp_path)
    good = cache.get(add_spec(), CC)
    assert fingerprint.has_compilers()
    missing = "nvvm: none\nnvJitLink: nvidia-nvjitlink 13.0.88"
    monkeypatch.setattr(fingerprint, "_libraries", lambda: missing)
    assert not fingerprint.has_compilers()
    assert cache.get(add_spec(), CC) == good
    assert compiled == ["add"]
    for other, cc in ((add_spec(2), CC), (add_spec(), (8, 0))):
        cache.get(other, cc)
    assert compiled == ["add"] * 3


def test_another_release_of_a_compiler_compiles_anew(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CubinCache(tmp_path)
    cache.get(add_spec(), CC)
    monkeypatch.setattr(fingerprint, "_libraries", lambda: "nvvm: nvidia-nvvm 99.0")
    cache.get(add_spec(), CC)
    assert compiled == ["add", "add"]
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    ("failing", "error", "said"),
    [
        ("cuda", pathfinder.DynamicLibNotFoundError("no libnvvm"), "no libnvvm"),
        ("cuda", ImportError("libNVVM is not available"), "libNVVM is not"),
        ("Linker", ValueError("x is not supported by the driver API"), "driver API"),
    ],
)
def test_a_kernel_without_its_compiler_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception, said: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    fake = SimpleNamespace(compile=fails) if failing == "cuda" else fails
    monkeypatch.setattr(compiling, failing, fake)
    with pytest.raises(KernelCompileError, match=rf"{said}.*hps-numba\[cuda13\]"):
        compiling.compile_cubin(add_spec(), CC)


def test_the_fingerprint_reaches_constants_of_device_functions_and_globals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(a):
        ptx.store_u32(a, FROM_THE_MODULE)

    spec = KernelSpec("kernel", kernel, "U")
    before = fingerprint.fingerprint(spec, CC)
    monkeypatch.setattr(sys.modules[__name__], "FROM_THE_MODULE", np.uint32(6))
    assert fingerprint.fingerprint(spec, CC) != before
    assert fingerprint.fingerprint(add_spec(1), CC) != fingerprint.fingerprint(
        add_spec(2), CC
    )


FROM_THE_MODULE = np.uint32(5)


def test_every_kernel_can_be_kept_and_is_told_from_the_others() -> None:
    specs = [case.spec for case in cases()]
    digests = {
        fingerprint.fingerprint(spec, cc) for spec in specs for cc in [CC, (8, 0)]
    }
    assert len(digests) == 2 * len(specs)
    assert len({spec.name for spec in specs}) == len(specs)


def test_the_fingerprint_is_that_of_another_process() -> None:
    code = (
        "from tests.kernels.cuda.test_cubins import *\n"
        "print(fingerprint.fingerprint(add_spec(), CC))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert runs == {fingerprint.fingerprint(add_spec(), CC)}


def test_a_kernel_over_something_that_is_no_constant_is_compiled_each_time(
    tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    odd = object()

    def kernel(a):
        if odd is odd:
            ptx.store_u32(a, np.uint32(1))

    with pytest.raises(fingerprint.UnknownConstantError, match="no constant"):
        fingerprint.fingerprint(KernelSpec("odd", kernel, "U"), CC)

    cache = CubinCache(tmp_path)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(KernelCompileError, match="odd"):
                cache.get(KernelSpec("odd", kernel, "U"), CC)
    assert compiled == ["odd", "odd"]
    assert "kernel=odd is compiled anew each time" in caplog.text
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"something else\n" + content,
        lambda content: content.replace(b'"name": "add"', b'"name": "adD"'),
        lambda content: content[:-9] + b"x" + content[-8:],
    ],
)
def test_a_damaged_file_is_compiled_again_and_replaced(
    tmp_path: Path,
    compiled: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    cache = CubinCache(tmp_path)
    good = cache.get(add_spec(), CC)
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(add_spec(), CC) == good
    assert compiled == ["add", "add"]
    assert f"cubin={path} is compiled again" in caplog.text
    assert cache.get(add_spec(), CC) == good
    assert compiled == ["add", "add"]


def test_a_whole_file_of_another_kernel_is_not_believed(
    tmp_path: Path, compiled: list[str]
) -> None:
    cache = CubinCache(tmp_path)
    good = cache.get(add_spec(), CC)
    (path,) = files(tmp_path)
    path.write_bytes(encode(dataclasses.replace(good, name="other")))
    assert cache.get(add_spec(), CC).name == "add"
    assert compiled == ["add", "add"]


def test_a_directory_that_cannot_be_written_is_done_without(
    tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the directory's place stops root, too."""
    (tmp_path / "file").write_text("")
    cache = CubinCache(tmp_path / "file" / "cubins")
    with caplog.at_level(logging.INFO):
        assert cache.get(add_spec(), CC) == cache.get(add_spec(), CC)
    assert compiled == ["add", "add"]
    assert "is not kept" in caplog.text


def test_a_failing_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert CubinCache(tmp_path).get(add_spec(), CC).name == "add"
    assert files(tmp_path) == []


def test_no_directory_keeps_nothing(compiled: list[str]) -> None:
    cache = CubinCache(None)
    assert cache.get(add_spec(), CC) == cache.get(add_spec(), CC)
    assert compiled == ["add", "add"]


def test_processes_share_a_directory(tmp_path: Path) -> None:
    code = (
        "from tests.kernels.cuda.test_cubins import *\n"
        f"cache = CubinCache(Path({str(tmp_path)!r}))\n"
        "print(hash_of([cache.get(add_spec(i), CC) for i in range(3)]))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = {worker.communicate(timeout=120)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    cache = CubinCache(tmp_path)
    kept = hash_of([cache.get(add_spec(i), CC) for i in range(3)])
    assert results == {f"{kept}\n"}
    assert len(files(tmp_path)) == 3


def hash_of(found: list[Cubin]) -> str:
    return "-".join(str(sum(cubin.code)) for cubin in found)


def test_the_directory_is_the_chosen_one_or_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", "/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cubins.default_directory() == Path("/chosen")
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", "")
    assert cubins.default_directory() == Path("/xdg/hps_numba/cubins")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubins.default_directory() == tmp_path / ".cache/hps_numba/cubins"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cubins.default_directory() is None


def test_encoding_keeps_every_byte() -> None:
    cubin = Cubin("k", bytes(range(256)) * 2, (12, 1), "Größe\nof a log")
    assert decode(encode(cubin)) == cubin
    with pytest.raises(DamagedError, match="begin"):
        decode(b"\x7fELF")
