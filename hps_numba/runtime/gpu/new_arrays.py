"""New arrays on a device: of CuPy where it is installed, else our own."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.gpu import Gpu, OutOfDeviceMemoryError
from hps_numba.runtime.gpu.device_array import DeviceArray

logger = logging.getLogger(__name__)

_Maker = Callable[[tuple[int, ...], Any, Gpu, int], tuple[Any, int]]
_MOST_STREAMS = 1024  # handles that are remembered; a program has a few


def new_array(
    shape: tuple[int, ...], dtype: np.dtype[Any] | type, *, gpu: Gpu, stream: int
) -> tuple[Any, int]:
    """Return an array on a device, not cleared, and its address.

    Parameters
    ----------
    shape, dtype
        As in NumPy.
    gpu
        The device.
    stream
        Handle of the stream that will write the array, and the next one to use its
        memory when it is gone.

    Returns
    -------
    tuple
        A ``cupy.ndarray`` if CuPy can be imported, else a ``DeviceArray``.

    Raises
    ------
    OutOfDeviceMemoryError
        If the device has too little memory left.
    """
    return _maker()(shape, dtype, gpu, stream)


@functools.cache
def _maker() -> _Maker:
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDevice()
    # Of another CUDA it may be there and of no use, with errors of its own.
    except Exception as exc:
        logger.info("arrays=DeviceArray reason=%s", exc)
        return _own
    return cupy_maker(cupy)


def _own(
    shape: tuple[int, ...], dtype: Any, gpu: Gpu, stream: int
) -> tuple[DeviceArray, int]:
    array = DeviceArray(shape, dtype, gpu=gpu, stream=stream)
    return array, array.address


class _Handle:
    """A stream by its handle, as libraries take one that is not theirs."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def cupy_stream(cupy: Any, handle: int) -> Any:
    """Return a stream of the current device as one of CuPy's."""
    # From CuPy 14 on; what there was before then warns, and is to go.
    adopt = getattr(cupy.cuda.Stream, "from_external", None)
    return cupy.cuda.ExternalStream(handle) if adopt is None else adopt(_Handle(handle))


def cupy_maker(cupy: Any) -> _Maker:
    """Return what makes arrays of CuPy, from the pool that CuPy keeps for a stream."""
    empty, cuda, current = cupy.empty, cupy.cuda, cupy.cuda.runtime.getDevice
    # Default streams of all devices have one handle, and CuPy holds a stream to the
    # device on which it was wrapped.
    streams: dict[tuple[int, int], Any] = {}

    def on_device(shape: tuple[int, ...], dtype: Any, ordinal: int, stream: int) -> Any:
        known = streams.get((ordinal, stream))
        if known is None:
            if len(streams) >= _MOST_STREAMS:
                streams.clear()
            known = streams[ordinal, stream] = cupy_stream(cupy, stream)
        # The pool takes back memory for the stream that was current when it gave it.
        with known:
            return empty(shape, dtype)

    def make(
        shape: tuple[int, ...], dtype: Any, gpu: Gpu, stream: int
    ) -> tuple[Any, int]:
        try:
            if current() == gpu.ordinal:
                array = on_device(shape, dtype, gpu.ordinal, stream)
            else:
                with cuda.Device(gpu.ordinal):
                    array = on_device(shape, dtype, gpu.ordinal, stream)
        except MemoryError as exc:  # CuPy's own is one
            raise OutOfDeviceMemoryError(f"device {gpu.ordinal}: {exc}") from exc
        return array, array.data.ptr

    return make
