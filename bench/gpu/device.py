"""The device under test: memory, one stream, timing events, captured graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.kernels.cuda.launch import LaunchError, checked

Array = npt.NDArray[Any]
POISON = 0xEE  # what outputs are filled with before they are looked at
_RELAXED = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
_L2_BYTES = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE


class Device:
    """One device and the stream on which everything is queued.

    Parameters
    ----------
    gpu
        The device.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream = gpu.stream()
        with gpu.launcher.current():
            self._events = [
                checked(driver.cuEventCreate(0), "timing event") for _ in range(2)
            ]

    @property
    def name(self) -> str:
        """The device, as the driver calls it."""
        return str(self.gpu.launcher.device.name)

    @property
    def l2_bytes(self) -> int:
        """Size of the device's last cache."""
        number = self.gpu.ordinal
        return int(checked(driver.cuDeviceGetAttribute(_L2_BYTES, number), "device"))

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver runs."""
        version = int(checked(driver.cuDriverGetVersion(), "driver"))
        return f"{version // 1000}.{version % 1000 // 10}"

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the stream, as libraries take one that is not theirs."""
        return 0, self.stream

    # -- memory -------------------------------------------------------------------

    def block(self, n_bytes: int) -> Block:
        """Return new device memory."""
        return Block(self.gpu, n_bytes)

    def upload(self, array: Array) -> Block:
        """Return device memory with the bytes of an array."""
        block = self.block(array.nbytes)
        self.write(block.address, array)
        return block

    def write(self, address: int, array: Array) -> None:
        """Copy an array to the device, and wait."""
        array = np.ascontiguousarray(array)
        self.gpu.copy(address, array.ctypes.data, array.nbytes, self.stream)
        self.wait()

    def read(self, address: int, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """Return a copy of device memory, of after everything that is queued."""
        array: Array = np.empty(shape, dtype)
        self.gpu.copy(array.ctypes.data, address, array.nbytes, self.stream)
        self.wait()
        return array

    def poison(self, address: int, n_bytes: int) -> None:
        """Fill device memory with what no result is made of."""
        call = driver.cuMemsetD8Async
        what = (address, POISON, n_bytes, self.stream)
        checked(self.gpu.launcher.on(self.stream, call, *what), "poison")

    def wait(self) -> None:
        """Wait for everything that is queued."""
        self.gpu.wait(self.stream)

    # -- time ---------------------------------------------------------------------

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the device's seconds from the first to the last that is queued."""
        begin, end = self._events
        checked(driver.cuEventRecord(begin, self.stream), "timing event")
        work()
        checked(driver.cuEventRecord(end, self.stream), "timing event")
        checked(driver.cuEventSynchronize(end), "timing event")
        elapsed_ms = checked(driver.cuEventElapsedTime(begin, end), "timing event")
        return float(elapsed_ms) / 1e3

    def graph(self, work: Callable[[], None]) -> Graph:
        """Return what ``work`` queues as a graph.

        Raises
        ------
        LaunchError
            If it does what cannot be captured.
        """
        self.wait()
        with self.gpu.launcher.current():
            call = driver.cuStreamBeginCapture(self.stream, _RELAXED)
            checked(call, "capture")
            try:
                work()
            finally:
                # A stream that stays in capture could not be used again.
                status, captured = driver.cuStreamEndCapture(self.stream)
            checked((status,), "capture")
            return Graph(captured, self.stream)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """Yield device memory that is given back at the end."""
        scratch = Scratch(self)
        try:
            yield scratch
        finally:
            scratch.close()


class Scratch:
    """Device memory that is given back together."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: list[Block] = []

    def block(self, n_bytes: int) -> int:
        """Return the address of new memory."""
        self._blocks.append(self._device.block(n_bytes))
        return self._blocks[-1].address

    def upload(self, array: Array) -> int:
        """Return the address of a copy of an array."""
        self._blocks.append(self._device.upload(array))
        return self._blocks[-1].address

    def close(self) -> None:
        """Give everything back, once nothing that is queued needs it."""
        with contextlib.suppress(LaunchError):
            self._device.wait()
        for block in self._blocks:
            block.close()
        self._blocks.clear()


class Graph:
    """Captured launches, queued again with one call."""

    def __init__(self, captured: Any, stream: int) -> None:
        self._stream = stream
        self._captured = captured
        self._ready = checked(driver.cuGraphInstantiate(captured, 0), "graph")

    def replay(self) -> None:
        """Queue the launches."""
        checked(driver.cuGraphLaunch(self._ready, self._stream), "graph")

    def close(self) -> None:
        """Forget the launches; nothing of them is queued any more."""
        driver.cuGraphExecDestroy(self._ready)
        driver.cuGraphDestroy(self._captured)
