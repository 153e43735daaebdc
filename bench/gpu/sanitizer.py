"""The tool that watches every access of a kernel, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.plan import Run
from bench.gpu.records import Line, counted

TOOL = "compute-sanitizer"
ROOT = Path(__file__).parents[2]
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
TIMEOUT_S = 90
# What it says of a machine where it cannot watch; it may count that as an error.
_CANNOT = "Device not supported"
# How a run ends in which everything passed.
_PASSED = "failed: none"
# It finds unordered accesses to shared memory, which no kernel has.
NO_RACECHECK = "kernels use no shared memory, all that racecheck looks at"


def memcheck(run: Run) -> Iterator[Line]:
    """Run a tiny set of everything under memcheck; there must be no error."""
    run.not_run[f"{TOOL} racecheck"] = NO_RACECHECK
    found = shutil.which(TOOL)
    if found is None:
        run.not_run[f"{TOOL} memcheck"] = f"{TOOL} is not on PATH"
        return
    command = [
        *(found, "--tool", "memcheck", "--error-exitcode", "9"),
        # Looking for what a driver lacks is an error of the API, and none of ours.
        *("--report-api-errors", "no"),
        *(sys.executable, "-m", "bench.gpu", "--smoke", "--only", "centre", "--alone"),
        *("--device", str(run.device.gpu.ordinal)),
    ]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=min(TIMEOUT_S, max(1.0, run.seconds_left())),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        run.not_run[f"{TOOL} memcheck"] = f"{type(exc).__name__}: {exc}"[:300]
        return
    yield from judged(run, done.stdout, done.returncode)


def judged(run: Run, output: str, status: int) -> Iterator[Line]:
    """Yield how many errors the tool saw; fail if there were any."""
    summaries = _SUMMARY.findall(output)
    if not summaries or _CANNOT in output:
        # Where the machine does not let it watch, it ends before the first kernel.
        reason = f"it ended with {status}: {output.strip()[-200:]}"
        run.not_run[f"{TOOL} memcheck"] = reason
        return
    n_errors = int(summaries[-1])
    assert not n_errors, f"memcheck: {n_errors} errors\n{output[-4000:]}"
    # The tool may also end well without having run anything.
    passed = not status and _PASSED in output
    assert passed, f"the run failed\n{output[-4000:]}"
    yield counted("checks", "memcheck of a tiny run", n_errors, "errors")
