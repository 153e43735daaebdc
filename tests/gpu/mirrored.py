"""The kernels' own tests on a device: arrays of the host, mirrored in its memory.

What tests hold are NumPy arrays in pinned memory. Before a launch all of them go to the
device, after it they come back, so that what has been written for kernels on the CPU
runs on a device unchanged: every byte that a kernel touched is looked at.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.gpu import Block, Gpu, PinnedBlock
from hps_numba.kernels.cuda.layout import Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.harness import CpuCache
from tests.kernels.cuda.oracle import Array


@dataclass(frozen=True)
class Mirror:
    """An array of the host, and its copy on the device."""

    host: PinnedBlock
    device: Block

    @property
    def place(self) -> int:
        return self.host.address

    @property
    def n_bytes(self) -> int:
        return self.host.n_bytes


class MirroredMemory:
    """Arrays that launches of a ``MirroredLauncher`` read and write."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream = gpu.stream()
        self._mirrors: list[Mirror] = []  # by place
        self._made: list[Mirror] | None = None

    def array(self, shape: int | tuple[int, ...], dtype: Any, fill: Any = 0) -> Array:
        kind = np.dtype(dtype)
        n_bytes = max(1, int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        mirror = Mirror(PinnedBlock(self.gpu, n_bytes), Block(self.gpu, n_bytes))
        bisect.insort(self._mirrors, mirror, key=lambda one: one.place)
        if self._made is not None:
            self._made.append(mirror)
        n_values = n_bytes // kind.itemsize if np.prod(shape) else 0
        array: Array = mirror.host.array[: n_values * kind.itemsize].view(kind)
        array[...] = fill
        return array.reshape(shape)

    def copy(self, array: Array) -> Array:
        made = self.array(array.shape, array.dtype)
        made[...] = array
        return made

    def address(self, array: Array) -> int:
        """Return the device address of an array, or of a view of one."""
        place = int(array.ctypes.data)
        mirror = self._mirrors[self._index(place)]
        return mirror.device.address + place - mirror.place

    def _index(self, place: int) -> int:
        i = bisect.bisect_right(self._mirrors, place, key=lambda one: one.place) - 1
        if i < 0 or place > self._mirrors[i].place + self._mirrors[i].n_bytes:
            raise ValueError(f"the array at {place:#x} is not of this memory")
        return i

    def free(self, array: Array) -> None:
        self._drop(self._mirrors[self._index(int(array.ctypes.data))])

    def _drop(self, mirror: Mirror) -> None:
        self._mirrors.remove(mirror)
        mirror.device.close()
        mirror.host.close()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Give back what is allocated inside, at the end."""
        outer, self._made = self._made, []
        try:
            yield
        finally:
            for mirror in self._made:
                self._drop(mirror)
            self._made = outer

    def upload(self) -> None:
        for one in self._mirrors:
            self.gpu.copy(one.device.address, one.place, one.n_bytes, self.stream)

    def download(self) -> None:
        """Copy back what launches wrote, and wait."""
        for one in self._mirrors:
            self.gpu.copy(one.place, one.device.address, one.n_bytes, self.stream)
        self.gpu.wait(self.stream)

    def close(self) -> None:
        for mirror in list(self._mirrors):
            self._drop(mirror)
        self.gpu.drop_stream(self.stream)


class MirroredLauncher:
    """Runs each launch by itself, and brings back what it wrote."""

    def __init__(self, memory: MirroredMemory) -> None:
        self._memory = memory
        self.cpu_s = 0.0

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        memory = self._memory
        memory.gpu.launcher.warm_up([spec])
        memory.upload()
        started = process_time()
        memory.gpu.launcher.launch(spec, grid, args, memory.stream)
        memory.gpu.wait(memory.stream)
        self.cpu_s = process_time() - started
        memory.download()


def mirrored_cache(
    memory: MirroredMemory,
    rows: RowLayout,
    tables: Sequence[TableLayout],
    policy: Policy = Policy.LRU,
) -> CpuCache:
    """Return a cache of the tests whose kernels run on the device."""
    launcher = MirroredLauncher(memory)
    return CpuCache(rows, tables, policy, memory=memory, launcher=launcher)


def checked_cache(
    memory: MirroredMemory,
    rows: RowLayout,
    tables: Sequence[TableLayout],
    policy: Policy = Policy.LRU,
) -> CheckedCache:
    """Return a cache on the device whose operations are compared with the oracle."""
    launcher = MirroredLauncher(memory)
    return CheckedCache(rows, tables, policy, memory=memory, launcher=launcher)
