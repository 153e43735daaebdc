"""One run of everything: checks first, then benchmarks, then goals."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.gpu import hosts, parts
from bench.gpu.baselines import Libraries
from bench.gpu.device import Device
from bench.gpu.plan import (
    FULL,
    FULL_PLAN,
    HOST_PLAN,
    SMOKE,
    SMOKE_PLAN,
    Run,
)
from bench.gpu.records import Line, Sink, left_out
from bench.gpu.text import describe, goals_table
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.launch import DeviceUnavailableError

Part = Callable[[Run], Iterator[Line]]

# What each is expected to take on an H200, in seconds, compilation apart.
PARTS: dict[str, tuple[Part, float]] = {
    "memory": (parts.memory, 5),
    "small calls": (hosts.small_calls, 15),
    "centre": (parts.centre, 60),
    "shapes": (parts.shapes, 60),
    "loads": (parts.loads, 20),
    "many tables": (hosts.many_tables, 10),
}


def run_all(*, out: Path, smoke: bool, only: str, seconds: float, ordinal: int) -> int:
    """Run the parts whose names have ``only`` in them; return 1 if one failed."""
    start = time.monotonic()
    try:
        device = Device(Gpu(ordinal))
    except DeviceUnavailableError as exc:
        print(f"nothing was run: {exc}")
        return 1
    libraries = Libraries(device)
    sink = Sink(
        out,
        "smoke" if smoke else "full",
        gpu=device.name,
        versions={"driver": device.driver_version, **libraries.versions()},
    )
    run = Run(
        device,
        libraries,
        SMOKE if smoke else FULL,
        SMOKE_PLAN if smoke else FULL_PLAN,
        SMOKE_PLAN if smoke else HOST_PLAN,
        sink,
        lambda: start + seconds - time.monotonic(),
    )
    chosen = {name: part for name, part in PARTS.items() if only in name}
    _print_plan(run, chosen)
    failed = [name for name in chosen if not _run_part(run, name, *chosen[name])]
    for reasons in (libraries.absent, run.not_run):
        for name, why in reasons.items():
            print(f"left out: {name}: {why}")
    if libraries.absent or run.not_run:
        run.write(left_out("run", {**libraries.absent, **run.not_run}))
    print(goals_table(sink.lines))
    took = time.monotonic() - start
    print(
        f"{len(sink.lines)} results in {out}, {took:.0f} s; failed: {failed or 'none'}"
    )
    return int(bool(failed))


def _print_plan(run: Run, chosen: dict[str, tuple[Part, float]]) -> None:
    device = run.device
    free = device.gpu.free_bytes / 2**30
    print(
        f"{device.name}, driver for CUDA {device.driver_version}, {free:.0f} GiB free"
    )
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
        run.write(left_out("run", {name: f"failed: {type(exc).__name__}: {exc}"}))
        return False
    took = time.monotonic() - start
    print(f"-- {name}: {took:.1f} s, {planned_s:.0f} s planned", flush=True)
    return True
