"""Builds and loads the C runtime, once per version of its sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCES = Path(__file__).parent / "runtime"
_FLAGS = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC")


@cache
def runtime() -> ctypes.CDLL:
    """Return the runtime's library; calls into it release the GIL.

    Raises
    ------
    RuntimeError
        If this is no x86-64 Linux, there is no C compiler, or it refuses the sources.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise RuntimeError(
            "cpuexec switches fibers in x86-64 assembly for Linux; this is "
            f"{platform.system()} on {platform.machine()}"
        )
    sources = sorted(_SOURCES.glob("*.c"))
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in [*sources, *sorted(_SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    library = _cache_folder() / f"runtime-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        _build(sources, library)
    return ctypes.CDLL(str(library))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "hps_numba" / "cpuexec"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(sources: list[Path], library: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("cpuexec needs a C compiler: install gcc (build-essential)")
    # Two processes may build at once: each writes its own file, and the last one stays.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_FLAGS, *map(str, sources), "-o", str(built)]
        command += ["-pthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the runtime of cpuexec does not build:\n{done.stderr}")
        built.replace(library)
