"""The library that passes for the driver, and the table of its functions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SONAME = "libcuda.so.1"
NOT_SUPPORTED = 801
UNKNOWN = 999

_SOURCE = Path(__file__).with_name("shim.c")
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")

# By name and, where a library asks for a newer form of a function, version.
_functions: dict[tuple[str, int | None], tuple[Any, Callable[..., int | None]]] = {}
_resolved: dict[tuple[str, int | None], Any] = {}
calls: Counter[str] = Counter()
_loaded: list[Any] = []


class DriverError(Exception):
    """A call fails with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def loaded() -> bool:
    """Return whether this process has the stand-in."""
    return bool(_loaded)


def real_driver() -> bool:
    """Return whether this machine has a CUDA driver, other than the stand-in."""
    if _loaded:
        return False
    try:
        ctypes.CDLL(SONAME)
    except OSError:
        return False
    return True


def implements(
    name: str, *kinds: Any, version: int | None = None
) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Register a function of the driver, its parameters as ctypes.

    It returns a status, None for success, or raises :class:`DriverError`.
    """

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        _functions[name, version] = (ctypes.CFUNCTYPE(ctypes.c_int, *kinds), function)
        return function

    return register


def load() -> None:
    """Load the library, so that whoever looks for the driver finds it.

    Raises
    ------
    RuntimeError
        If there is a real driver, or a library that has looked for one already.
    """
    if _loaded:
        return
    if real_driver():
        raise RuntimeError("this machine has a CUDA driver: the stand-in stays away")
    if "cuda.bindings.driver" in sys.modules:
        raise RuntimeError("the stand-in comes too late: cuda.bindings is imported")
    library = ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)
    resolver = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)(
        _resolve
    )
    library.fakegpu_set_resolver(resolver)
    _loaded.extend([library, resolver])


def _resolve(name: bytes, version: int) -> int | None:
    key: tuple[str, int | None] = (name.decode(), version)
    if key not in _functions:
        key = (key[0], None)
    if key not in _resolved:
        kind, function = _functions.get(key) or _missing(key[0])
        _resolved[key] = kind(_guarded(key[0], function))
    return ctypes.cast(_resolved[key], ctypes.c_void_p).value


def _missing(name: str) -> tuple[Any, Callable[..., int | None]]:
    def complain() -> int:
        sys.stderr.write(f"fakegpu: {name} is not there\n")
        return NOT_SUPPORTED

    # The callee may take fewer arguments than it is given.
    return ctypes.CFUNCTYPE(ctypes.c_int), complain


def _guarded(name: str, function: Callable[..., int | None]) -> Callable[..., int]:
    """Return a function that C may call: counted, and without exceptions."""

    def call(*args: Any) -> int:
        calls[name] += 1
        try:
            return function(*args) or 0
        except DriverError as exc:
            return exc.status
        except BaseException:
            traceback.print_exc()
            return UNKNOWN

    return call


def _built() -> Path:
    digest = hashlib.sha256(" ".join(_FLAGS).encode() + _SOURCE.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = root / "hps_numba" / "fakegpu" / digest.hexdigest()[:20] / SONAME
    if library.exists():
        return library
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("fakegpu needs a C compiler: install gcc (build-essential)")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may build at once: each writes its own file, and the last one stays.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / SONAME
        command = [compiler, *_FLAGS, f"-Wl,-soname,{SONAME}", str(_SOURCE)]
        subprocess.run([*command, "-o", str(made)], check=True)
        made.replace(library)
    return library
