"""From a kernel's Python function to code for this CPU.

All that leans on numba-cuda's private parts is in this file.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numba.core.errors import NumbaWarning
from numba.cuda import types
from numba.cuda.compiler import _compile_pyfunc_with_fixup

from hps_numba.kernels.cuda.compiling import target_device
from tests.support.cpuexec import translate
from tests.support.cpuexec.jit import HostCode, compile_modules, compile_weak
from tests.support.cpuexec.memory import DeviceMemory

NUMBA_CUDA_VERSION = "0.30.4"  # the one whose private parts are known to fit
_COMPUTE_CAPABILITY = (9, 0)

_lock = threading.RLock()  # guards _kernels and LLVM's global context
_kernels: dict[Any, Kernel] = {}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that runs on this CPU.

    Parameters
    ----------
    name
        The function's name.
    argtypes
        Numba types of its parameters.
    code
        What this CPU runs; its entry takes the address of the argument words.
    function
        What it was compiled from.
    """

    name: str
    argtypes: tuple[Any, ...]
    code: HostCode
    function: FunctionType

    @cached_property
    def weak_code(self) -> HostCode:
        """The same for a run with weak memory."""
        with _lock:
            return compile_weak(self.code)

    @staticmethod
    def words(argtype: Any, arg: Any, memory: DeviceMemory) -> list[int]:
        """Return an argument as the 64-bit words that the entry reads."""
        if isinstance(argtype, types.Array):
            # As numba-cuda flattens arrays: two unused pointers come first.
            head = [0, 0, arg.size, arg.itemsize, memory.address(arg)]
            return head + list(arg.shape) + [n % 2**64 for n in arg.strides]
        if isinstance(argtype, types.Float):
            bits = argtype.bitwidth
            value = np.array([arg], f"f{bits // 8}")
            return [int(value.view(f"u{bits // 8}")[0])]
        return [int(arg) % 2**64]


def without_driver() -> AbstractContextManager[None]:
    """Let this thread compile kernels that call device functions, without a driver."""
    return target_device(_COMPUTE_CAPABILITY)


def compile_kernel(function: Any, argtypes: tuple[Any, ...]) -> Kernel:
    """Compile a kernel for this CPU, once per function, closure and types.

    Parameters
    ----------
    function
        A plain Python function, or what ``cuda.jit`` makes of one.
    argtypes
        Numba types of its parameters.

    Raises
    ------
    NotImplementedError
        If it uses an instruction or function that has no model here.
    numba.core.errors.NumbaError
        If Numba refuses it.
    """
    plain = getattr(function, "py_func", function)
    key = (_identity(plain), tuple(argtypes))
    with _lock:
        if key not in _kernels:
            _kernels[key] = _compile(plain, tuple(argtypes))
        return _kernels[key]


def _compile(function: FunctionType, argtypes: tuple[Any, ...]) -> Kernel:
    texts, entry_name = llvm_texts(function, argtypes)
    code = compile_modules(translate.retarget(texts), entry_name)
    # The function stays alive, so that no other can have the identity of its parts.
    return Kernel(function.__name__, argtypes, code, function)


def llvm_texts(function: Any, argtypes: tuple[Any, ...]) -> tuple[list[str], str]:
    """Return the LLVM modules numba-cuda makes of a kernel, and its entry's name."""
    with without_driver(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        library, _ = _compile_pyfunc_with_fixup(
            function,
            types.void(*argtypes),
            device=False,
            abi="numba",
            cc=_COMPUTE_CAPABILITY,
        )
    return list(library.llvm_strs), library._entry_name


def _identity(function: FunctionType) -> tuple[Any, ...]:
    """Return what decides a function's meaning: code, closure, and globals it names."""
    cells = function.__closure__ or ()
    closure = tuple(_meaning(cell.cell_contents) for cell in cells)
    names = sorted(_global_names(function.__code__))
    space = function.__globals__
    named = tuple((name, _meaning(space[name])) for name in names if name in space)
    return (function.__code__, closure, named)


def _meaning(value: Any) -> Any:
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, (bool, int, float, str, np.generic)):
        return (type(value), value)
    return id(value)


def _global_names(code: CodeType) -> set[str]:
    nested = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_global_names, nested))
