"""This machine, as LLVM sees it."""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm


def target_machine(*, jit: bool = False) -> Any:
    """Return a target machine for this CPU's family, without its newer instructions."""
    _initialise()
    return llvm.Target.from_default_triple().create_target_machine(opt=2, jit=jit)


@cache
def target_lines() -> str:
    """Return the lines that name this machine in a module."""
    layout = target_machine().target_data
    return (
        f'target triple = "{llvm.get_default_triple()}"\n'
        f'target datalayout = "{layout!s}"\n'
    )


@cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
