"""Models of inline PTX: the instructions that kernels write themselves.

Each access is one volatile access of its full width, which LLVM neither splits nor
merges. The check and the preemption point before it come with all other accesses'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.cpuexec.intrinsics import DYNAMIC_SHARED_BYTES, LANES_BELOW

_WIDTH = r"(?:v(?P<n>[24])\.)?(?P<kind>[usbf])(?P<bits>8|16|32|64)"
_LOAD = re.compile(rf"ld\.(?P<how>[\w.:]+?)\.{_WIDTH} (?P<to>\S+), \[\$(?P<at>\d+)\];")
_STORE = re.compile(rf"st\.(?P<how>[\w.:]+?)\.{_WIDTH} \[\$0\], (?P<of>.+);")
_ATOMIC = re.compile(
    r"atom\.(?P<how>relaxed|acquire|release|acq_rel)\.(?:gpu|cta|sys)\.global\."
    r"(?P<op>add|max|min|and|or|xor|exch)\.(?P<kind>[usb])(?P<bits>32|64) "
    r"\$0, \[\$1\], \$2;"
)
_SWAP = re.compile(
    r"atom\.(?P<how>relaxed|acquire|release|acq_rel)\.(?:gpu|cta|sys)\.global\."
    r"cas\.b(?P<bits>32|64) \$0, \[\$1\], \$2, \$3;"
)
_SHUFFLE = re.compile(
    r"shfl\.sync\.(?P<how>idx|up|down|bfly)\.b32 \$0, \$1, \$2, (?P<clamp>\d+), "
    r"(?P<mask>0x[0-9a-fA-F]+|-1);"
)
_FENCE = re.compile(r"fence\.(?P<how>acq_rel|sc)\.(?:gpu|cta|sys);")
_REGISTER = re.compile(r"mov\.u32 \$0, %(?P<name>lanemask_lt|dynamic_smem_size);")

_RECIPROCAL = re.compile(r"rcp\.approx\.ftz\.f32 \$0, \$1;")

_ORDERS = {"relaxed": "monotonic", "acquire": "acquire", "release": "release"}
_ORDERS |= {"acq_rel": "acq_rel"}
_KINDS = {"float": 32, "double": 64}
_SHUFFLES = {"idx": 0, "up": 1, "down": 2, "bfly": 3}
_SIGNED = {"max": "max", "min": "min"}
_READ_ONLY_HINTS = {"global", "gpu", "cta", "sys", "nc", "cs", "ca", "cg", "cv", "lu"}
_HINTS = _READ_ONLY_HINTS | {"relaxed", "acquire", "release", "volatile", "wb", "wt"}
_HINTS |= {"L1::no_allocate", "L1::evict_first", "L1::evict_last", "L2::128B"}


@dataclass(frozen=True)
class _Call:
    """One inline statement: its types, and the pieces of its text."""

    result: str
    operands: tuple[str, ...]
    found: re.Match[str]

    def order(self, name: str) -> str:
        """Return LLVM's word for the ordering of a load or store."""
        hints = set(self.found["how"].split("."))
        if unknown := hints - _HINTS:
            raise NotImplementedError(f"PTX qualifiers have no CPU model: {unknown}")
        return name if name in hints else "monotonic"


def model(name: str, result: str, operands: tuple[str, ...], text: str) -> str:
    """Return a function that does what a PTX statement does.

    Raises
    ------
    NotImplementedError
        If the statement has no model; the message holds its text.
    """
    for pattern, lines in _MODELS.items():
        if found := pattern.fullmatch(text):
            body = lines(_Call(result, operands, found))
            break
    else:
        raise NotImplementedError(f"inline PTX has no CPU model: {text!r}")
    parameters = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(operands))
    head = f"define internal {result} @{name}({parameters}) alwaysinline {{"
    return "\n".join([head, *(f"  {line}" for line in body), "}"])


def _pointer(call: _Call, place: int, kind: str) -> str:
    given = call.operands[place]
    cast = "inttoptr" if given == "i64" else "bitcast"
    return f"%p = {cast} {given} %a{place} to {kind}*"


def _n_bits(kind: str) -> int:
    return _KINDS.get(kind) or int(kind[1:])


def _widened(call: _Call, bits: int, kind: str) -> list[str]:
    """Return the lines that put ``%v`` of ``bits`` into the result's register."""
    if call.result in _KINDS:
        return [f"%r = bitcast i{bits} %v to {call.result}", f"ret {call.result} %r"]
    if _n_bits(call.result) == bits:
        return [f"ret i{bits} %v"]
    cast = "sext" if kind == "s" else "zext"
    return [f"%r = {cast} i{bits} %v to {call.result}", f"ret {call.result} %r"]


def _narrowed(call: _Call, place: int, bits: int, name: str) -> str:
    """Return the line that takes the low ``bits`` of an operand's register."""
    given = call.operands[place]
    if given in _KINDS:
        return f"{name} = bitcast {given} %a{place} to i{bits}"
    if _n_bits(given) == bits:
        return f"{name} = add i{bits} %a{place}, 0"
    return f"{name} = trunc {given} %a{place} to i{bits}"


def _refuse_order(call: _Call, order: str) -> None:
    if order != "monotonic":
        raise NotImplementedError(
            f"an ordered vector has no CPU model: {call.found[0]!r}"
        )


