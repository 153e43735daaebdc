"""Arrays on a device as other libraries have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.runtime.gpu.device_array import DeviceArray


class Described:
    """Has a CUDA array interface, and nothing else."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = described


class Exchanged:
    """Speaks DLPack, and nothing else; remembers which streams were named."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None) -> None:
        self.array = array
        self.device = device or array.__dlpack_device__()
        self.streams: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, **options)


class Both(Exchanged):
    """Has both, and does not say in the first which stream it is written on."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        described = dict(self.array.__cuda_array_interface__)
        del described["stream"]
        return described | {"version": 2}


def uploaded(gpu: Gpu, values: Any, stream: int = 0) -> DeviceArray:
    """Return an array on a device with these values, there by now."""
    host = np.require(values, requirements="C")
    array = DeviceArray(host.shape, host.dtype, gpu=gpu, stream=stream)
    gpu.copy(array.address, host.ctypes.data, host.nbytes, stream)
    gpu.wait(stream)
    return array


def downloaded(gpu: Gpu, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return what lies at an address, after everything on the default stream."""
    host = np.empty(shape, dtype)
    gpu.copy(host.ctypes.data, address, host.nbytes, 0)
    gpu.wait(0)
    return host


def description(block: Block, shape: tuple[int, ...], typestr: str) -> dict[str, Any]:
    """Return the CUDA array interface of an array at the start of a block."""
    return {
        "shape": shape,
        "typestr": typestr,
        "data": (block.address, False),
        "strides": None,
        "version": 3,
    }
