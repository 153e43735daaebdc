"""From a kernel's Python function to a cubin, without a driver and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """A kernel for one shape: what is compiled, and how it is launched.

    Parameters
    ----------
    name
        Unique per specialisation and a valid identifier; the entry's name in the cubin.
    function
        Plain Python function that returns nothing. What it closes over are integers,
        floats, strings and device functions.
    argtypes
        One letter per parameter: ``U`` uint64, ``u`` uint32, ``I`` int64, ``i`` int32,
        ``f`` float32. Addresses are ``U``.
    block
        Threads per block, at launch and as the bound that registers are chosen for.
    max_registers
        Registers a thread may have; the compiler's choice if None.
    """

    name: str
    function: Callable[..., Any]
    argtypes: str
    block: int = 256
    max_registers: int | None = None
