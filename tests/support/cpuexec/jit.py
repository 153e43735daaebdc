"""Compiles LLVM text for this machine, with a check before each access to memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from tests.support.cpuexec import checks, intrinsics, weakening
from tests.support.cpuexec.building import runtime
from tests.support.cpuexec.machine import target_lines, target_machine


@dataclass(frozen=True, eq=False)
class HostCode:
    """Machine code of one kernel; ``engine`` owns it, and ``checked`` is its text."""

    entry: int
    engine: Any
    checked: str


def compile_modules(texts: list[str], kernel: str) -> HostCode:
    """Link, optimise, check and compile the modules of one kernel.

    Raises
    ------
    NotImplementedError
        If a function that is called is neither defined here nor in the runtime.
    """
    _add_symbols()
    module = llvm.parse_assembly(texts[0])
    for text in texts[1:]:
        module.link_in(llvm.parse_assembly(text))
    kinds = [str(one.type) for one in module.get_function(kernel).arguments]
    module.link_in(llvm.parse_assembly(_entry(kernel, kinds)))
    module.get_function(kernel).linkage = "internal"
    _optimise(module)
    return _machine_code(checks.insert(str(module)))


def compile_weak(code: HostCode) -> HostCode:
    """Compile the kernel again, for a run with weak memory.

    Raises
    ------
    NotImplementedError
        If it accesses memory in a way that has no weak model.
    """
    return _machine_code(weakening.insert(code.checked))


def _machine_code(text: str) -> HostCode:
    module = llvm.parse_assembly(text)
    module.verify()
    _refuse_unknown(module)
    engine = llvm.create_mcjit_compiler(module, target_machine(jit=True))
    engine.finalize_object()
    return HostCode(engine.get_function_address(checks.ENTRY), engine, text)


@cache
def _add_symbols() -> None:
    library = runtime()
    names = [name for name in intrinsics.RUNTIME if name.startswith("nv_")]
    names.append(checks.STACK_PROBE)
    names += [intrinsics.model_name(name) for name in intrinsics.LIBDEVICE]
    for name in names:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        llvm.add_symbol(name, address)


def _entry(kernel: str, kinds: list[str]) -> str:
    """Return a function that takes the kernel's arguments from 64-bit words."""
    lines = []
    for i, kind in enumerate(kinds):
        lines.append(f"  %p{i} = getelementptr i64, ptr %words, i64 {i}")
        lines.append(f"  %v{i} = load {kind}, ptr %p{i}")
    given = ", ".join(f"{kind} %v{i}" for i, kind in enumerate(kinds))
    return (
        f'{target_lines()}declare void @"{kernel}"({", ".join(kinds)})\n'
        f"define void @{checks.ENTRY}(ptr %words) {{\n"
        + "\n".join(lines)
        + f'\n  call void @"{kernel}"({given}) noinline\n  ret void\n}}\n'
    )


def _optimise(module: Any) -> None:
    """Optimise as far as leaves the width of accesses alone."""
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(target_machine(), options)
    builder.getModulePassManager().run(module, builder)


def _refuse_unknown(module: Any) -> None:
    known = {*intrinsics.RUNTIME, *map(intrinsics.model_name, intrinsics.LIBDEVICE)}
    unknown = [
        one.name
        for one in module.functions
        if one.is_declaration
        and one.name not in known
        and (not one.name.startswith("llvm.") or one.name.startswith("llvm.masked."))
    ]
    if unknown:
        raise NotImplementedError(f"functions have no CPU model: {unknown}")
