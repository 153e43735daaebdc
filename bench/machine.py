"""What a result was measured on: machine, versions, commit. Needs no package."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

PACKAGES = (
    "hps-numba",
    "numpy",
    "numba",
    "llvmlite",
    "rocksdict",
    "redis",
    "hiredis",
    "pydantic",
)


@dataclass(frozen=True)
class Machine:
    """The computer, as far as it bears on speed."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    cpu: str
    cores: int
    memory_bytes: int
    l3_bytes: int
    kernel: str
    huge_pages: str
    gpu: str = ""


def this_machine() -> Machine:
    """Return this computer; what it does not tell is empty or 0."""
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        l3_bytes=max(_sysconf("SC_LEVEL3_CACHE_SIZE"), 0),
        kernel=platform.release(),
        huge_pages=_selected("/sys/kernel/mm/transparent_hugepage/enabled"),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    installed = {d.name: d.version for d in metadata.distributions()}
    known = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **known}


def commit() -> str:
    """Return the commit of the source tree, ``-dirty`` if code differs from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    head = _run(git, "rev-parse", "--short=12", "HEAD")
    changed = _run(git, "status", "--porcelain", "--", "hps_numba", "bench/*.py")
    return f"{head}-dirty" if changed else head or "unknown"


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _selected(path: str) -> str:
    text = _read(path)
    return text.partition("[")[2].partition("]")[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _sysconf(name: str) -> int:
    try:
        return os.sysconf(name)
    except (OSError, ValueError):
        return 0