def _load(call: _Call) -> list[str]:
    n, bits = int(call.found["n"] or 1), int(call.found["bits"])
    names = [f"${i}" for i in range(n)]
    wanted = names[0] if n == 1 else "{" + ",".join(names) + "}"
    if call.found["to"] != wanted or int(call.found["at"]) != n:
        raise NotImplementedError(f"operands have no CPU model: {call.found[0]!r}")
    order = call.order("acquire")
    if n > 1:
        lines = _load_vector(call, n, bits)
        # Loads of this machine are acquire; the fence keeps LLVM from moving others up.
        return [*lines[:2], *["fence acquire"] * (order == "acquire"), *lines[2:]]
    access = f"load atomic volatile i{bits}, i{bits}* %p {order}, align {bits // 8}"
    lines = [_pointer(call, 0, f"i{bits}"), f"%v = {access}"]
    return lines + _widened(call, bits, call.found["kind"])


def _load_vector(call: _Call, n: int, bits: int) -> list[str]:
    vector = f"<{n} x i{bits}>"
    access = f"load volatile {vector}, {vector}* %p, align {n * bits // 8}"
    lines = [_pointer(call, 0, vector), f"%v = {access}"]
    parts = re.findall(r"\w+", call.result)
    before = "undef"
    for i in range(n):
        lines.append(f"%e{i} = extractelement {vector} %v, i32 {i}")
        value = f"i{bits} %e{i}"
        if parts[i] in _KINDS:
            lines.append(f"%f{i} = bitcast {value} to {parts[i]}")
            value = f"{parts[i]} %f{i}"
        lines.append(f"%s{i} = insertvalue {call.result} {before}, {value}, {i}")
        before = f"%s{i}"
    return [*lines, f"ret {call.result} {before}"]


def _store(call: _Call) -> list[str]:
    n, bits = int(call.found["n"] or 1), int(call.found["bits"])
    names = [f"${i + 1}" for i in range(n)]
    wanted = names[0] if n == 1 else "{" + ",".join(names) + "}"
    if call.found["of"].replace(" ", "") != wanted:
        raise NotImplementedError(f"operands have no CPU model: {call.found[0]!r}")
    order = call.order("release")
    if n == 1:
        place = f"i{bits}* %p {order}, align {bits // 8}"
        return [
            _pointer(call, 0, f"i{bits}"),
            _narrowed(call, 1, bits, "%v"),
            f"store atomic volatile i{bits} %v, {place}",
            "ret void",
        ]
    _refuse_order(call, order)
    vector, before = f"<{n} x i{bits}>", "undef"
    lines = [_pointer(call, 0, vector)]
    for i in range(n):
        lines.append(_narrowed(call, i + 1, bits, f"%e{i}"))
        value = f"{vector} {before}, i{bits} %e{i}, i32 {i}"
        lines.append(f"%s{i} = insertelement {value}")
        before = f"%s{i}"
    access = f"store volatile {vector} {before}, {vector}* %p, align {n * bits // 8}"
    return [*lines, access, "ret void"]


def _atomic(call: _Call) -> list[str]:
    op, kind = call.found["op"], f"i{call.found['bits']}"
    word = {"exch": "xchg"}.get(op, op)
    if op in ("max", "min") and call.found["kind"] != "s":
        word = "u" + op
    order = _ORDERS[call.found["how"]]
    access = f"atomicrmw volatile {word} {kind}* %p, {kind} %a1 {order}"
    return [_pointer(call, 0, kind), f"%v = {access}", f"ret {kind} %v"]


def _swap(call: _Call) -> list[str]:
    kind, order = f"i{call.found['bits']}", _ORDERS[call.found["how"]]
    failed = "acquire" if order in ("acquire", "acq_rel") else "monotonic"
    words = f"{kind} %a1, {kind} %a2 {order} {failed}"
    return [
        _pointer(call, 0, kind),
        f"%c = cmpxchg volatile {kind}* %p, {words}",
        f"%v = extractvalue {{{kind}, i1}} %c, 0",
        f"ret {kind} %v",
    ]


def _shuffle(call: _Call) -> list[str]:
    mask, mode = int(call.found["mask"], 0), _SHUFFLES[call.found["how"]]
    given = f"i32 {mask & 0xFFFFFFFF}, i32 {mode}, i32 %a0, i32 %a1"
    return [
        f"%both = call i64 @nv_shuffle({given}, i32 {call.found['clamp']})",
        "%r = trunc i64 %both to i32",
        "ret i32 %r",
    ]


def _fence(call: _Call) -> list[str]:
    order = "seq_cst" if call.found["how"] == "sc" else "acq_rel"
    return [f"fence {order}", "call void @nv_preempt()", "ret void"]


def _register(call: _Call) -> list[str]:
    below = call.found["name"] == "lanemask_lt"
    which = LANES_BELOW if below else DYNAMIC_SHARED_BYTES
    return [f"%r = call i32 @nv_register(i32 {which})", "ret i32 %r"]


def _just(*lines: str) -> Callable[[_Call], list[str]]:
    return lambda call: list(lines)


def _reciprocal(call: _Call) -> list[str]:
    # An instruction that may be wrong in its last bit is wrong in its last bit here.
    return [
        "%q = fdiv float 1.0, %a0",
        "%b = bitcast float %q to i32",
        "%m = and i32 %b, -2",
        "%r = bitcast i32 %m to float",
        "ret float %r",
    ]


_MODELS: dict[re.Pattern[str], Callable[[_Call], list[str]]] = {
    _LOAD: _load,
    _STORE: _store,
    _ATOMIC: _atomic,
    _SWAP: _swap,
    _SHUFFLE: _shuffle,
    _FENCE: _fence,
    _RECIPROCAL: _reciprocal,
    _REGISTER: _register,
    re.compile(r"nanosleep\.u32 (?:\$0|\d+);"): _just(
        "call void @nv_yield()", "ret void"
    ),
    re.compile(r"mov\.b32 \$0, \$1;"): _just("ret i32 %a0"),
    re.compile(r"activemask\.b32 \$0;"): _just(
        "%r = call i32 @nv_active_mask()", "ret i32 %r"
    ),
}
