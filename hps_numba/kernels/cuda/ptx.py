"""Instructions that Numba CUDA does not offer: wide and ordered accesses by address.

Addresses are uint64. Loads of rows and of the cache's own state are *relaxed* at GPU
scope, so that they may race with a writer; what orders them is named in the function
that uses them. A narrow value travels in a 32-bit register. Every instruction text here
has a model in ``tests/support/cpuexec``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

I16, I32, I64, I128 = (ir.IntType(bits) for bits in (16, 32, 64, 128))
FULL_WARP = 0xFFFFFFFF
QUAD = types.UniTuple(types.uint32, 4)


def _asm(
    builder: Any,
    result: Any,
    args: Any,
    text: str,
    constraints: str,
    pure: bool = False,
) -> Any:
    """Call an instruction; one that is not pure is neither moved nor merged."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    if not pure:
        constraints += ",~{memory}"
    asm = ir.InlineAsm(kind, text, constraints, side_effect=not pure)
    return builder.call(asm, args)


def _register(width: int) -> tuple[Any, Any, str]:
    """Return the Numba type, LLVM type and constraint that hold ``width`` bits."""
    if width == 64:
        return types.uint64, I64, "l"
    return types.uint32, I32, "r"


def _load(qualifiers: str, width: int, *, pure: bool = False) -> Any:
    numba_type, llvm_type, letter = _register(width)
    text = f"ld.{qualifiers}.u{width} $0, [$1];"

    @intrinsic
    def load(typingctx, address):
        def lower(context, builder, signature, args):
            return _asm(builder, llvm_type, args, text, f"={letter},l", pure)

        return numba_type(types.uint64), lower

    return load


def _load_words(qualifiers: str, n_words: int) -> Any:
    """Return a load of 2 or 4 words into a QUAD, the rest zero."""
    outs = ",".join(f"${i}" for i in range(n_words))
    text = f"ld.{qualifiers}.v{n_words}.u32 {{{outs}}}, [${n_words}];"
    constraints = ",".join(["=r"] * n_words) + ",l"

    @intrinsic
    def load(typingctx, address):
        def lower(context, builder, signature, args):
            words = ir.LiteralStructType([I32] * n_words)
            got = _asm(builder, words, args, text, constraints)
            return _quad(
                context,
                builder,
                [builder.extract_value(got, i) for i in range(n_words)],
            )

        return QUAD(types.uint64), lower

    return load


def _quad(context: Any, builder: Any, words: list[Any]) -> Any:
    zeros = [ir.Constant(I32, 0)] * (4 - len(words))
    return context.make_tuple(builder, QUAD, words + zeros)


def _store(qualifiers: str, width: int) -> Any:
    numba_type, _, letter = _register(width)
    text = f"st.{qualifiers}.u{width} [$0], $1;"

    @intrinsic
    def store(typingctx, address, value):
        def lower(context, builder, signature, args):
            _asm(builder, ir.VoidType(), args, text, f"l,{letter}")
            return context.get_dummy_value()

        return types.none(types.uint64, numba_type), lower

    return store


def _store_words(qualifiers: str, n_words: int) -> Any:
    ins = ",".join(f"${i + 1}" for i in range(n_words))
    text = f"st.{qualifiers}.v{n_words}.u32 [$0], {{{ins}}};"
    constraints = ",".join(["l"] + ["r"] * n_words)

    @intrinsic
    def store(typingctx, address, quad):
        def lower(context, builder, signature, args):
            words = [builder.extract_value(args[1], i) for i in range(n_words)]
            _asm(builder, ir.VoidType(), [args[0], *words], text, constraints)
            return context.get_dummy_value()

        return types.none(types.uint64, QUAD), lower

    return store


def _atomic(operation: str, width: int, order: str = "relaxed") -> Any:
    """Return ``atom`` of one operand: the value before."""
    numba_type, llvm_type, letter = _register(width)
    text = f"atom.{order}.gpu.global.{operation}.u{width} $0, [$1], $2;"

    @intrinsic
    def atomic(typingctx, address, value):
        def lower(context, builder, signature, args):
            return _asm(builder, llvm_type, args, text, f"={letter},l,{letter}")

        return numba_type(types.uint64, numba_type), lower

    return atomic


def _compare_and_swap(order: str, width: int) -> Any:
    """Return ``atom.cas``: address, expected, desired; the value before."""
    numba_type, llvm_type, letter = _register(width)
    text = f"atom.{order}.gpu.global.cas.b{width} $0, [$1], $2, $3;"

    @intrinsic
    def swap(typingctx, address, expected, desired):
        def lower(context, builder, signature, args):
            constraints = f"={letter},l,{letter},{letter}"
            return _asm(builder, llvm_type, args, text, constraints)

        return numba_type(types.uint64, numba_type, numba_type), lower

    return swap


def _statement(text: str) -> Any:
    @intrinsic
    def statement(typingctx):
        def lower(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [])
            asm = ir.InlineAsm(kind, text, "~{memory}", side_effect=True)
            builder.call(asm, [])
            return context.get_dummy_value()

        return types.none(), lower

    return statement


