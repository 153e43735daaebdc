"""A device's memory, streams and events: what its launches work on.

Addresses and stream handles are integers, as the launches take them. Memory is taken
when a cache is built and given back when it is closed; nothing here is called for each
lookup but copies, events and waiting.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from hps_numba.kernels.cuda.cubins import CubinCache
from hps_numba.kernels.cuda.launch import CudaLauncher, LaunchError, checked

Bytes = npt.NDArray[np.uint8]

_WITHOUT_TIMING = 2
_NON_BLOCKING = 1
_OUT_OF_MEMORY = 2


class OutOfDeviceMemoryError(LaunchError):
    """The device, or the memory that can be pinned for it, has too little left."""


class Block:
    """Memory on a device. ``close`` gives it back; so does the last reference.

    Parameters
    ----------
    gpu
        The device.
    n_bytes
        Its size.

    Attributes
    ----------
    address
        Where it begins, a multiple of 256.
    """

    def __init__(self, gpu: Gpu, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        with gpu.launcher.current():
            status, address = driver.cuMemAlloc(max(1, n_bytes))
        if int(status) == _OUT_OF_MEMORY:
            raise OutOfDeviceMemoryError(
                f"device {gpu.ordinal} has no {n_bytes:,} bytes left, but "
                f"{gpu.free_bytes:,}"
            )
        checked((status,), f"allocation of {n_bytes:,} bytes")
        self.address = int(address)
        self.close = _finally(self, _free, gpu.launcher, self.address)


class PinnedBlock:
    """Host memory that a device copies from and to by itself.

    Attributes
    ----------
    array
        uint8 (n_bytes,), valid until ``close``; views of it too.
    address
        Where it begins.
    """

    def __init__(self, gpu: Gpu, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        with gpu.launcher.current():
            status, address = driver.cuMemAllocHost(max(1, n_bytes))
        if int(status) == _OUT_OF_MEMORY:
            raise OutOfDeviceMemoryError(f"{n_bytes:,} bytes cannot be pinned")
        checked((status,), f"pinning of {n_bytes:,} bytes")
        self.address = int(address)
        place = (ctypes.c_uint8 * n_bytes).from_address(self.address)
        self.array: Bytes = np.ctypeslib.as_array(place)
        self.close = _finally(self, _free_host, gpu.launcher, self.address)


class Event:
    """A place in a stream that others wait for."""

    def __init__(self, gpu: Gpu) -> None:
        self._launcher = gpu.launcher
        with gpu.launcher.current():
            self._event = checked(driver.cuEventCreate(_WITHOUT_TIMING), "event")
        self.close = _finally(self, driver.cuEventDestroy, self._event)

    def record(self, stream: int) -> None:
        """Mark what is queued on a stream so far."""
        self._call(stream, driver.cuEventRecord, self._event, stream)

    def hold_up(self, stream: int) -> None:
        """Let what a stream is given from now on wait for what was marked."""
        self._call(stream, driver.cuStreamWaitEvent, stream, self._event, 0)

    def wait(self) -> None:
        """Wait until what was marked is done."""
        checked(driver.cuEventSynchronize(self._event), "event")

    def _call(self, stream: int, call: Any, *args: Any) -> None:
        checked(self._launcher.on(stream, call, *args), "event")


class Gpu:
    """One device, its memory and its launches.

    Parameters
    ----------
    ordinal
        Number of the device.
    cubins
        Where compiled kernels come from; the user's cache directory if None.

    Raises
    ------
    DeviceUnavailableError
        If there is no driver, or no such device.

    Notes
    -----
    Safe from several threads. The current device of the calling thread stays what it
    is.
    """

    def __init__(self, ordinal: int = 0, *, cubins: CubinCache | None = None) -> None:
        self.ordinal = ordinal
        self.launcher = CudaLauncher(ordinal, cubins=cubins)

    @property
    def free_bytes(self) -> int:
        """Bytes of device memory that are free now."""
        with self.launcher.current():
            status, free, _ = driver.cuMemGetInfo()
        checked((status,), "memory")
        return int(free)

    def stream(self) -> int:
        """Return the handle of a new stream; see ``drop_stream``."""
        with self.launcher.current():
            return int(checked(driver.cuStreamCreate(_NON_BLOCKING), "stream"))

    def drop_stream(self, stream: int) -> None:
        """Give a stream back that ``stream`` made; what is queued on it is done."""
        # A device that has failed refuses, and has nothing left to give back.
        driver.cuStreamDestroy(stream)

    def copy(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Queue a copy between addresses of any kind.

        Copies from and to host memory that is not pinned may be waited for.
        """
        if n_bytes:
            (status,) = self.launcher.on(
                stream, driver.cuMemcpyAsync, target, source, n_bytes, stream
            )
            if status:
                checked((status,), f"copy of {n_bytes:,} bytes")

    def zero(self, target: int, n_bytes: int, stream: int) -> None:
        """Queue a clearing of device memory."""
        if n_bytes:
            call = driver.cuMemsetD8Async
            checked(
                self.launcher.on(stream, call, target, 0, n_bytes, stream), "memory"
            )

    def wait(self, stream: int) -> None:
        """Wait until everything that a stream was given is done.

        Raises
        ------
        LaunchError
            If any of it failed.
        """
        checked(self.launcher.on(stream, driver.cuStreamSynchronize, stream), "device")


def _finally(owner: Any, call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Call a function once: when it is called for, or when the owner is gone."""
    close = weakref.finalize(owner, call, *args)
    # At the process's end the driver may be gone already, and the memory with it.
    close.atexit = False
    return close


def _free(launcher: CudaLauncher, address: int) -> None:
    with launcher.current():
        driver.cuMemFree(address)


def _free_host(launcher: CudaLauncher, address: int) -> None:
    with launcher.current():
        driver.cuMemFreeHost(address)
