"""The models of inline PTX compute the right values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from hps_numba.kernels.cuda import ptx
from hps_numba.kernels.cuda.ptx import (
    float16_bits_to_float32_bits,
    load_acquire_quad,
    load_row,
    load_u32,
    load_u64,
    multiply_high,
    store_out,
    store_row,
    store_u32,
    store_u64,
)
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch
from tests.support.cpuexec import ptx as models

u32, u64 = np.uint32, np.uint64
RANDOM = np.random.default_rng(20260730)
TWO_ADDRESSES = (types.uint64, types.uint64)
LLVM = {
    types.uint64: ir.IntType(64),
    types.uint32: ir.IntType(32),
    types.float32: ir.FloatType(),
    types.none: ir.VoidType(),
}


def statement(text: str, constraints: str, result: Any, *operands: Any) -> Any:
    """Return an intrinsic of one PTX statement with up to three operands."""

    def lower(context, builder, signature, args):
        kind = ir.FunctionType(LLVM[result], [LLVM[one] for one in operands])
        asm = ir.InlineAsm(kind, text, constraints, side_effect=True)
        got = builder.call(asm, args)
        return context.get_dummy_value() if result == types.none else got

    signature = result(*operands)
    functions = {
        1: lambda typingctx, a: (signature, lower),
        2: lambda typingctx, a, b: (signature, lower),
        3: lambda typingctx, a, b, c: (signature, lower),
    }
    return intrinsic(functions[len(operands)])


def run_on_bytes(function: Any, source: np.ndarray, n: int, out_bytes: int) -> Any:
    """Run ``function(in, out)`` on ``n`` threads and return the output's bytes."""
    kernel = cpuexec.compile_kernel(function, TWO_ADDRESSES)
    memory = DeviceMemory()
    given, out = memory.copy(source), memory.array(out_bytes, np.uint8)
    args = (memory.address(given), memory.address(out))
    cpuexec.run(Launch(kernel, -(-n // 64), min(n, 64), args), memory)
    return out


LOADS = [
    "global.nc",
    "global",
    "volatile.global",
    "relaxed.gpu.global",
    "relaxed.gpu.global.L1::no_allocate",
    "acquire.gpu.global",
    "global.cs",
]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("how", LOADS)
def test_a_load_extends_a_narrow_value_with_zeros(how, bits):
    register = types.uint64 if bits == 64 else types.uint32
    letter, n_bytes = ("l" if bits == 64 else "r"), bits // 8
    load = statement(
        f"ld.{how}.u{bits} $0, [$1];", f"={letter},l", register, types.uint64
    )

    def kernel(source, out):
        i = u64(cuda.grid(1))
        store_u64(out + i * u64(8), u64(load(source + i * u64(n_bytes))))

    words = RANDOM.integers(0, 2**bits, 64, f"u{n_bytes}")
    out = run_on_bytes(kernel, words, 64, 512)
    np.testing.assert_array_equal(out.view(np.uint64), words)


def test_a_signed_load_extends_the_sign():
    load = statement("ld.global.s8 $0, [$1];", "=r,l", types.uint32, types.uint64)

    def kernel(source, out):
        i = u64(cuda.grid(1))
        store_u32(out + i * u64(4), load(source + i))

    words = np.arange(-128, 128, dtype=np.int8)
    out = run_on_bytes(kernel, words, 256, 1024)
    np.testing.assert_array_equal(out.view(np.int32), words)


STORES = ["global", "volatile.global", "relaxed.gpu.global", "global.cs"]
STORES += ["release.gpu.global"]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("how", STORES)
def test_a_store_takes_the_low_bits_and_leaves_its_neighbours(how, bits):
    register = types.uint64 if bits == 64 else types.uint32
    letter, n_bytes = ("l" if bits == 64 else "r"), bits // 8
    store = statement(
        f"st.{how}.u{bits} [$0], $1;", f"l,{letter}", types.none, types.uint64, register
    )

    def kernel(source, out):
        i = u64(cuda.grid(1))
        word = load_u64(source + i * u64(8))
        store(out + i * u64(2 * n_bytes), register(word))

    words = RANDOM.integers(0, 2**64, 64, np.uint64)
    out = run_on_bytes(kernel, words, 64, 64 * 2 * n_bytes).view(f"u{n_bytes}")
    np.testing.assert_array_equal(out[::2], words.astype(f"u{n_bytes}"))
    np.testing.assert_array_equal(out[1::2], 0)


def test_floats_travel_in_float_registers():
    load = statement("ld.global.f32 $0, [$1];", "=f,l", types.float32, types.uint64)
    store = statement(
        "st.global.f32 [$0], $1;", "l,f", types.none, types.uint64, types.float32
    )

    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(4)
        store(out + i, np.float32(load(source + i) * np.float32(2.0)))

    values = RANDOM.standard_normal(64).astype(np.float32)
    out = run_on_bytes(kernel, values, 64, 256)
    np.testing.assert_array_equal(out.view(np.float32), values * 2)


@pytest.mark.parametrize("n_bytes", [16, 8, 4, 2])
@pytest.mark.parametrize("table", [store_row, store_out])
def test_rows_are_copied_whole_by_each_width(n_bytes, table):
    load, store = load_row[n_bytes], table[n_bytes]

    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(n_bytes)
        store(out + i, load(source + i))

    given = RANDOM.integers(0, 256, 64 * n_bytes, np.uint8)
    np.testing.assert_array_equal(run_on_bytes(kernel, given, 64, given.size), given)


def test_two_words_loaded_leave_the_rest_of_a_quad_zero():
    load, store = load_row[8], store_row[16]

    def kernel(source, out):
        i = u64(cuda.grid(1))
        store(out + i * u64(16), load(source + i * u64(8)))

    given = RANDOM.integers(0, 2**32, (64, 2), np.uint32)
    out = run_on_bytes(kernel, given, 64, 1024).view(np.uint32).reshape(64, 4)
    np.testing.assert_array_equal(out[:, :2], given)
    np.testing.assert_array_equal(out[:, 2:], 0)


def test_the_acquire_load_of_16_bytes_keeps_the_order_of_words():
    store = store_row[16]

    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(16)
        store(out + i, load_acquire_quad(source + i))

    given = RANDOM.integers(0, 256, 1024, np.uint8)
    np.testing.assert_array_equal(run_on_bytes(kernel, given, 64, 1024), given)


ATOMICS = {
    "add": lambda a, b: a + b,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda a, b: b,
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("operation", ATOMICS)
@pytest.mark.parametrize("order", ["relaxed", "acq_rel"])
def test_an_atomic_changes_the_word_and_returns_the_one_before(operation, bits, order):
    register = types.uint64 if bits == 64 else types.uint32
    letter, n_bytes = ("l" if bits == 64 else "r"), bits // 8
    letter_of_type = "b" if operation in ("and", "or", "xor", "exch") else "u"
    atomic = statement(
        f"atom.{order}.gpu.global.{operation}.{letter_of_type}{bits} $0, [$1], $2;",
        f"={letter},l,{letter}",
        register,
        types.uint64,
        register,
    )

    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(8)
        change = register(load_u64(source + u64(512) + i))
        store_u64(out + i, u64(atomic(source + i, change)))
        store_u64(out + u64(512) + i, load_u64(source + i))

    words = RANDOM.integers(0, 2**64, (2, 64), np.uint64)
    if bits == 32:
        words[0] &= u64(2**32 - 1)
    out = run_on_bytes(kernel, words, 64, 1024).view(f"u{n_bytes}")
    before, change = words.astype(f"u{n_bytes}")
    stride = 8 // n_bytes
    np.testing.assert_array_equal(out[: 64 * stride : stride], before)
    np.testing.assert_array_equal(
        out[64 * stride :: stride], ATOMICS[operation](before, change)
    )


@pytest.mark.parametrize(
    ("swap", "bits"), [(ptx.swap_acquire_u32, 32), (ptx.swap_u64, 64)]
)
def test_compare_and_swap_stores_where_the_word_is_the_expected_one(swap, bits):
    register = types.uint64 if bits == 64 else types.uint32

    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(8)
        expected = register(load_u64(source + u64(512) + i))
        store_u64(out + i, u64(swap(source + i, expected, register(77))))
        store_u64(out + u64(512) + i, load_u64(source + i))

    words = RANDOM.integers(0, 2**bits, (2, 64), np.uint64)
    words[1, ::2] = words[0, ::2]
    before, after = run_on_bytes(kernel, words, 64, 1024).view(np.uint64).reshape(2, 64)
    np.testing.assert_array_equal(before, words[0])
    np.testing.assert_array_equal(after[::2], 77)
    np.testing.assert_array_equal(after[1::2], words[0, 1::2])


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.u32 $1, [$0];",
        "ld.global.evict.u32 $0, [$1];",
        "ld.relaxed.gpu.global.v8.u32 $0, [$1];",
        "ld.global.u32 $0, [$1+4];",
        "atom.global.add.u32 $0, [$1], 1;",
    ],
)
def test_a_statement_that_is_nearly_one_that_is_known_is_refused(text):
    load = statement(text, "=r,l", types.uint32, types.uint64)

    def kernel(source, out):
        store_u32(out, load(source))

    with pytest.raises(NotImplementedError, match="no CPU model"):
        cpuexec.compile_kernel(kernel, TWO_ADDRESSES)


def test_the_upper_half_of_a_product_is_that_of_128_bits():
    def kernel(source, out):
        i = u64(cuda.grid(1))
        a, b = load_u64(source + i * u64(16)), load_u64(source + i * u64(16) + u64(8))
        store_u64(out + i * u64(8), multiply_high(a, b))

    pairs = RANDOM.integers(0, 2**64, (256, 2), np.uint64)
    pairs[:4] = [[0, 5], [2**64 - 1, 2**64 - 1], [2**63, 2], [1, 2**64 - 1]]
    out = run_on_bytes(kernel, pairs, 256, 2048).view(np.uint64)
    assert out.tolist() == [int(a) * int(b) >> 64 for a, b in pairs]


def test_every_half_becomes_the_float_of_its_value():
    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(4)
        store_u32(out + i, float16_bits_to_float32_bits(load_u32(source + i)))

    halves = np.arange(2**16, dtype=np.uint32)
    out = run_on_bytes(kernel, halves, 2**16, 2**18).view(np.uint32)
    values = halves.astype(np.uint16).view(np.float16)
    expected = values.astype(np.float32).view(np.uint32)
    expected[np.isnan(values)] |= 1 << 22  # a quiet NaN, as the instruction makes it
    np.testing.assert_array_equal(out, expected)


def test_every_bfloat16_becomes_the_float_of_its_value():
    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(4)
        value = ptx.bits_to_float32(u32(load_u32(source + i) << u32(16)))
        store_u32(out + i, ptx.float32_to_bits(value))

    words = np.arange(2**16, dtype=np.uint32)
    out = run_on_bytes(kernel, words, 2**16, 2**18).view(np.uint32)
    np.testing.assert_array_equal(out, words << 16)


def test_a_row_of_one_constant_is_stored():
    store = store_row[16]

    def kernel(source, out):
        store(out, (u32(7), u32(7), u32(7), u32(7)))

    out = run_on_bytes(kernel, np.zeros(4, np.uint32), 1, 16).view(np.uint32)
    np.testing.assert_array_equal(out, [7, 7, 7, 7])


def test_a_store_of_a_vector_that_is_a_release_is_refused():
    text = "st.release.gpu.global.v2.u32 [$0], {$1,$2};"
    with pytest.raises(NotImplementedError, match="ordered vector"):
        models.model("name", "void", ("i64", "i32", "i32"), text)


@intrinsic
def float32_bits_to_float16_bits(typingctx, bits):
    def lower(context, builder, signature, args):
        value = builder.bitcast(args[0], ir.FloatType())
        half = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        return builder.zext(half, ir.IntType(32))

    return types.uint32(types.uint32), lower


def test_floats_are_rounded_to_the_nearest_half():
    def kernel(source, out):
        i = u64(cuda.grid(1)) * u64(4)
        store_u32(out + i, float32_bits_to_float16_bits(load_u32(source + i)))

    bits = RANDOM.integers(0, 2**32, 2**15, np.uint32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    # Around each half, and half way to the next: where rounding decides.
    near = halves[:-1] + np.diff(halves) / 2
    offsets = [halves.view(np.uint32), near.view(np.uint32)]
    offsets += [near.view(np.uint32) + 1, near.view(np.uint32) - 1]
    words = np.concatenate([bits, *offsets])
    words = words[: words.size // 64 * 64]
    out = run_on_bytes(kernel, words, words.size, 4 * words.size).view(np.uint32)
    values = words.view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    got = out.astype(np.uint16).view(np.float16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(got[number].view("u2"), expected[number].view("u2"))
    assert np.isnan(got[~number]).all()
