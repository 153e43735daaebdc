"""Cubins on disk, so that a process compiles only what no process compiled before.

One file per kernel and compute capability, named by the digest of everything that the
machine code follows from. Where the compilers are not installed, files that any of
their releases made serve. A file is written beside its place and renamed into it, and
carries a checksum: processes that share the directory never read half a file, and what
is damaged is compiled again. The directory may be deleted at any time; whoever writes a
file deletes those that nobody has used for long, and the longest unused of too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from hps_numba.kernels.cuda.compiling import (
    ComputeCapability,
    Cubin,
    KernelSpec,
    compile_cubin,
)
from hps_numba.kernels.cuda.fingerprint import (
    COMPILER_DIGITS,
    UnknownConstantError,
    fingerprint,
    has_compilers,
)

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "HPS_NUMBA_CACHE_DIR"
MAX_BYTES = 512 << 20  # of all files: some thousands of kernels
DAY_S = 24 * 3600
MAX_AGE_S = 90 * DAY_S  # since the last use
_MAGIC = b"hps_numba cubin 1"
_TEMPORARY = ".new-"
_OURS = re.compile(r".+\.sm_\d+\.[0-9a-f]{32}\.cubin|\.new-.+\.cubin")


class DamagedError(ValueError):
    """A file is no cubin of ours, or not all of one."""


def default_directory() -> Path | None:
    """Return where cubins are kept, or None for a user without a home."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "hps_numba" / "cubins"


class CubinCache:
    """Cubins that are compiled once and kept in a directory.

    Parameters
    ----------
    directory
        Where the files are; made when first needed. Nothing is kept if it is None or
        cannot be written.

    Notes
    -----
    Safe from several threads and several processes. Two that want a kernel at once may
    both compile it; either's file serves.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def get(self, spec: KernelSpec, cc: ComputeCapability) -> Cubin:
        """Return the cubin of a kernel, compiled now or earlier.

        Raises
        ------
        KernelCompileError
            If the kernel does not compile.
        """
        path = self._path(spec, cc)
        cubin = self._read(path, spec, cc) if path else None
        if cubin is None and path and not has_compilers():
            cubin = self._read_of_others(path, spec, cc)
        if cubin is None:
            begin = time.perf_counter()
            cubin = compile_cubin(spec, cc)
            logger.info(
                "kernel=%s cc=%d.%d compiled_ms=%.0f",
                *(spec.name, *cc, 1e3 * (time.perf_counter() - begin)),
            )
            if path:
                self._write(path, cubin)
        return cubin

    def _path(self, spec: KernelSpec, cc: ComputeCapability) -> Path | None:
        if self.directory is None:
            return None
        try:
            digest = fingerprint(spec, cc)
        except UnknownConstantError as exc:
            logger.info("kernel=%s is compiled anew each time: %s", spec.name, exc)
            return None
        return self.directory / f"{spec.name[:80]}.sm_{cc[0]}{cc[1]}.{digest}.cubin"

    def _read(
        self, path: Path, spec: KernelSpec, cc: ComputeCapability
    ) -> Cubin | None:
        try:
            cubin = decode(path.read_bytes())
            if (cubin.name, cubin.cc) != (spec.name, cc):
                raise DamagedError(f"it holds {cubin.name} for {cubin.cc}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, DamagedError) as exc:
            logger.warning("cubin=%s is compiled again: %s", path, exc)
            return None
        _note_use(path)
        return cubin

    def _read_of_others(
        self, path: Path, spec: KernelSpec, cc: ComputeCapability
    ) -> Cubin | None:
        """Read what other releases of the compilers made of the same kernel.

        Any of it serves where nothing can be compiled.
        """
        start = path.stem[:-COMPILER_DIGITS]
        for other in sorted(path.parent.glob(f"{start}*{path.suffix}")):
            cubin = self._read(other, spec, cc)
            if cubin is not None:
                return cubin
        return None

    def _write(self, path: Path, cubin: Cubin) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(".cubin", _TEMPORARY, path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(encode(cubin))
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            trim(path.parent, keep=path.name)
        except OSError as exc:
            logger.info("cubin=%s is not kept: %s", path, exc)


def _note_use(path: Path) -> None:
    """Let a file's time say when it was used, to the day."""
    with contextlib.suppress(OSError):
        if path.stat().st_mtime < time.time() - DAY_S:
            os.utime(path)


def trim(directory: Path, *, keep: str = "") -> None:
    """Delete files that nobody has used for long, and the longest unused of too many.

    Only files named as cubins are, but for the one named ``keep``. A process that reads
    one of them meanwhile has it, or compiles its kernel again.
    """
    used: list[tuple[float, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            # Another process may have deleted it since.
            with contextlib.suppress(FileNotFoundError):
                if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    used.append((found.st_mtime, found.st_size, entry.name))
    now, n_bytes = time.time(), 0
    for used_at, size, name in sorted(used, reverse=True):
        n_bytes += size
        age_limit = DAY_S if name.startswith(_TEMPORARY) else MAX_AGE_S
        if name != keep and (n_bytes > MAX_BYTES or used_at < now - age_limit):
            with contextlib.suppress(OSError):
                os.unlink(directory / name)


def encode(cubin: Cubin) -> bytes:
    """Return a cubin as a file's content: magic, checksum, header, machine code."""
    header = json.dumps({"name": cubin.name, "cc": cubin.cc, "log": cubin.log})
    body = header.encode() + b"\n" + cubin.code
    return b"\n".join((_MAGIC, hashlib.sha256(body).hexdigest().encode(), body))


def decode(content: bytes) -> Cubin:
    """Return the cubin in a file's content.

    Raises
    ------
    DamagedError
        If the content is anything but what :func:`encode` returned.
    """
    magic, _, rest = content.partition(b"\n")
    if magic != _MAGIC:
        raise DamagedError("it does not begin as a cubin file")
    checksum, _, body = rest.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise DamagedError("its checksum is wrong")
    header, _, code = body.partition(b"\n")
    fields = json.loads(header)
    major, minor = fields["cc"]
    return Cubin(fields["name"], code, (major, minor), fields["log"])
