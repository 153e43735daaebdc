"""Sends accesses to memory through the runtime's model of weak memory.

A load gets its value from where the runtime says. Around a store, and around an atomic
operation, stand calls that take down what it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.support.cpuexec.checks import DEFINE, ENTRY, MEMORY, place_of, size_of
from tests.support.cpuexec.intrinsics import RUNTIME

_ACQUIRE, _RELEASE, _COMPARES = 1, 2, 4
_ORDERS = {
    "monotonic": 0,
    "acquire": _ACQUIRE,
    "release": _RELEASE,
    "acq_rel": _ACQUIRE | _RELEASE,
    "seq_cst": _ACQUIRE | _RELEASE,
}
_ORDER = re.compile(rf" ({'|'.join(_ORDERS)})\b")
_FENCE = re.compile(r"^\s+fence (acquire|acq_rel|seq_cst)$")
_LOAD_CALL = re.compile(r"(call ptr @nv_weak_load\(i64 %\S+, i32 )(\d+)\)$")


def insert(text: str) -> str:
    """Return a module, checked already, whose memory is weak.

    Raises
    ------
    NotImplementedError
        If an access or a fence has no model here.
    """
    lines: list[str] = []
    function = ""
    for number, line in enumerate(text.splitlines()):
        if found := DEFINE.match(line):
            function = found[1]
        if function == ENTRY or not line.startswith(" "):
            lines.append(line)
        elif found := MEMORY.match(line):
            lines += _access(line, found, number)
        elif found := _FENCE.match(line):
            lines += _fence(found[1], lines)
            lines.append(line)
        else:
            lines.append(line)
    for name, signature in RUNTIME.items():
        if name.startswith("nv_weak_") and f"@{name}(" not in text:
            lines.append("declare " + signature.replace(" (", f" @{name}(", 1))
    return "\n".join(lines) + "\n"


def _access(line: str, found: re.Match[str], number: int) -> Iterator[str]:
    what, rest = found[1], found[2].strip()
    kind, address = place_of(what, rest)
    size, order = size_of(kind), _order_of(what, rest)
    name = f"%nv.w{number}"
    yield f"  {name} = ptrtoint ptr {address} to i64"
    if what == "load":
        element = re.fullmatch(r"<\d+ x (.+)>", kind)
        whole = size_of(element[1]) if element else size
        code = size | whole << 8 | order << 16
        yield f"  {name}.at = call ptr @nv_weak_load(i64 {name}, i32 {code})"
        yield line.replace(f"ptr {address}", f"ptr {name}.at", 1)
        return
    after = "nv_weak_store" if what == "store" else "nv_weak_swap"
    given = f"(i64 {name}, i32 {size | size << 8 | order << 16})"
    yield f"  call void @nv_weak_begin{given}"
    yield line
    yield f"  call void @{after}{given}"


def _order_of(what: str, rest: str) -> int:
    # A comparison names the order of a failure second.
    found = _ORDER.search(rest)
    order = _ORDERS[found[1]] if found else 0
    return order | _COMPARES if what == "cmpxchg" else order


def _fence(order: str, lines: list[str]) -> Iterator[str]:
    if order != "acquire":
        yield f"  call void @nv_weak_fence(i32 {int(order == 'seq_cst')})"
        return
    # It stands behind a load of a vector, and makes that an acquire.
    place = len(lines) - 1
    while lines[place].startswith(" ") and not _LOAD_CALL.search(lines[place]):
        place -= 1
    found = _LOAD_CALL.search(lines[place])
    if found is None or not _is_vector(int(found[2])):
        raise NotImplementedError("an acquire fence stands for itself")
    code = int(found[2]) | _ACQUIRE << 16
    lines[place] = _LOAD_CALL.sub(rf"\g<1>{code})", lines[place])


def _is_vector(code: int) -> bool:
    return code & 0xFF > code >> 8 & 0xFF