# What nobody writes during a launch: descriptors, the caller's keys.
load_const_u32 = _load("global.nc", 32, pure=True)
load_const_u64 = _load("global.nc", 64, pure=True)

# State of the cache that others may be writing.
load_u8 = _load("relaxed.gpu.global", 8)
load_u32 = _load("relaxed.gpu.global", 32)
load_u64 = _load("relaxed.gpu.global", 64)
load_quad = _load_words("relaxed.gpu.global", 4)
# What follows in the program is loaded after all four words.
load_acquire_quad = _load_words("acquire.gpu.global", 4)
load_acquire_u32 = _load("acquire.gpu.global", 32)
store_u8 = _store("relaxed.gpu.global", 8)
store_u32 = _store("relaxed.gpu.global", 32)
store_u64 = _store("relaxed.gpu.global", 64)
store_release_u32 = _store("release.gpu.global", 32)

# Rows, by bytes a lane moves; they are read once, so they take no room in L1.
_ROW = "relaxed.gpu.global.L1::no_allocate"
load_row = {
    16: _load_words(_ROW, 4),
    8: _load_words(_ROW, 2),
    4: _load(_ROW, 32),
    2: _load(_ROW, 16),
}
store_row = {
    16: _store_words("relaxed.gpu.global", 4),
    8: _store_words("relaxed.gpu.global", 2),
    4: _store("relaxed.gpu.global", 32),
    2: _store("relaxed.gpu.global", 16),
}
# The output, which is seldom read again by the same launch.
store_out = {
    16: _store_words("global.cs", 4),
    8: _store_words("global.cs", 2),
    4: _store("global.cs", 32),
    2: _store("global.cs", 16),
}

add_u32 = _atomic("add", 32)
add_u64 = _atomic("add", 64)
max_u64 = _atomic("max", 64)
swap_acquire_u32 = _compare_and_swap("acquire", 32)
swap_u64 = _compare_and_swap("relaxed", 64)
fence = _statement("fence.acq_rel.gpu;")


@intrinsic
def shuffle_u32(typingctx, value, lane):
    """Return ``value`` of another lane; every lane of the warp takes part."""

    def lower(context, builder, signature, args):
        return _shuffle(builder, args[0], args[1])

    return types.uint32(types.uint32, types.uint32), lower


@intrinsic
def shuffle_u64(typingctx, value, lane):
    """Return ``value`` of another lane, as two shuffles of 32 bits."""

    def lower(context, builder, signature, args):
        value, lane = args
        half = ir.Constant(I64, 32)
        low = _shuffle(builder, builder.trunc(value, I32), lane)
        high = _shuffle(builder, builder.trunc(builder.lshr(value, half), I32), lane)
        high = builder.shl(builder.zext(high, I64), half)
        return builder.or_(builder.zext(low, I64), high)

    return types.uint64(types.uint64, types.uint32), lower


def _shuffle(builder: Any, value: Any, lane: Any) -> Any:
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    kind = ir.FunctionType(I32, [I32, I32])
    asm = ir.InlineAsm(kind, text, "=r,r,r", side_effect=True)
    # Convergent: all lanes stay together where this is called.
    return builder.call(asm, [value, lane], attrs=("convergent",))


@intrinsic
def opaque(typingctx, value):
    """Return a uint32 that the compiler cannot know: a loop to it stays a loop."""

    def lower(context, builder, signature, args):
        kind = ir.FunctionType(I32, [I32])
        asm = ir.InlineAsm(kind, "mov.b32 $0, $1;", "=r,r")
        return builder.call(asm, args)

    return types.uint32(types.uint32), lower


@intrinsic
def multiply_high(typingctx, a, b):
    """Return the upper 64 bits of the product of two uint64."""

    def lower(context, builder, signature, args):
        wide = [builder.zext(arg, I128) for arg in args]
        product = builder.mul(*wide)
        return builder.trunc(builder.lshr(product, ir.Constant(I128, 64)), I64)

    return types.uint64(types.uint64, types.uint64), lower


@intrinsic
def float16_bits_to_float32_bits(typingctx, half):
    """Return the float32 of a float16, both as bits in a uint32."""

    def lower(context, builder, signature, args):
        value = builder.bitcast(builder.trunc(args[0], I16), ir.HalfType())
        return builder.bitcast(builder.fpext(value, ir.FloatType()), I32)

    return types.uint32(types.uint32), lower


@intrinsic
def bits_to_float32(typingctx, bits):
    """Return the float32 with these bits."""

    def lower(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), lower


@intrinsic
def float32_to_bits(typingctx, value):
    """Return the bits of a float32."""

    def lower(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), lower


@intrinsic
def roughly_inverse(typingctx, value):
    """Return 1 / value to about 23 bits, without a call."""

    def lower(context, builder, signature, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        asm = ir.InlineAsm(kind, "rcp.approx.ftz.f32 $0, $1;", "=f,f")
        return builder.call(asm, args)

    return types.float32(types.float32), lower
