"""Models of NVVM's intrinsics and of libdevice's functions, as LLVM text.

The functions named ``nv_`` are the C runtime's. Its collectives are convergent, so that
LLVM neither copies nor moves them across branches.
"""

from __future__ import annotations

import re

_REGISTERS = {
    f"llvm.nvvm.read.ptx.sreg.{name}.{axis}": 3 * i + j
    for i, name in enumerate(("tid", "ctaid", "ntid", "nctaid"))
    for j, axis in enumerate("xyz")
}
_REGISTERS |= {
    "llvm.nvvm.read.ptx.sreg.laneid": 12,
    "llvm.nvvm.read.ptx.sreg.warpsize": 13,
    "llvm.nvvm.read.ptx.sreg.lanemask.lt": 14,
}
LANES_BELOW, DYNAMIC_SHARED_BYTES = 14, 15

RUNTIME = {
    "llvm.memset.p0.i64": "void (ptr, i8, i64, i1)",
    "nv_access": "void (i64, i32)",
    "nv_access_many": "void (i64, i64, i32)",
    "nv_divide": "void (i64, i64, i32)",
    "nv_weak_load": "ptr (i64, i32)",
    "nv_weak_begin": "void (i64, i32)",
    "nv_weak_store": "void (i64, i32)",
    "nv_weak_swap": "void (i64, i32)",
    "nv_weak_fence": "void (i32)",
    "nv_preempt": "void ()",
    "nv_yield": "void ()",
    "nv_active_mask": "i32 ()",
    "nv_barrier": "void () convergent",
    "nv_barrier_reduce": "i32 (i32, i32) convergent",
    "nv_vote": "i64 (i32, i32, i32) convergent",
    "nv_shuffle": "i64 (i32, i32, i32, i32, i32) convergent",
    "nv_match_any": "i32 (i32, i64) convergent",
    "nv_match_all": "i64 (i32, i64) convergent",
    "nv_sync_warp": "void (i32) convergent",
    # What these return never changes in the life of a thread.
    "nv_register": "i32 (i32) memory(none) willreturn",
    "nv_shared": "ptr (i32, i64) memory(none) willreturn",
    "nv_half_to_float": "i32 (i32) memory(none) willreturn",
    "nv_float_to_half": "i32 (i32) memory(none) willreturn",
}

# Functions of libdevice by their signature; the runtime has each as nv_<name>.
_LIBDEVICE = {
    "i32 (i32)": "ffs popc clz abs brev",
    "i32 (i64)": "ffsll popcll clzll",
    "i64 (i64)": "brevll llabs",
    "i32 (i32, i32)": "min max umin umax mulhi umulhi",
    "i64 (i64, i64)": "llmin llmax ullmin ullmax umul64hi",
    "float (float)": "fabsf sqrtf floorf rintf",
    "float (float, float)": "fminf fmaxf",
    "float (float, float, float)": "fmaf",
    "double (double)": "fabs",
    "double (double, double)": "fmin fmax",
}
LIBDEVICE = {
    f"__nv_{name}": signature
    for signature, names in _LIBDEVICE.items()
    for name in names.split()
}


def _declare(name: str, signature: str) -> str:
    result, rest = signature.split(" ", 1)
    operands, attributes = rest[: rest.index(")") + 1], rest[rest.index(")") + 1 :]
    return f"declare {result} @{name}{operands}{attributes} nounwind"


DECLARATIONS = "\n".join(_declare(*one) for one in RUNTIME.items())


