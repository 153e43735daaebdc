"""What the machine code of a kernel depends on, as one digest.

A kernel is a function over constants and device functions. Its digest covers the code
and the constants of every function that it reaches, the sources of this package, and
the versions of the compilers. What cannot be described makes the kernel uncacheable
rather than wrongly cached.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from cuda import pathfinder
from llvmlite import ir
from numba.core.types import Type as NumbaType
from numba.cuda.types import Type as CudaType

from hps_numba.kernels.cuda.compiling import ComputeCapability, KernelSpec

_SOURCES = Path(__file__).parent
_DISTRIBUTIONS = ("cuda-core", "llvmlite", "numba", "numba-cuda")
# Libraries of the compilers, and the packages that may bring them.
_LIBRARIES = {
    "nvvm": ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
    "nvJitLink": ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
}
_NONE = "none"
DIGITS, COMPILER_DIGITS = 32, 8  # of a fingerprint; 4 bits each


class UnknownConstantError(TypeError):
    """A kernel reaches a value that has no fixed description."""


def fingerprint(spec: KernelSpec, cc: ComputeCapability) -> str:
    """Return a digest of everything that the cubin of a kernel follows from.

    The last ``COMPILER_DIGITS`` are of the compilers' libraries, the others of the
    rest.

    Raises
    ------
    UnknownConstantError
        If the kernel reaches an object that is no number, string, type or function.
    """
    digest = hashlib.sha256()
    shape = (spec.name, spec.argtypes, spec.block, spec.max_registers, cc)
    for part in (repr(shape), _environment(), *_describe(spec.function, set())):
        digest.update(part.encode())
        digest.update(b"\0")
    libraries = hashlib.sha256(_libraries().encode()).hexdigest()
    return digest.hexdigest()[: DIGITS - COMPILER_DIGITS] + libraries[:COMPILER_DIGITS]


def has_compilers() -> bool:
    """Return whether the compilers' libraries are here, as far as is known."""
    return not any(line.endswith(f" {_NONE}") for line in _libraries().split("\n"))


@cache
def _environment() -> str:
    """Return the versions and the sources, which do not change in a process."""
    parts = [f"python {sys.version_info[0]}.{sys.version_info[1]}"]
    parts += [f"{name} {_version(name)}" for name in _DISTRIBUTIONS]
    sources = [*_SOURCES.glob("*.py"), _SOURCES.parent / "host" / "hashing.py"]
    parts += [f"{source.name} {_file_digest(source)}" for source in sorted(sources)]
    return "\n".join(parts)


@cache
def _libraries() -> str:
    """Return which libraries of compilers are here, a line each."""
    return "\n".join(f"{name}: {_library(name)}" for name in _LIBRARIES)


def _library(name: str) -> str:
    """Return the versions of a library's packages, or which file it is."""
    # Not by what is loaded: other packages load theirs, before a kernel or after it.
    versions = {package: _version(package) for package in _LIBRARIES[name]}
    found = [f"{p} {version}" for p, version in versions.items() if version != _NONE]
    if found:
        return ", ".join(found)
    try:
        path = pathfinder.load_nvidia_dynamic_lib(name).abs_path
        # A toolkit that pip did not install has no version to ask for.
        return f"{path} {Path(path).stat().st_size}" if path else _NONE
    # Who compiles says that it is missing.
    except (RuntimeError, OSError):
        return _NONE


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _NONE


@cache
def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _describe(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield what describes a value and, if it is a function, all that it reaches."""
    function = _function_of(value)
    if function is not None:
        if id(function) not in seen:
            seen.add(id(function))
            yield from _describe_function(function, seen)
    elif isinstance(value, (tuple, list)):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _describe(item, seen)
    elif isinstance(value, dict):
        yield f"dict of {len(value)}"
        for key, item in value.items():
            yield from _describe(key, seen)
            yield from _describe(item, seen)
    else:
        yield _describe_plain(value)


def _function_of(value: Any) -> FunctionType | None:
    """Return the Python function of a function, a device function or an intrinsic."""
    for inner in (
        value,
        getattr(value, "py_func", None),
        getattr(value, "_defn", None),
    ):
        if isinstance(inner, FunctionType):
            return inner
    return None


def _describe_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    yield from _describe_code(function.__code__)
    yield repr(function.__defaults__)
    for cell in function.__closure__ or ():
        yield from _describe(cell.cell_contents, seen)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _describe(function.__globals__[name], seen)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _describe_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe_code(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _describe_plain(value: Any) -> str:
    """Describe what is no function; numbers and texts by value, the rest by name."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (NumbaType, CudaType, ir.Type)):
        return f"type {value}"
    if isinstance(value, ModuleType):
        path = getattr(value, "__file__", None)
        content = _file_digest(Path(path)) if path and path.endswith(".py") else ""
        return f"module {value.__name__} {content}"
    if isinstance(value, (type, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    raise UnknownConstantError(
        f"a kernel reaches {value!r} of {type(value)}, which is no constant"
    )
