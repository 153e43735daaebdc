"""Compiles what a run will launch, on all cores, before anything is timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from cuda import pathfinder

from bench.gpu.kernels import fill_kernel, gather_kernel, has_words
from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.compiling import ComputeCapability, KernelSpec
from hps_numba.kernels.cuda.cubins import CubinCache, default_directory
from hps_numba.kernels.cuda.layout import CacheLayout, Policy, RowLayout, TableLayout

Shape = tuple[RowLayout, Policy]


def load_compilers() -> None:
    """Load the compilers' libraries before another package brings its own.

    A process uses those that came first.
    """
    for name in ("nvvm", "nvJitLink"):
        # Whoever compiles says what is missing.
        with contextlib.suppress(RuntimeError, OSError):
            pathfinder.load_nvidia_dynamic_lib(name)


def compile_ahead(
    shapes: Iterable[Shape], cc: ComputeCapability, *, n_workers: int | None = None
) -> int:
    """Compile the kernels of caches of these shapes; return how many there are.

    They are in the cache directory afterwards, where every process finds them.
    """
    jobs = [(shape, cc) for shape in dict.fromkeys(shapes)]
    # Forked, a process would share a driver that it must not use.
    context = multiprocessing.get_context("spawn")
    n_workers = n_workers or min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        return sum(pool.map(_compile, jobs))


def specs_of(shape: Shape) -> Iterator[KernelSpec]:
    """Yield the kernels of a cache of one shape, and those that fill and gather."""
    rows, policy = shape
    layout = CacheLayout(rows, (TableLayout(1),))
    yield from Cache(layout, policy, base=0, launcher=_NoLauncher()).kernels()
    if has_words(rows):
        yield fill_kernel(rows)
        yield gather_kernel(rows)


class _NoLauncher:
    """Of a cache that launches nothing."""

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        raise NotImplementedError(spec.name)


def _compile(job: tuple[Shape, ComputeCapability]) -> int:
    shape, cc = job
    cubins = CubinCache(default_directory())
    return len([cubins.get(spec, cc) for spec in specs_of(shape)])
