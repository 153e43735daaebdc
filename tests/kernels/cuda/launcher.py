"""Launches of a cache's kernels on the CPU, and what a query leaves in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.kernels.cuda.compiling import NUMBA_TYPES, KernelSpec
from hps_numba.kernels.cuda.operands import Workspace
from tests.support import cpuexec

Array = npt.NDArray[Any]


class CpuLauncher:
    """Runs launches at once, or several under one scheduler inside ``together``.

    Parameters
    ----------
    memory
        What kernels may touch.
    options
        For ``cpuexec.run``: preempt, schedule, workers, max_steps, ...
    """

    def __init__(self, memory: Any, **options: Any) -> None:
        self.memory = memory
        self.options: dict[str, Any] = {"preempt": 0.0, **options}
        self.seed = 0
        self._queue: list[Any] | None = None
        self._last: dict[Any, int] = {}

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        if not (grid[0] and grid[1]):
            return
        kinds = tuple(NUMBA_TYPES[letter] for letter in spec.argtypes)
        kernel = cpuexec.compile_kernel(spec.function, kinds)
        if self._queue is None:
            launch = cpuexec.Launch(kernel, grid, spec.block, tuple(args))
            self.seed += 1
            cpuexec.run(launch, self.memory, seed=self.seed, **self.options)
            return
        launch = cpuexec.Launch(
            kernel, grid, spec.block, tuple(args), after=self._last.get(stream)
        )
        self._last[stream] = len(self._queue)
        self._queue.append(launch)

    @contextlib.contextmanager
    def together(self, seed: int, **options: Any) -> Iterator[None]:
        """Run what is launched inside at once; a stream's own launches keep order."""
        self._queue, self._last = [], {}
        try:
            yield
            launches = self._queue
        finally:
            self._queue = None
        if launches:
            given = {**self.options, **options}
            cpuexec.run_together(launches, self.memory, seed=seed, **given)


@dataclass
class Answer:
    """What a query leaves behind; read it after the launch."""

    out: Array
    work: Workspace
    block: Array  # the workspace's bytes
    starts: list[int]
    keep: list[Array] = field(default_factory=list)
    keys: Array | None = None

    def results(self, table: int = 0) -> list[int]:
        """Return n_missing, n_unique_missing, n_hits, n_unique_hits."""
        start = self.work.layout.results + 16 * table
        return [int(x) for x in self.block[start : start + 16].view(np.uint32)]

    def missing(self, table: int = 0) -> Array:
        """Return int (n_missing, 2): positions, and positions of the first ones."""
        n = self.results(table)[0]
        start = self.work.layout.missing + 8 * self.starts[table]
        return self.block[start : start + 8 * n].view(np.uint32).reshape(-1, 2)

    def unique(self, table: int = 0) -> Array:
        """Return the unique missing keys."""
        n = self.results(table)[1]
        start = self.work.layout.unique + 8 * self.starts[table]
        return self.block[start : start + 8 * n].view(np.int64)

    def numbers(self, table: int = 0) -> Array:
        """Return the number of the unique key of each missing occurrence."""
        start = self.work.layout.firsts
        firsts = self.block[start : start + 4 * self.work.layout.n_keys]
        return firsts.view(np.uint32)[self.missing(table)[:, 1]]
