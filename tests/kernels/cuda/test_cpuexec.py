"""What the CPU executor promises: its checks fire, its schedules are seeded."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import cuda
from numba.cuda import codegen, dispatcher, types
from numba.cuda.compiler import _compile_pyfunc_with_fixup
from numba.cuda.extending import intrinsic

from hps_numba.kernels.cuda.ptx import (
    add_u32,
    load_row,
    load_u8,
    load_u32,
    store_row,
    store_u8,
    store_u32,
)
from tests.kernels.cuda.word_kernels import ADDRESS_AND_NUMBER, run_on_words
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, KernelError, Launch, building
from tests.support.cpuexec.compiling import llvm_texts

u32, u64 = np.uint32, np.uint64
load_16, store_16 = load_row[16], store_row[16]


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory()


def test_numba_cudas_internals_are_those_we_know():
    installed = importlib.metadata.version("numba-cuda")
    known = cpuexec.NUMBA_CUDA_VERSION
    assert installed == known, (
        f"numba-cuda is {installed}, but tests/support/cpuexec/compiling.py leans on "
        f"private functions of {known}: run these tests, then change NUMBA_CUDA_VERSION"
    )
    parameters = inspect.signature(_compile_pyfunc_with_fixup).parameters
    assert list(parameters)[:2] == ["pyfunc", "sig"]
    assert {"device", "abi", "cc"} <= set(parameters)
    assert callable(dispatcher.get_current_device)
    assert isinstance(codegen.CUDACodeLibrary.llvm_strs, property)


def test_the_llvm_texts_are_modules_with_the_entry_among_them():
    def kernel(words, number):
        store_u32(words, number)

    texts, entry = llvm_texts(kernel, ADDRESS_AND_NUMBER)
    assert sum(f'define void @"{entry}"' in text for text in texts) == 1


def touch_byte(words, number):
    store_u8(words + u64(number), load_u8(words + u64(number)))


def test_the_first_and_the_last_byte_may_be_touched():
    run_on_words(touch_byte, 0)
    run_on_words(touch_byte, 255)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [(256, "reaches 1 bytes past the end of"), (-1, "reaches 1 bytes before")],
)
def test_one_byte_either_side_is_out_of_bounds(memory, offset, reason):
    kernel = cpuexec.compile_kernel(touch_byte, ADDRESS_AND_NUMBER)
    words = memory.array(64, np.uint32)
    address = memory.address(words) + offset
    with pytest.raises(KernelError, match=reason) as caught:
        cpuexec.run(Launch(kernel, 2, 32, (address, 0)), memory)
    assert "1-byte load" in caught.value.reason
    assert "allocation 0 (uint32, shape (64,), 256 bytes)" in caught.value.reason
    assert caught.value.kernel == "touch_byte"
    assert caught.value.block[0] in (0, 1)
    assert 0 <= caught.value.thread < 32


def test_a_wide_access_that_begins_inside_and_ends_outside_is_out_of_bounds():
    def kernel(words, number):
        if cuda.threadIdx.x == u32(3):
            store_16(words + u64(number), load_16(words))

    run_on_words(kernel, 240)
    with pytest.raises(KernelError, match=r"16-byte store .* 8 bytes past") as caught:
        # No multiple of 16, but the bounds are looked at first.
        run_on_words(kernel, 248)
    assert caught.value.thread == 3


def test_an_atomic_out_of_bounds_is_called_one():
    def kernel(words, number):
        add_u32(words + u64(256), number)

    with pytest.raises(KernelError, match=r"4-byte atomic .* 4 bytes past"):
        run_on_words(kernel)


def test_the_null_pointer_is_out_of_bounds():
    def kernel(words, number):
        store_u32(u64(0), number)

    with pytest.raises(KernelError, match="out of bounds: 4-byte store at 0 "):
        run_on_words(kernel)


def test_nothing_is_in_bounds_where_nothing_is_allocated(memory):
    kernel = cpuexec.compile_kernel(touch_byte, ADDRESS_AND_NUMBER)
    with pytest.raises(KernelError, match="from no memory at all"):
        cpuexec.run(Launch(kernel, 1, 32, (4096, 0)), memory)


def test_a_freed_array_is_out_of_bounds_and_its_neighbours_are_not(memory):
    kernel = cpuexec.compile_kernel(touch_byte, ADDRESS_AND_NUMBER)
    arrays = [memory.array(16, np.uint8) for _ in range(3)]
    addresses = [memory.address(array) for array in arrays]
    memory.free(arrays[1])
    for i in (0, 2):
        cpuexec.run(Launch(kernel, 1, 32, (addresses[i], 15)), memory)
    with pytest.raises(KernelError, match="out of bounds"):
        cpuexec.run(Launch(kernel, 1, 32, (addresses[1], 0)), memory)
    with pytest.raises(ValueError, match="has been freed"):
        memory.free(arrays[1])
    with pytest.raises(ValueError, match="is not of this device memory"):
        memory.address(arrays[1])


def test_arrays_are_aligned_filled_and_copied_with_addresses_of_their_views(memory):
    made = memory.array((3, 5), np.float32, fill=1.5)
    copied = memory.copy(np.arange(7, dtype=np.int64))
    assert memory.address(made) % 256 == memory.address(copied) % 256 == 0
    np.testing.assert_array_equal(made, np.full((3, 5), 1.5, np.float32))
    np.testing.assert_array_equal(copied, np.arange(7))
    assert memory.address(made[1:]) == memory.address(made) + 20
    assert memory.array(0, np.uint8).size == 0


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_misaligned_access_is_an_error(offset):
    def kernel(words, number):
        store_u32(words + u64(number), number)

    with pytest.raises(KernelError, match=r"misaligned: 4-byte store .* multiple of 4"):
        run_on_words(kernel, offset)


def test_sixteen_bytes_are_aligned_to_sixteen():
    def kernel(words, number):
        load_16(words + u64(number))

    with pytest.raises(
        KernelError, match=r"misaligned: 16-byte load .* multiple of 16"
    ):
        run_on_words(kernel, 8)


def test_a_local_array_larger_than_the_stack_is_an_error():
    def kernel(words, number):
        large = cuda.local.array(20_000, np.uint32)
        for i in range(number):
            large[i] = u32(i)
        store_u32(words, large[number - u32(1)])

    with pytest.raises(KernelError, match="stack overflow"):
        run_on_words(kernel, 9)


def test_a_local_array_that_fits_is_each_threads_own():
    def kernel(words, number):
        thread = u32(cuda.threadIdx.x)
        local = cuda.local.array(500, np.uint32)
        for i in range(number):
            local[i] = u32(thread * number + u32(i))
        store_u32(words + u64(thread) * u64(4), local[number - u32(1)])

    expected = np.arange(64) * 500 + 499
    np.testing.assert_array_equal(run_on_words(kernel, 500, preempt=0.01), expected)


@intrinsic
def divide(typingctx, a, b):
    def lower(context, builder, signature, args):
        return builder.sdiv(*args)

    return types.int32(types.int32, types.int32), lower


def test_a_division_that_would_stop_this_cpu_is_an_error(memory):
    def kernel(out, a, b):
        store_u32(out, u32(divide(a, b)))

    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.int32, types.int32))
    out = memory.array(1, np.int32)

    def quotient(a: int, b: int) -> int:
        cpuexec.run(Launch(compiled, 1, 1, (memory.address(out), a, b)), memory)
        return int(out[0])

    assert quotient(-7, 2) == -3
    with pytest.raises(KernelError, match="division by zero"):
        quotient(1, 0)
    with pytest.raises(KernelError, match="division overflows"):
        quotient(-(2**31), -1)


@pytest.mark.parametrize(("number", "side"), [(129, "past the end"), (0, "before")])
def test_a_shared_array_has_bounds(number, side):
    def kernel(words, number):
        shared = cuda.shared.array(64, np.uint32)
        # Numba adds the length to an index below 0.
        shared[np.int64(number) - np.int64(65)] = u32(1)
        cuda.syncthreads()
        store_u32(words, shared[0])

    run_on_words(kernel, 128)
    with pytest.raises(KernelError, match=f"{side}.* a shared array of 256 bytes"):
        run_on_words(kernel, number)


def test_shared_memory_is_poisoned_before_it_is_written():
    def kernel(words, number):
        shared = cuda.shared.array(64, np.uint32)
        store_u32(words + u64(cuda.threadIdx.x) * u64(4), shared[cuda.threadIdx.x])

    assert set(run_on_words(kernel)) == {0xA5A5A5A5}


def test_dynamic_shared_memory_has_the_size_that_the_launch_says(memory):
    def kernel(words, number):
        shared = cuda.shared.array(0, np.uint32)
        shared[number] = number
        store_u32(words, shared[number])

    compiled = cpuexec.compile_kernel(kernel, ADDRESS_AND_NUMBER)
    words = memory.array(1, np.uint32)
    args = (memory.address(words), 15)
    cpuexec.run(Launch(compiled, 1, 1, args, shared_bytes=64), memory)
    assert words[0] == 15
    with pytest.raises(KernelError, match="4 bytes past the end of a shared array"):
        cpuexec.run(Launch(compiled, 1, 1, args, shared_bytes=60), memory)


def test_inline_ptx_without_a_model_is_refused_by_its_text():
    @intrinsic
    def prefetch(typingctx, address):
        def lower(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
            asm = ir.InlineAsm(kind, "prefetchu.L1 [$0];", "l", side_effect=True)
            builder.call(asm, args)
            return context.get_dummy_value()

        return types.none(types.uint64), lower

    def kernel(words, number):
        prefetch(words)

    with pytest.raises(NotImplementedError, match=r"prefetchu\.L1 \[\$0\]"):
        cpuexec.compile_kernel(kernel, ADDRESS_AND_NUMBER)


def test_a_choice_among_constants_needs_no_table_in_memory():
    def kernel(words, number):
        thread = u32(cuda.threadIdx.x)
        kind = u32(thread % u32(6))
        width = u32(1)
        if kind == u32(0):
            width = u32(16)
        elif kind == u32(1):
            width = u32(80)
        elif kind == u32(2):
            width = u32(7)
        elif kind == u32(3):
            width = u32(1000)
        elif kind == u32(4):
            width = u32(3)
        store_u32(words + u64(thread) * u64(4), width)

    expected = np.array([16, 80, 7, 1000, 3, 1])[np.arange(64) % 6]
    np.testing.assert_array_equal(run_on_words(kernel), expected)


def test_an_array_of_constants_is_refused():
    table = np.arange(100, dtype=np.uint32)

    def kernel(words, number):
        constants = cuda.const.array_like(table)
        store_u32(words, constants[number])

    with pytest.raises(NotImplementedError, match="arrays of a module"):
        cpuexec.compile_kernel(kernel, ADDRESS_AND_NUMBER)


def test_launches_that_make_no_sense_are_refused(memory):
    kernel = cpuexec.compile_kernel(touch_byte, ADDRESS_AND_NUMBER)
    words = memory.array(64, np.uint32)
    args = (memory.address(words), 0)
    for launch, message in [
        (Launch(kernel, 1, 1025, args), "more than 1024 threads"),
        (Launch(kernel, 0, 32, args), "no size of a grid"),
        (Launch(kernel, 1, 32, args[:1]), "takes 2 arguments, not 1"),
        (Launch(kernel, 1, 32, args, after=0), "cannot come after launch 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpuexec.run(launch, memory)
    with pytest.raises(ValueError, match="is none of"):
        cpuexec.run(Launch(kernel, 1, 32, args), memory, schedule="fair")
    with pytest.raises(ValueError, match="make no sense"):
        cpuexec.run(Launch(kernel, 1, 32, args), memory, preempt=2.0)


def test_the_runtime_builds_without_warnings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, "-Werror"))
    for _ in range(2):  # the second time it is there
        assert building.runtime.__wrapped__().nv_run
    assert len(list(tmp_path.glob("hps_numba/cpuexec/*"))) == 1


def test_what_keeps_the_runtime_from_building_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as context:
        context.setattr(building, "_FLAGS", ("-fno-such-flag",))
        with pytest.raises(RuntimeError, match=r"does not build:\n.*no-such-flag"):
            building.runtime.__wrapped__()
    with monkeypatch.context() as context:
        context.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="needs a C compiler: install gcc"):
            building.runtime.__wrapped__()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="this is Linux on aarch64"):
        building.runtime.__wrapped__()


def test_kernels_are_compiled_once_for_what_they_mean():
    def make(step: int, load: Any) -> Any:
        def kernel(words, number):
            store_u32(words, u32(load(words) + u32(step)))

        return kernel

    def compiled(step: int, load: Any) -> cpuexec.Kernel:
        return cpuexec.compile_kernel(make(step, load), ADDRESS_AND_NUMBER)

    assert compiled(1, load_u32) is compiled(1, load_u32)
    assert compiled(1, load_u32) is not compiled(2, load_u32)
    assert compiled(1, load_u32) is not compiled(1, load_u8)


def test_a_kernel_of_cuda_jit_is_taken_for_its_function():
    @cuda.jit
    def kernel(words, number):
        store_u32(words, number)

    assert run_on_words(kernel, 5)[0] == 5
    with cpuexec.without_driver():
        assert dispatcher.get_current_device().compute_capability == (9, 0)
