"""Puts a call to the runtime before each access to memory and each division.

The text is what LLVM prints after optimising. An instruction that touches memory in a
form unknown here is refused rather than left unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ENTRY = "cpuexec_entry"
STACK_PROBE = "nv_probe_stack"

_LOAD, _STORE, _ATOMIC = range(3)
_ACCESSES = {"load": _LOAD, "store": _STORE, "atomicrmw": _ATOMIC, "cmpxchg": _ATOMIC}
_BYTES = {"half": 2, "float": 4, "double": 8, "ptr": 8}
DEFINE = re.compile(r'^define .*?@"?([^"(]+)"?\(')
MEMORY = re.compile(
    r"^\s+(?:%\S+ = )?(?:tail |musttail |notail )?"
    r"(load|store|atomicrmw|cmpxchg)\b(.*)$"
)
_BULK = re.compile(r"call void @llvm\.(memcpy|memmove|memset)\.[\w.]*\((.*)\)")
_DIVISION = re.compile(
    r"^\s+%\S+ = ([us])(?:div|rem) (?:exact )?i(\d+) ([^,]+), ([^,\s]+)"
)
_ALIGN = re.compile(r", align (\d+)")


def insert(text: str) -> str:
    """Return a module whose accesses are checked, divisions too, and stacks probed.

    Raises
    ------
    NotImplementedError
        If an access has a form that is unknown here.
    """
    lines: list[str] = []
    function = ""
    for number, line in enumerate(text.splitlines()):
        if found := DEFINE.match(line):
            function = found[1]
            line = _with_probe(line)
        elif line.startswith("@") and re.search(r"\b(?:global|constant) ", line):
            line = _global(line)
        elif function != ENTRY and line.startswith(" "):
            lines += _calls_before(line, number)
        lines.append(line)
    declared = [
        "declare void @nv_access(i64, i32)",
        "declare void @nv_access_many(i64, i64, i32)",
        "declare void @nv_divide(i64, i64, i32)",
    ]
    wanted = [one for one in declared if one[:22] not in text]
    return "\n".join(lines + wanted) + "\n"


def _with_probe(line: str) -> str:
    head, brace, tail = line.rpartition("{")
    assert brace, line
    probe = f'"probe-stack"="{STACK_PROBE}" "stack-probe-size"="1" '
    return head + probe + brace + tail


def _global(line: str) -> str:
    """Refuse arrays of a module: their addresses are in no device memory."""
    if "NumbaEnv" in line:
        return line
    raise NotImplementedError(f"arrays of a module have no CPU model: {line}")


def _calls_before(line: str, number: int) -> Iterator[str]:
    if found := MEMORY.match(line):
        yield from _access(found[1], found[2].strip(), number)
    elif found := _BULK.search(line):
        yield from _bulk(found[1], found[2], number)
    elif found := _DIVISION.match(line):
        yield from _division(found, number)


def _access(what: str, rest: str, number: int) -> Iterator[str]:
    aligned = _ALIGN.search(rest)
    if aligned is None:
        raise NotImplementedError(f"an access without alignment: {what} {rest}")
    kind, address = place_of(what, rest)
    alignment = min(int(aligned[1]), 128)
    code = size_of(kind) | alignment << 8 | _ACCESSES[what] << 16
    yield f"  %nv.a{number} = ptrtoint ptr {address} to i64"
    yield f"  call void @nv_access(i64 %nv.a{number}, i32 {code})"


def place_of(what: str, operands: str) -> tuple[str, str]:
    """Return the type that an instruction accesses, and the address."""
    operands = re.sub(r"^(?:(?:atomic|weak|volatile) )*", "", operands)
    if what in ("load", "store"):
        kind, after = _take(operands)
        if what == "store":
            after = _take(after.strip())[1]
        return kind, _take(after.removeprefix(", ptr "))[0]
    # atomicrmw names its operation first, cmpxchg nothing.
    operands = re.sub(r"^\w+ (?=ptr )", "", operands).removeprefix("ptr ")
    address, after = _take(operands)
    return _take(after.removeprefix(", "))[0], address


def _bulk(what: str, operands: str, number: int) -> Iterator[str]:
    given = [_last_word(one) for one in _split(operands)]
    places = [(given[0], _STORE)]
    if what != "memset":
        places.append((given[1], _LOAD))
    for i, (address, kind) in enumerate(places):
        name = f"%nv.b{number}.{i}"
        yield f"  {name} = ptrtoint ptr {address} to i64"
        yield f"  call void @nv_access_many(i64 {name}, i64 {given[2]}, i32 {kind})"


def _division(found: re.Match[str], number: int) -> Iterator[str]:
    sign, bits, dividend, divisor = found.groups()
    if int(bits) > 64:
        raise NotImplementedError(f"division of {bits} bits has no CPU model")
    if re.fullmatch(r"-?\d+", divisor) and divisor not in ("0", "-1"):
        return
    names = []
    for i, value in enumerate((dividend, divisor)):
        names.append(f"%nv.d{number}.{i}")
        cast = "sext" if sign == "s" else "zext"
        if bits == "64":
            yield f"  {names[-1]} = add i64 {value}, 0"
        else:
            yield f"  {names[-1]} = {cast} i{bits} {value} to i64"
    signed_bits = int(bits) if sign == "s" else 0
    given = f"i64 {names[0]}, i64 {names[1]}, i32 {signed_bits}"
    yield f"  call void @nv_divide({given})"


def size_of(kind: str) -> int:
    """Return the bytes of a first-class type."""
    if kind in _BYTES:
        return _BYTES[kind]
    if found := re.fullmatch(r"i(\d+)", kind):
        return (int(found[1]) + 7) // 8
    if found := re.fullmatch(r"[<\[](\d+) x (.+)[>\]]", kind):
        return int(found[1]) * size_of(found[2])
    raise NotImplementedError(f"an access of type {kind} has no CPU model")


def _take(text: str) -> tuple[str, str]:
    """Split off the first type or value, which may hold brackets or a quoted name."""
    if text.startswith(('%"', '@"')):
        end = text.index('"', 2) + 1
        return text[:end], text[end:]
    depth = 0
    bracketed = re.match(
        r"(?:getelementptr|inttoptr|bitcast|ptrtoint|splat)\b[\w ]*(?=\()", text
    )
    for i in range(bracketed.end() if bracketed else 0, len(text)):
        if text[i] in "([{<":
            depth += 1
        elif text[i] in ")]}>":
            depth -= 1
        elif depth == 0 and text[i] in " ,":
            return text[:i], text[i:]
    return text, ""


def _split(operands: str) -> list[str]:
    parts, depth = [""], 0
    for letter in operands:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [one.strip() for one in parts]


def _last_word(operand: str) -> str:
    """Return the value of a call's operand, without its type and attributes."""
    if found := re.search(r'([%@]"[^"]*")$', operand):
        return found[1]
    if found := re.search(r"((?:getelementptr|inttoptr)\b.*\))$", operand):
        return found[1]
    return operand.rsplit(" ", 1)[-1]
