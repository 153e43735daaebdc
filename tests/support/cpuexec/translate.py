"""Retargets LLVM text of the NVPTX dialect to this machine.

What the machine has no notion of becomes a call: shared arrays, intrinsics of NVVM,
functions of libdevice, inline PTX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.support.cpuexec import intrinsics, ptx
from tests.support.cpuexec.machine import target_lines

_SHARED = re.compile(
    r'^@("?[\w$.]+"?) = .*?addrspace\(3\) (?:externally_initialized )?global '
    r"\[(\d+) x (\w+)\].*$",
    re.MULTILINE,
)
_SHARED_USE = re.compile(
    r'(%\S+) = addrspacecast \[[^\]]*\] addrspace\(3\)\* @("?[\w$.]+"?) to i8\*'
)
_INLINE = re.compile(
    r'call ([^@\n]*?) asm +(?:sideeffect +)?(?:alignstack +)?"([^"]*)", "([^"]*)"\s*'
    r"\(([^\n]*)\)"
)
# Numba clears local arrays with one store, of which LLVM makes one for each element.
_CLEAR = re.compile(
    r"store \[(\d+) x (\w+)\] zeroinitializer, \[\1 x \2\]\* (%\S+)$", re.MULTILINE
)
_DEFINE = re.compile(r"^(define [^{\n]*?) ?(\{?)$", re.MULTILINE)
_OPERAND_TYPE = re.compile(r"\s*(\{.*?\}|<.*?>|[\w*]+)\s")
_ELEMENT_BYTES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4}
_ELEMENT_BYTES |= {"i64": 8, "double": 8}


@dataclass
class _Models:
    """What the modules of one kernel call, and the shared arrays they name."""

    inline: dict[tuple[str, str, tuple[str, ...]], str] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def retarget(texts: list[str]) -> list[str]:
    """Return modules for this machine, each with the definitions it calls.

    Raises
    ------
    NotImplementedError
        If something has no model here; the message names it.
    """
    models = _Models()
    bodies = [_body(text, models) for text in texts]
    definitions = [
        intrinsics.DECLARATIONS,
        *(intrinsics.define(name) for name in sorted(models.used)),
        *(
            ptx.model(name, result, operands, text)
            for (result, text, operands), name in models.inline.items()
        ),
    ]
    return [body + "\n" + "\n".join(definitions) for body in bodies]


def _body(text: str, models: _Models) -> str:
    text = re.sub(r'^target (?:triple|datalayout) = ".*"\n', "", text, flags=re.M)
    text = re.sub(r'^@"?llvm\.used"?.*$|^!nvvm.*$', "", text, flags=re.M)
    text = _shared_arrays(text, models)
    text = re.sub(r" addrspace\(\d+\)", "", text).replace("addrspacecast", "bitcast")
    text = _CLEAR.sub(_clear, text)
    text = _INLINE.sub(lambda found: _inline_call(found, models), text)
    if left := re.search(r"^.* asm .*$", text, re.M):
        raise NotImplementedError(f"inline PTX in a new form: {left[0].strip()}")
    # A table of constants in place of a switch would be read outside device memory.
    text = _DEFINE.sub(r'\1 "no-jump-tables"="true" \2', text)
    text = _modelled_calls(text, models)
    return target_lines() + intrinsics.convert_halves(text)


def _shared_arrays(text: str, models: _Models) -> str:
    for name, count, element in _SHARED.findall(text):
        if element not in _ELEMENT_BYTES:
            raise NotImplementedError(f"shared array of {element} has no CPU model")
        n_bytes = int(count) * _ELEMENT_BYTES[element]
        models.shared[name] = (len(models.shared), n_bytes)

    def use(found: re.Match[str]) -> str:
        number, n_bytes = models.shared[found[2]]
        return f"{found[1]} = call i8* @nv_shared(i32 {number}, i64 {n_bytes})"

    text = _SHARED_USE.sub(use, text)
    text = re.sub(r"^@.*addrspace\(3\).*$", "", text, flags=re.M)
    if left := re.search(r"^.*addrspace\(3\).*$", text, re.M):
        raise NotImplementedError(f"shared memory used in a new way: {left[0].strip()}")
    return text


def _clear(found: re.Match[str]) -> str:
    n_bytes = int(found[1]) * _ELEMENT_BYTES[found[2]]
    given = f"ptr {found[3]}, i8 0, i64 {n_bytes}, i1 false"
    return f"call void @llvm.memset.p0.i64({given})"


def _inline_call(found: re.Match[str], models: _Models) -> str:
    result, text = found[1].strip(), _unescape(found[2]).strip()
    given = [one for one in found[4].split(",") if one.strip()]
    operands = []
    for one in given:
        kind = _OPERAND_TYPE.match(one + " ")
        assert kind is not None, one
        operands.append(kind[1])
    key = (result, text, tuple(operands))
    name = models.inline.setdefault(key, f"nv_inline_{len(models.inline)}")
    return f"call {result} @{name}({found[4]})"


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)


def _modelled_calls(text: str, models: _Models) -> str:
    """Give intrinsics of NVVM and functions of libdevice the names of their models."""

    def rename(found: re.Match[str]) -> str:
        models.used.add(found[1])
        return f'@"{intrinsics.model_name(found[1])}"'

    names = r'@"?((?:llvm\.nvvm\.|__nv_)[\w.]+)"?'
    text = re.sub(rf"^declare .*{names}.*$", "", text, flags=re.M)
    return re.sub(names, rename, text)
