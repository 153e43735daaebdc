"""The checks of ``tests/gpu``, as parts of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.gpu.plan import Run
from bench.gpu.records import Line, counted
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import Policy, RowLayout

ROOT = Path(__file__).parents[2]
EXAMPLE_S = 90


@dataclass(frozen=True)
class Amounts:
    """How much is checked."""

    random_keys: int  # of each kernel and case, beside the oracle of single keys
    random_cases: int
    large_keys: int  # of each table, beside the oracle of many keys
    large_cases: int
    pooled_cases: int
    race_s: float  # of each race
    races: int


FULL = Amounts(3000, 8, 1 << 20, 8, 3, 5.0, 5)
SMOKE = Amounts(60, 1, 300, 1, 1, 0.0, 2)


def launches(run: Run) -> Iterator[Line]:
    """Launch while another device is current, and from captured graphs."""
    checked = _tests("launches")
    if checked.n_devices() > 1:
        yield _compared("another device is current", checked.check_current_device())
    else:
        run.not_run["launches, another device is current"] = "there is one device"
    yield _compared("graph replays", checked.check_graphs(run.device.gpu))


def random_operations(run: Run) -> Iterator[Line]:
    """Run random operations on small tables, each compared with the oracle."""
    operations = _tests("operations")
    much = _amounts(run)
    found = operations.check_operations(
        run.device.gpu, much.random_keys, much.random_cases
    )
    yield from _within(run, "random operations", found)


def races(run: Run) -> Iterator[Line]:
    """Read beside writers."""
    stress = _tests("stress")
    much = _amounts(run)
    sizes = stress.TINY if run.smoke else stress.Sizes()
    found = stress.check_races(run.device.gpu, sizes, much.race_s, much.races)
    yield from _within(run, "races", found)


def large_tables(run: Run) -> Iterator[Line]:
    """Run every operation on large tables, each compared with the oracle."""
    scale = _tests("scale")
    much, gpu = _amounts(run), run.device.gpu
    found = scale.check_operations(gpu, much.large_keys, much.large_cases)
    yield from _within(run, "large tables", found)
    found = scale.check_pooled(gpu, much.large_keys // 4, much.pooled_cases)
    yield from _within(run, "large tables", found)


def _amounts(run: Run) -> Amounts:
    return SMOKE if run.smoke else FULL


def interop(run: Run) -> Iterator[Line]:
    """Check arrays to and from CuPy and PyTorch, and run the examples."""
    yield from _arrays(run)
    if run.smoke:
        run.not_run["examples"] = "a smoke run leaves them out"
        return
    yield from examples(run, sorted((ROOT / "examples").glob("gpu_*.py")))


def examples(run: Run, paths: Iterable[Path]) -> Iterator[Line]:
    """Run examples while there is time; fail after the last of them if one failed."""
    failures = []
    for path in paths:
        if run.checks_left() <= 0:
            run.not_run[path.name] = "no time left"
            continue
        try:
            yield from example(run, path)
        except AssertionError as exc:
            failures.append(str(exc))
    assert not failures, "\n".join(failures)


def example(run: Run, path: Path) -> Iterator[Line]:
    """Run an example; leave it out if it asks for what is not installed."""
    limit_s = min(EXAMPLE_S, max(1.0, run.checks_left()))
    try:
        done = _outcome(path, limit_s)
    except subprocess.TimeoutExpired as exc:
        if limit_s < EXAMPLE_S:
            run.not_run[path.name] = f"no time left after {limit_s:.0f} s"
            return
        # Even of a program that writes text, this is in bytes.
        said = exc.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        raise AssertionError(
            f"{path.name} did not end in {limit_s:g} s\n{text[-3000:]}"
        ) from exc
    last = done.stdout.strip().rpartition("\n")[2]
    if "ModuleNotFoundError" in last or last.startswith("this example needs"):
        run.not_run[path.name] = last
        return
    assert not done.returncode, f"{path.name} ended with\n{done.stdout[-3000:]}"
    yield counted("checks", path.name, done.stdout.count("\n"), "lines printed")


def _outcome(path: Path, limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        check=False,
    )


def _arrays(run: Run) -> Iterator[Line]:
    libraries = run.libraries
    for name, library in (("cupy", libraries.cupy), ("torch", libraries.torch)):
        if library is None:
            run.not_run[f"interop, {name}"] = libraries.absent[name]
            continue
        try:
            checked = _tests("interop")
        except ImportError as exc:
            run.not_run[f"interop, {name}"] = f"{type(exc).__name__}: {exc}"
            continue
        check: Callable[[Gpu], int] = getattr(checked, f"check_{name}")
        n = check(run.device.gpu)
        yield counted("checks", f"arrays of {name}", n, "checks")


def check_shapes() -> Iterator[tuple[RowLayout, Policy]]:
    """Yield the shapes of the caches that are checked."""
    scale = _tests("scale")
    yield from (*_tests("operations").CASES, *scale.CASES, *scale.POOLED)
    for _, kind, dim in _tests("stress").CASES:
        yield RowLayout(dim), kind.policy


def _within(run: Run, name: str, found: Iterable[tuple[str, int]]) -> Iterator[Line]:
    """Yield what checks come to, one after the other, while there is time."""
    for case, n in found:
        yield _compared(f"{name}: {case}", n)
        if run.checks_left() <= 0:
            run.not_run[f"checks, {name}"] = f"no time left after {case}"
            return


def _compared(name: str, n: int) -> Line:
    return counted("checks", name, n, "keys")


def _tests(name: str) -> Any:
    """Import checks of this project, whatever else is installed as ``tests``."""
    tests, folder = import_module("tests"), str(ROOT / "tests")
    if folder not in list(tests.__path__):
        tests.__path__.insert(0, folder)
    return import_module(f"tests.gpu.{name}")
