"""Kernels become PTX and cubins on a machine without a driver."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from cuda.core import ObjectCode
from numba import cuda
from numba.core import errors as numba_errors
from numba.cuda import dispatcher, types
from numba.cuda.core import errors as cuda_errors
from numba.cuda.extending import intrinsic

from hps_numba.kernels.cuda import ptx
from hps_numba.kernels.cuda.compiling import (
    KernelCompileError,
    KernelSpec,
    compile_cubin,
    compile_ptx,
    link,
    target_device,
)

CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0)]


@cuda.jit(device=True, forceinline=True)
def thread_index() -> Any:
    return np.uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)


def scale_spec(factor: int = 3, **options: Any) -> KernelSpec:
    def scale(address, n):
        i = thread_index()
        if i < n:
            at = address + np.uint64(i) * np.uint64(4)
            ptx.store_u32(at, np.uint32(ptx.load_u32(at) * np.uint32(factor)))

    return KernelSpec(f"scale_{factor}", scale, "Uu", **options)


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_a_kernel_with_device_functions_compiles_without_a_driver(
    cc: tuple[int, int],
) -> None:
    cubin = compile_cubin(scale_spec(), cc)
    assert cubin.code.startswith(b"\x7fELF")
    assert (cubin.name, cubin.cc) == ("scale_3", cc)
    assert "Compiling entry function 'scale_3'" in cubin.log
    assert "0 bytes stack frame, 0 bytes spill stores" in cubin.log
    assert ObjectCode.from_cubin(cubin.code).code == cubin.code


def test_the_entry_has_the_name_and_the_parameters_of_the_spec() -> None:
    def everything(a, b, c, d, e):
        ptx.store_u32(a, np.uint32(b + np.uint32(c) + np.uint32(d) + np.uint32(e)))

    text = compile_ptx(KernelSpec("everything_1", everything, "UuIif"), (9, 0))
    assert ".visible .entry everything_1(" in text
    kinds = [line.split()[1] for line in text.splitlines() if ".param ." in line][:5]
    assert kinds == [".u64", ".u32", ".u64", ".u32", ".f32"]
    assert "NumbaEnv" not in text
    assert "_ZN" not in text


def test_the_block_bounds_the_registers() -> None:
    assert ".maxntid 256, 1, 1" in compile_ptx(scale_spec(), (9, 0))
    assert ".maxntid 1024, 1, 1" in compile_ptx(scale_spec(block=1024), (9, 0))


def test_max_registers_reaches_the_assembler() -> None:
    def sum_of_many(address):
        buffer = cuda.local.array(48, np.uint32)
        for i in range(48):
            buffer[i] = ptx.load_u32(address + np.uint64(4 * i))
        total = np.uint32(0)
        for i in range(48):
            total = np.uint32(total ^ buffer[np.uint32(i * 7) % np.uint32(48)])
        ptx.store_u32(address, total)

    def registers(limit: int | None) -> int:
        spec = KernelSpec("sum_of_many", sum_of_many, "U", max_registers=limit)
        words = compile_cubin(spec, (9, 0)).log.split()
        return int(words[words.index("Used") + 1])

    assert registers(None) > 24
    assert registers(24) <= 24


def test_a_capability_gets_the_same_code_whichever_came_first() -> None:
    """Numba keeps the device functions of the first compilation."""
    code = (
        "import sys; from tests.kernels.cuda.test_compiling import *\n"
        "sys.stdout.write(compile_ptx(scale_spec(), (7, 5)))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    compile_ptx(scale_spec(), (10, 0))
    assert compile_ptx(scale_spec(), (7, 5)) == fresh


def test_compiling_twice_gives_the_same_cubin() -> None:
    assert compile_cubin(scale_spec(), (9, 0)) == compile_cubin(scale_spec(), (9, 0))


def test_threads_compile_at_the_same_time() -> None:
    found: dict[tuple[int, int], str] = {}

    def work(cc: tuple[int, int]) -> None:
        found[cc] = compile_ptx(scale_spec(cc[0]), cc)

    threads = [threading.Thread(target=work, args=(cc,)) for cc in CAPABILITIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cc in CAPABILITIES:
        assert f".target sm_{cc[0]}{cc[1]}" in found[cc]
        assert f".entry scale_{cc[0]}(" in found[cc]


def test_only_the_compiling_thread_sees_the_target_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: "the real one")
    seen = []
    with target_device((8, 0)):
        assert dispatcher.get_current_device().compute_capability == (8, 0)
        other = threading.Thread(
            target=lambda: seen.append(dispatcher.get_current_device())
        )
        other.start()
        other.join()
    assert seen == ["the real one"]
    assert dispatcher.get_current_device() == "the real one"


def test_the_real_device_is_back_after_a_failure() -> None:
    real = dispatcher.get_current_device
    with pytest.raises(ZeroDivisionError), target_device((8, 0)):
        raise ZeroDivisionError
    assert dispatcher.get_current_device is real


@pytest.mark.parametrize("source", [numba_errors, cuda_errors])
def test_numbas_warnings_do_not_leak(source: Any) -> None:
    warned: list[object] = []

    @intrinsic
    def warns(typingctx):
        def lower(context, builder, signature, args):
            return context.get_constant(types.uint32, 1)

        warned.append(warnings.warn("planted", source.NumbaWarning, stacklevel=1))
        return types.uint32(), lower

    def kernel(address):
        ptx.store_u32(address, warns())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_ptx(KernelSpec("warning", kernel, "U"), (9, 0))
    assert warned
    assert caught == []


def test_a_function_that_numba_refuses_names_the_kernel() -> None:
    def kernel(address):
        address.nothing()

    with pytest.raises(
        KernelCompileError,
        match=r"kernel refused for compute capability 9\.0(.|\n)*nothing",
    ) as caught:
        compile_ptx(KernelSpec("refused", kernel, "U"), (9, 0))
    assert caught.value.__cause__ is not None


def test_ptx_too_new_for_the_linker_names_the_extras() -> None:
    spec = scale_spec()
    text = compile_ptx(spec, (9, 0))
    version = text.split(".version ")[1].split()[0]
    newer = text.replace(f".version {version}", ".version 99.9")
    with pytest.raises(KernelCompileError, match=r"99\.9(.|\n)*hps-numba\[cuda13\]"):
        link(spec, newer, (9, 0))


def test_ptx_that_is_wrong_is_refused_with_the_assemblers_words() -> None:
    spec = scale_spec()
    text = compile_ptx(spec, (9, 0)).replace("ret;", "return;")
    with pytest.raises(KernelCompileError, match="Not a name of any known instruction"):
        link(spec, text, (9, 0))


def test_a_capability_that_the_compiler_does_not_know_is_refused() -> None:
    with pytest.raises(KernelCompileError, match=r"kernel scale_3 .*5\.5"):
        compile_cubin(scale_spec(), (5, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "has space"}, "'has space' is not an identifier"),
        ({"name": "größe"}, "not an identifier"),
        ({"argtypes": "Uux"}, r"unknown argument types \['x'\]"),
        ({"argtypes": "U"}, "1 argument types for 2 parameters"),
        ({"block": 0}, "block=0"),
        ({"block": 48}, "block=48"),
        ({"block": 2048}, "block=2048"),
    ],
)
def test_a_spec_that_cannot_be_launched_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {
        "name": "k",
        "function": lambda a, n: None,
        "argtypes": "Uu",
    }
    KernelSpec(**good)
    with pytest.raises(ValueError, match=message):
        KernelSpec(**{**good, **changes})
