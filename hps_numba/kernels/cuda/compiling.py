"""From a kernel's Python function to a cubin, without a driver and without a GPU.

Numba-cuda turns the function into PTX, nvJitLink turns the PTX into a cubin. Neither
needs a device, so that kernels are compiled ahead for machines that have one, and are
checked on machines that have none.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cuda import pathfinder
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.core import errors as numba_errors
from numba.cuda import dispatcher, types
from numba.cuda.core import errors as cuda_errors

ComputeCapability = tuple[int, int]

NUMBA_TYPES = {
    "U": types.uint64,
    "u": types.uint32,
    "I": types.int64,
    "i": types.int32,
    "f": types.float32,
}
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(")
# Numba reserves a word a function for its CPU target; no kernel reads it.
_ENVIRONMENT = re.compile(r"^\.common .*NumbaEnv.*\n", re.MULTILINE)
# Numba-cuda has warnings of its own beside Numba's; its errors are Numba's.
_WARNINGS = (numba_errors.NumbaWarning, cuda_errors.NumbaWarning)
_REFUSALS = (
    numba_errors.NumbaError,
    ImportError,  # of NVVM, where it is not installed
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_PINS = (
    "install the extra hps-numba[cuda13] or hps-numba[cuda12], which pins NVVM and "
    "nvJitLink to one CUDA release"
)


# Signs of libraries of two releases, or of the driver's linker in nvJitLink's place.
_MISFITS = ("nsupported .version", "not supported by the driver API")


class KernelCompileError(RuntimeError):
    """A kernel did not compile, or its PTX was refused; the message says which."""


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

    Raises
    ------
    ValueError
        If the name is no identifier, a letter is unknown, there are not as many letters
        as parameters, or the block is no whole number of warps up to 1024 threads.
    """

    name: str
    function: Callable[..., Any]
    argtypes: str
    block: int = 256
    max_registers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the compiler would refuse in other words, or not at all."""
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name, re.ASCII):
            raise ValueError(f"kernel name {self.name!r} is not an identifier")
        if unknown := set(self.argtypes) - set(NUMBA_TYPES):
            raise ValueError(
                f"kernel {self.name}: unknown argument types {sorted(unknown)}; "
                f"known are {', '.join(NUMBA_TYPES)}"
            )
        n_parameters = len(inspect.signature(self.function).parameters)
        if n_parameters != len(self.argtypes):
            raise ValueError(
                f"kernel {self.name}: {len(self.argtypes)} argument types for "
                f"{n_parameters} parameters"
            )
        if self.block % 32 or not 32 <= self.block <= 1024:
            raise ValueError(
                f"kernel {self.name}: block={self.block} is not a multiple of 32 from "
                "32 to 1024"
            )


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: machine code for one compute capability.

    Parameters
    ----------
    name
        Name of the entry.
    code
        The ELF file.
    cc
        Compute capability it is for.
    log
        What the assembler says of registers, stack and spills.
    """

    name: str
    code: bytes
    cc: ComputeCapability
    log: str


# Numba asks for the current device where a device function is compiled, although the
# compute capability is given. The lock guards the function put in its place.
_compile_lock = threading.RLock()


@contextmanager
def target_device(cc: ComputeCapability) -> Iterator[None]:
    """Let this thread compile device functions for ``cc``, whatever device there is.

    Other threads keep seeing the real device.
    """

    class Target:
        compute_capability = cc

    with _compile_lock:
        real, thread = dispatcher.get_current_device, threading.get_ident()

        def get_current_device() -> Any:
            return Target if threading.get_ident() == thread else real()

        dispatcher.get_current_device = get_current_device
        try:
            yield
        finally:
            dispatcher.get_current_device = real


def compile_ptx(spec: KernelSpec, cc: ComputeCapability) -> str:
    """Return the PTX of a kernel, its entry named as the kernel is.

    Parameters
    ----------
    spec
        The kernel.
    cc
        Compute capability as (major, minor).

    Raises
    ------
    KernelCompileError
        If Numba refuses the function.

    Notes
    -----
    Safe from several threads, one of which compiles at a time.
    """
    signature = types.void(*(NUMBA_TYPES[letter] for letter in spec.argtypes))
    with target_device(cc), warnings.catch_warnings():
        for kind in _WARNINGS:
            warnings.simplefilter("ignore", kind)
        try:
            text, _ = cuda.compile(
                spec.function,
                signature,
                device=False,
                abi="numba",
                cc=cc,
                launch_bounds=spec.block,
            )
        except _REFUSALS as exc:
            raise KernelCompileError(f"{_what(spec, cc)}: {_told(exc)}") from exc
    entries = _ENTRY.findall(text)
    if len(entries) != 1:
        raise KernelCompileError(f"{_what(spec, cc)}: entries in its PTX: {entries}")
    text = _ENVIRONMENT.sub("", text.replace(entries[0], spec.name))
    if spec.max_registers is not None:
        # The linker's own limit does not hold for a kernel with a bounded block.
        text = text.replace(".maxntid", f".maxnreg {spec.max_registers}\n.maxntid", 1)
    return text


def compile_cubin(spec: KernelSpec, cc: ComputeCapability) -> Cubin:
    """Compile a kernel to machine code.

    Parameters
    ----------
    spec
        The kernel.
    cc
        Compute capability as (major, minor).

    Raises
    ------
    KernelCompileError
        If Numba refuses the function, or the linker the PTX.
    """
    return link(spec, compile_ptx(spec, cc), cc)


def link(spec: KernelSpec, ptx: str, cc: ComputeCapability) -> Cubin:
    """Assemble the PTX of a kernel; see :func:`compile_cubin`."""
    options = LinkerOptions(
        name=spec.name,
        arch=f"sm_{cc[0]}{cc[1]}",
        ptxas_options=["-v"],
    )
    try:
        linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
        code = linker.link("cubin").code
        log = linker.get_info_log()
    # The linker's library, its absence and the driver's linker raise each their own.
    except Exception as exc:
        raise KernelCompileError(f"{_what(spec, cc)}: {_told(exc)}") from exc
    # How long it took would make two equal cubins differ.
    lines = log.rstrip("\n\0").splitlines()
    kept = [line for line in lines if "Compile time" not in line]
    return Cubin(spec.name, bytes(code), cc, "\n".join(kept))


def _what(spec: KernelSpec, cc: ComputeCapability) -> str:
    return f"kernel {spec.name} for compute capability {cc[0]}.{cc[1]}"


def _told(exc: Exception) -> str:
    """Return the reason of a failure, and what to install if that is it."""
    reason = str(exc).rstrip("\n\0")
    missing = isinstance(exc, (pathfinder.DynamicLibNotFoundError, ImportError))
    if missing or any(sign in reason for sign in _MISFITS):
        return f"{reason}; {_PINS}"
    return reason