def _function(result: str, operands: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f'define internal {result} @"NAME"({operands}) alwaysinline {{\n{body}\n}}'


def _with_flag(operands: str, call: str, flag: str) -> str:
    """Return a function whose result is the lower half of a word, and a flag of it."""
    return _function(
        "{i32, i1}",
        operands,
        f"%both = call i64 {call}",
        "%low = trunc i64 %both to i32",
        f"%place = {flag}",
        "%flag = trunc i64 %place to i1",
        "%one = insertvalue {i32, i1} undef, i32 %low, 0",
        "%two = insertvalue {i32, i1} %one, i1 %flag, 1",
        "ret {i32, i1} %two",
    )


def _forward(result: str, operands: str, call: str) -> str:
    if result == "void":
        return _function(result, operands, f"call void {call}", "ret void")
    return _function(result, operands, f"%r = call {result} {call}", f"ret {result} %r")


def _fence(order: str) -> str:
    return _function(
        "void", "", f"fence {order}", "call void @nv_preempt()", "ret void"
    )


def _atomic(operation: str, kind: str) -> str:
    access = f"atomicrmw {operation} {kind}* %p, {kind} %v monotonic"
    return _function(kind, f"{kind}* %p, {kind} %v", f"%r = {access}", f"ret {kind} %r")


_UPPER, _SAME = "lshr i64 %both, 32", "or i64 %both, 0"
_NVVM = {
    "vote.sync": _with_flag(
        "i32 %m, i32 %k, i1 %p", "@nv_vote(i32 %m, i32 %k, i32 %wide)", _SAME
    ).replace("%both", "%wide = zext i1 %p to i32\n  %both", 1),
    "shfl.sync.i32": _with_flag(
        "i32 %m, i32 %k, i32 %x, i32 %b, i32 %c",
        "@nv_shuffle(i32 %m, i32 %k, i32 %x, i32 %b, i32 %c)",
        _UPPER,
    ),
    "match.any.sync.i32": _function(
        "i32",
        "i32 %m, i32 %v",
        "%wide = zext i32 %v to i64",
        "%r = call i32 @nv_match_any(i32 %m, i64 %wide)",
        "ret i32 %r",
    ),
    "match.any.sync.i64": _forward(
        "i32", "i32 %m, i64 %v", "@nv_match_any(i32 %m, i64 %v)"
    ),
    "match.all.sync.i32": _with_flag(
        "i32 %m, i32 %v", "@nv_match_all(i32 %m, i64 %wide)", _UPPER
    ).replace("%both", "%wide = zext i32 %v to i64\n  %both", 1),
    "match.all.sync.i64": _with_flag(
        "i32 %m, i64 %v", "@nv_match_all(i32 %m, i64 %v)", _UPPER
    ),
    "barrier0": _forward("void", "", "@nv_barrier()"),
    "barrier0.popc": _forward("i32", "i32 %p", "@nv_barrier_reduce(i32 1, i32 %p)"),
    "barrier0.and": _forward("i32", "i32 %p", "@nv_barrier_reduce(i32 2, i32 %p)"),
    "barrier0.or": _forward("i32", "i32 %p", "@nv_barrier_reduce(i32 3, i32 %p)"),
    "bar.warp.sync": _forward("void", "i32 %m", "@nv_sync_warp(i32 %m)"),
    "membar.gl": _fence("seq_cst"),
    "membar.cta": _fence("seq_cst"),
    "membar.sys": _fence("seq_cst"),
    "atomic.load.inc.32.p0i32": _atomic("uinc_wrap", "i32"),
    "atomic.load.dec.32.p0i32": _atomic("udec_wrap", "i32"),
    "atomic.load.add.f32.p0f32": _atomic("fadd", "float"),
    "atomic.load.add.f64.p0f64": _atomic("fadd", "double"),
}


def model_name(name: str) -> str:
    """Return the name that a modelled function has on this machine."""
    return name.replace("__nv_", "nv_", 1) if name in LIBDEVICE else "cpu." + name


def define(name: str) -> str:
    """Return the definition or declaration of an intrinsic or a libdevice function.

    Raises
    ------
    NotImplementedError
        If it has no model here.
    """
    if name in LIBDEVICE:
        signature = f"{LIBDEVICE[name]} memory(none) willreturn"
        return _declare(model_name(name), signature)
    if name in _REGISTERS:
        call = f"@nv_register(i32 {_REGISTERS[name]})"
        return _forward("i32", "", call).replace("NAME", model_name(name))
    short = name.removeprefix("llvm.nvvm.")
    if short in _NVVM:
        return _NVVM[short].replace("NAME", model_name(name))
    raise NotImplementedError(f"{name} has no CPU model")


_TO_FLOAT = re.compile(r"^(\s*)(%\S+) = fpext half (\S+) to float(.*)$", re.MULTILINE)
_TO_HALF = re.compile(r"^(\s*)(%\S+) = fptrunc float (\S+) to half(.*)$", re.MULTILINE)
_HALVES = """
define internal float @cpu.half_to_float(half %h) alwaysinline {
  %bits = bitcast half %h to i16
  %wide = zext i16 %bits to i32
  %r = call i32 @nv_half_to_float(i32 %wide)
  %f = bitcast i32 %r to float
  ret float %f
}
define internal half @cpu.float_to_half(float %f) alwaysinline {
  %bits = bitcast float %f to i32
  %r = call i32 @nv_float_to_half(i32 %bits)
  %low = trunc i32 %r to i16
  %h = bitcast i16 %low to half
  ret half %h
}
"""


def convert_halves(text: str) -> str:
    """Convert halves by the runtime, whatever this CPU has instructions for."""
    text, n_up = _TO_FLOAT.subn(r"\1\2 = call float @cpu.half_to_float(half \3)", text)
    text, n_down = _TO_HALF.subn(r"\1\2 = call half @cpu.float_to_half(float \3)", text)
    return text + _HALVES if n_up or n_down else text
