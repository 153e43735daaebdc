"""Memory operations on raw addresses that Numba has no words for.

Addresses are intp. The atomic operations are 64 bits wide and need 8-byte alignment.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hps_numba.kernels.host.compiling import njit

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_I8P = ir.IntType(8).as_pointer()
_I64P = _I64.as_pointer()


@intrinsic
def copy_bytes(typingctx, dst, src, n_bytes):
    """Copy ``n_bytes`` from ``src`` to ``dst``; the two do not overlap."""
    signature = types.void(types.intp, types.intp, types.intp)

    def codegen(context, builder, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I8P, _I8P, _I64, ir.IntType(1)])
        memcpy = builder.module.declare_intrinsic(
            "llvm.memcpy", [_I8P, _I8P, _I64], kind
        )
        dst_pointer = builder.inttoptr(args[0], _I8P)
        src_pointer = builder.inttoptr(args[1], _I8P)
        builder.call(memcpy, [dst_pointer, src_pointer, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def move_bytes(typingctx, dst, src, n_bytes):
    """Copy ``n_bytes`` from ``src`` to ``dst``; the two may overlap."""
    signature = types.void(types.intp, types.intp, types.intp)

    def codegen(context, builder, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I8P, _I8P, _I64, ir.IntType(1)])
        memmove = builder.module.declare_intrinsic(
            "llvm.memmove", [_I8P, _I8P, _I64], kind
        )
        dst_pointer = builder.inttoptr(args[0], _I8P)
        src_pointer = builder.inttoptr(args[1], _I8P)
        builder.call(memmove, [dst_pointer, src_pointer, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def load_word(typingctx, address):
    """Return the 8 bytes at an address of any alignment, the first one lowest."""
    signature = types.uint64(types.intp)

    def codegen(_context, builder, _signature, args):
        return builder.load(builder.inttoptr(args[0], _I64P), align=1)

    return signature, codegen


@intrinsic
def load_pair(typingctx, address):
    """Return the 2 bytes at an address of any alignment, the first one lowest."""
    signature = types.uint16(types.intp)

    def codegen(_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(16).as_pointer())
        return builder.load(pointer, align=1)

    return signature, codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line of ``address``; any address is allowed."""
    signature = types.void(types.intp)

    def codegen(context, builder, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I8P, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_I8P], kind)
        pointer = builder.inttoptr(args[0], _I8P)
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def load_acquire(typingctx, address):
    """Return the int64 at ``address``; later reads see what was released before it."""
    signature = types.int64(types.intp)

    def codegen(_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], _I64P)
        return builder.load_atomic(pointer, "acquire", 8, typ=_I64)

    return signature, codegen


@intrinsic
def store_release(typingctx, address, value):
    """Write an int64 to ``address`` after everything that was written before."""
    signature = types.void(types.intp, types.int64)

    def codegen(context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], _I64P)
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fence_acquire(typingctx):
    """Keep reads that follow from moving before reads that precede."""
    signature = types.void()

    def codegen(context, builder, _signature, _args):
        builder.fence("acquire")
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fence_release(typingctx):
    """Keep writes that follow from moving before writes that precede."""
    signature = types.void()

    def codegen(context, builder, _signature, _args):
        builder.fence("release")
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def count_leading_zeros(typingctx, value):
    """Return the number of zero bits above the highest one of a non-zero int64."""
    signature = types.int64(types.int64)

    def codegen(_context, builder, _signature, args):
        return builder.ctlz(args[0], ir.IntType(1)(1))

    return signature, codegen


@intrinsic
def copy_vector(typingctx, dst, src):
    """Copy 32 bytes from ``src`` to ``dst``, of any alignment."""
    signature = types.void(types.intp, types.intp)
    vector = ir.VectorType(_I64, 4)

    def codegen(context, builder, _signature, args):
        dst_pointer = builder.inttoptr(args[0], vector.as_pointer())
        src_pointer = builder.inttoptr(args[1], vector.as_pointer())
        value = builder.load(src_pointer, align=1)
        builder.store(value, dst_pointer, align=1)
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True, cache=True, inline="always")
def copy_row(dst, src, n_bytes):
    """Copy a row; short rows without a call."""
    if n_bytes > 512:
        copy_bytes(dst, src, n_bytes)
        return
    done = 0
    while done + 32 <= n_bytes:
        copy_vector(dst + done, src + done)
        done += 32
    if done < n_bytes:
        copy_bytes(dst + done, src + done, n_bytes - done)
