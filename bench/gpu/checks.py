"""The checks of ``tests/gpu``, as parts of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.plan import Run
from bench.gpu.records import Line, counted
from hps_numba.kernels.cuda.layout import Policy, RowLayout

ROOT = Path(__file__).parents[2]


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


FULL = Amounts(3000, 8, 1 << 20, 8, 3, 8.0, 4)
SMOKE = Amounts(60, 1, 300, 1, 1, 0.0, 2)


def checks(run: Run) -> Iterator[Line]:
    """Compare every operation with the oracle; race readers and writers."""
    _find_tests()
    from tests.gpu import launches, operations, scale, stress

    amounts = SMOKE if run.smoke else FULL
    gpu = run.device.gpu
    if launches.n_devices() > 1:
        yield _compared("another device is current", launches.check_current_device())
    else:
        run.not_run["checks, another device is current"] = "there is one device"
    yield _compared("graph replays", launches.check_graphs(gpu))
    yield from _within(
        run,
        "random operations",
        operations.check_operations(gpu, amounts.random_keys, amounts.random_cases),
    )
    yield from _within(
        run,
        "operations at large",
        scale.check_operations(gpu, amounts.large_keys, amounts.large_cases),
    )
    yield from _within(
        run,
        "sums at large",
        scale.check_pooled(gpu, amounts.large_keys, amounts.pooled_cases),
    )
    sizes = stress.TINY if run.smoke else stress.Sizes()
    yield from _within(
        run, "races", stress.check_races(gpu, sizes, amounts.race_s, amounts.races)
    )


def interop(run: Run) -> Iterator[Line]:
    """Check arrays to and from CuPy and PyTorch."""
    _find_tests()
    libraries = run.libraries
    for name, library in (("cupy", libraries.cupy), ("torch", libraries.torch)):
        if library is None:
            run.not_run[f"interop, {name}"] = libraries.absent[name]
            continue
        try:
            from tests.gpu import interop as checked
        except ImportError as exc:
            run.not_run[f"interop, {name}"] = f"{type(exc).__name__}: {exc}"
            continue
        check: Callable[[], int] = getattr(checked, f"check_{name}")
        yield counted("checks", f"arrays of {name}", check(), "checks")


def check_shapes() -> Iterator[tuple[RowLayout, Policy]]:
    """Yield the shapes of the caches that are checked."""
    _find_tests()
    from tests.gpu import operations, scale, stress

    yield from (*operations.CASES, *scale.CASES, *scale.POOLED)
    for _, _, dim in stress.CASES:
        yield RowLayout(dim), Policy.LRU


def _within(run: Run, name: str, found: Iterable[tuple[str, int]]) -> Iterator[Line]:
    """Yield what checks come to, one after the other, while there is time."""
    for case, n in found:
        yield _compared(f"{name}: {case}", n)
        if run.checks_left() <= 0:
            run.not_run[f"checks, {name}"] = f"no time left after {case}"
            return


def _compared(name: str, n: int) -> Line:
    return counted("checks", name, n, "keys")


def _find_tests() -> None:
    """Let ``tests`` be this project's, whatever else is installed by that name."""
    import tests

    folder = str(ROOT / "tests")
    if folder not in list(tests.__path__):
        tests.__path__.insert(0, folder)
