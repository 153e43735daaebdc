"""Device memory that changes hands: other libraries' arrays, and arrays given away."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Buffer
from cuda.core.utils import StridedMemoryView

from hps_numba.kernels.cuda.gpu import Gpu, OutOfDeviceMemoryError
from hps_numba.kernels.cuda.launch import checked

_DEVICE_ORDINAL = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_RELEASE_THRESHOLD = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_CAPTURE_ELSEWHERE = driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
_WITHOUT_LIMIT = 2**64 - 1


@functools.cache
def n_devices() -> int:
    """Return how many devices the driver shows."""
    return int(checked(driver.cuDeviceGetCount(), "devices"))


def device_of(address: int) -> int | None:
    """Return the device that knows an address, or None if it is ordinary memory."""
    status, ordinal = driver.cuPointerGetAttribute(_DEVICE_ORDINAL, address)
    return None if status else int(ordinal)


def device_of_stream(stream: int) -> int | None:
    """Return the device of a stream, or None where the driver does not tell."""
    try:
        status, ordinal = driver.cuStreamGetDevice(stream)
    except RuntimeError:
        return None  # The driver is older than CUDA 12.8.
    return None if status else int(ordinal)


def import_dlpack(array: Any, stream: int) -> Any:
    """Return address, shape, strides and dtype of an array that speaks DLPack.

    What is queued on ``stream`` from now on finds what the array's owner has queued.
    """
    return StridedMemoryView.from_dlpack(array, stream_ptr=stream)


def export_dlpack(
    owner: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> StridedMemoryView:
    """Return a view that hands memory out by DLPack and keeps its owner alive."""
    n_bytes = dtype.itemsize * int(np.prod(shape))
    buffer = Buffer.from_handle(address, n_bytes, owner=owner)
    return StridedMemoryView.from_buffer(buffer, shape, dtype=dtype)


class StreamMemory:
    """Memory of a device, taken and given back in the order of a stream.

    Unlike the driver's own pool it keeps what is given back, so that taking memory for
    each lookup asks the system for none.

    Notes
    -----
    Safe from several threads.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._launcher = gpu.launcher
        self._ordinal = gpu.ordinal
        # Addresses and their streams, given back but not yet to the driver.
        self._parked: deque[tuple[int, int]] = deque()
        properties = driver.CUmemPoolProps()
        properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = gpu.ordinal
        with gpu.launcher.current():
            self._pool = checked(driver.cuMemPoolCreate(properties), "memory pool")
            keep = driver.cuuint64_t(_WITHOUT_LIMIT)
            result = driver.cuMemPoolSetAttribute(self._pool, _RELEASE_THRESHOLD, keep)
            checked(result, "memory pool")
        # The pool goes when the last of its memory has been given back.
        weakref.finalize(self, driver.cuMemPoolDestroy, self._pool).atexit = False

    def take(self, n_bytes: int, stream: int) -> int:
        """Return the address of memory for what a stream is given from now on.

        Raises
        ------
        OutOfDeviceMemoryError
            If the device has too little left.
        """
        for _ in range(len(self._parked)):
            self._give_one_back()
        status, address = self._launcher.on(
            *(stream, driver.cuMemAllocFromPoolAsync, max(1, n_bytes)),
            *(self._pool, stream),
        )
        if status == _OUT_OF_MEMORY:
            raise OutOfDeviceMemoryError(
                f"device {self._ordinal} has no {n_bytes:,} bytes left"
            )
        checked((status,), f"allocation of {n_bytes:,} bytes")
        return int(address)

    def give_back(self, address: int, stream: int) -> None:
        """Give memory back once a stream has done what it was given."""
        self._parked.append((address, stream))
        self._give_one_back()

    def _give_one_back(self) -> None:
        """Give back what waits the longest, unless its stream is being captured.

        A graph would take in that it is given back, and do so each time it is run.
        """
        try:
            address, stream = self._parked.popleft()
        except IndexError:
            return  # Another thread was faster.
        on = self._launcher.on
        status, capture = on(stream, driver.cuStreamIsCapturing, stream)
        if status == _CAPTURE_ELSEWHERE or (not status and int(capture)):
            self._parked.append((address, stream))
        elif on(stream, driver.cuMemFreeAsync, address, stream)[0]:
            # The stream is gone: nobody can tell any more what it still had to do. A
            # device that has failed refuses this too, and has nothing left to give.
            with self._launcher.current():
                driver.cuCtxSynchronize()
                driver.cuMemFree(address)


_memory: weakref.WeakKeyDictionary[Gpu, StreamMemory] = weakref.WeakKeyDictionary()


def stream_memory(gpu: Gpu) -> StreamMemory:
    """Return the memory that a device's arrays are taken from."""
    found = _memory.get(gpu)
    return found if found is not None else _memory.setdefault(gpu, StreamMemory(gpu))
