"""One run of everything: checks, benchmarks, the sanitizer, and then goals."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from bench.gpu import checks, hosts, parts, sanitizer, served
from bench.gpu.baselines import Libraries
from bench.gpu.compiling import load_compilers
from bench.gpu.device import Device
from bench.gpu.plan import (
    CHECKS_S,
    FULL,
    FULL_PLAN,
    HOST_PLAN,
    SMOKE,
    SMOKE_PLAN,
    Run,
)
from bench.gpu.records import Line, Sink, left_out
from bench.gpu.text import describe, summary
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.launch import DeviceUnavailableError

Part = Callable[[Run], Iterator[Line]]

# What each is expected to take on an H200, in seconds.
PARTS: dict[str, tuple[Part, float]] = {
    "compilation": (hosts.compilation, 40),
    "launches": (checks.launches, 2),
    "random operations": (checks.random_operations, 30),
    "races": (checks.races, 30),
    "large tables": (checks.large_tables, 80),
    "interop": (checks.interop, 20),
    "memory": (parts.memory, 5),
    "small calls": (hosts.small_calls, 10),
    "centre": (parts.centre, 50),
    "shapes": (parts.shapes, 60),
    "loads": (parts.loads, 20),
    "many tables": (hosts.many_tables, 10),
    "served": (served.small_calls, 30),
    # Takes what time is left, and so comes after what needs it.
    "sanitizer": (sanitizer.memcheck, 40),
}
PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings")


def run_all(
    *,
    out: Path,
    smoke: bool,
    only: str,
    seconds: float,
    ordinal: int,
    alone: bool = False,
) -> int:
    """Run the parts whose names have ``only`` in them; return 1 if one failed."""
    start = time.monotonic()
    try:
        device = Device(Gpu(ordinal))
    except DeviceUnavailableError as exc:
        print(f"nothing was run: {exc}")
        return 1
    load_compilers()
    libraries = Libraries(device, alone=alone)
    run = _new_run(libraries, out, smoke=smoke, start=start, seconds=seconds)
    chosen = {name: part for name, part in PARTS.items() if only in name}
    _print_plan(run, chosen)
    failed = [name for name in chosen if not _run_part(run, name, *chosen[name])]
    left_over = {**run.libraries.absent, **run.not_run}
    if left_over:
        run.write(left_out("run", left_over))
    print(summary(run.sink.lines, left_over))
    print(f"{len(run.sink.lines)} results in {out}, {time.monotonic() - start:.0f} s")
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def _new_run(
    libraries: Libraries, out: Path, *, smoke: bool, start: float, seconds: float
) -> Run:
    device = libraries.device
    versions = {"driver": device.driver_version, **libraries.versions()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    profile = "smoke" if smoke else "full"
    return Run(
        device,
        libraries,
        (SMOKE if smoke else FULL).within(device.gpu.free_bytes),
        SMOKE_PLAN if smoke else FULL_PLAN,
        SMOKE_PLAN if smoke else HOST_PLAN,
        Sink(out, profile, gpu=device.name, versions=versions),
        smoke,
        lambda: start + seconds - time.monotonic(),
        lambda: start + min(seconds, CHECKS_S) - time.monotonic(),
    )


def _print_plan(run: Run, chosen: dict[str, tuple[Part, float]]) -> None:
    device = run.device
    free = device.gpu.free_bytes / 2**30
    cache = device.l2_bytes / 2**20
    print(f"{device.name}, driver for CUDA {device.driver_version}")
    print(f"{free:.0f} GiB of memory free, {cache:.0f} MiB of L2")
    planned = sum(seconds for _, seconds in chosen.values())
    for name, (_, seconds) in chosen.items():
        print(f"  {name:<16} {seconds:>4.0f} s")
    print(f"  {'planned':<16} {planned:>4.0f} s of {run.seconds_left():.0f} s")


def _run_part(run: Run, name: str, part: Part, planned_s: float) -> bool:
    """Run one part and print its results; return whether it passed."""
    if run.seconds_left() <= 0:
        run.not_run[name] = "no time left"
        return True
    start = time.monotonic()
    try:
        for line in part(run):
            run.write(line)
            print(describe(line), flush=True)
    # One part that fails is no reason to lose the others.
    except Exception as exc:
        traceback.print_exc(file=sys.stdout)
        run.not_run[name] = f"failed: {type(exc).__name__}: {exc}"
        # Once more at the end; this one is there even if there is no end.
        run.write(left_out("run", {name: run.not_run[name]}))
        return False
    took = time.monotonic() - start
    print(f"-- {name}: {took:.1f} s, {planned_s:.0f} s planned", flush=True)
    return True
