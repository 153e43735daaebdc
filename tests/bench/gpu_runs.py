"""Tiny runs of the GPU benchmarks."""

from __future__ import annotations

from pathlib import Path

from bench.gpu.baselines import Libraries
from bench.gpu.device import Device
from bench.gpu.plan import SMOKE, SMOKE_PLAN, Run
from bench.gpu.records import Sink


def run_of(
    device: Device,
    folder: Path,
    *,
    seconds: float = 60.0,
    check_seconds: float | None = None,
) -> Run:
    for_checks = seconds if check_seconds is None else check_seconds
    return Run(
        device,
        Libraries(device),
        SMOKE,
        SMOKE_PLAN,
        SMOKE_PLAN,
        Sink(folder, "smoke", gpu=device.name, versions={}),
        True,
        lambda: seconds,
        lambda: for_checks,
    )
