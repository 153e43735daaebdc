"""The array that a lookup on a device returns where CuPy is not installed."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.interchange import export_dlpack, stream_memory
from hps_numba.runtime.gpu.arrays import DeviceView, order, protocol_stream

_CUDA = 2  # DLPack's kind of device
_NO_ORDER = -1  # the consumer sees to it


class DeviceArray:
    """A contiguous array on a device, for libraries that take one without copying.

    ``torch.from_dlpack``, ``cupy.asarray`` and ``numba.cuda.as_cuda_array`` do.

    Parameters
    ----------
    shape, dtype
        As in NumPy.
    gpu
        The device.
    stream
        Handle of the stream that writes the array. Its memory is given back there, so
        the stream has to outlive the array; see ``keep``.

    Attributes
    ----------
    address
        Of its first item.

    Raises
    ------
    OutOfDeviceMemoryError
        If the device has too little memory left.

    Notes
    -----
    Both protocols say which stream the array is written on, and a library that reads
    it on another waits for that stream, without the calling thread.
    """

    __slots__ = (
        "__weakref__",
        "_gpu",
        "_kept",
        "_owner",
        "address",
        "dtype",
        "shape",
        "stream",
    )

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, *, gpu: Gpu, stream: int = 0
    ) -> None:
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.stream = stream
        self._gpu = gpu
        self._owner: DeviceArray | None = None  # whose memory it is, if not its own
        self._kept: object = None
        memory = stream_memory(gpu)
        self.address = memory.take(self.nbytes, stream)
        # At the process's end the driver may be gone already, and the memory with it.
        giving = weakref.finalize(self, memory.give_back, self.address, stream)
        giving.atexit = False

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __getitem__(self, items: slice) -> DeviceArray:
        """Return some items of the first axis, in the same memory.

        Raises
        ------
        TypeError, IndexError
            If these are no items that follow each other.
        """
        if not isinstance(items, slice):
            raise TypeError("a device array is cut by slices; copy_to_host() has items")
        begin, end, step = items.indices(len(self))
        if step != 1:
            raise IndexError(f"a step of {step}: items have to follow each other")
        row = self.nbytes // max(len(self), 1)
        shape = (max(end - begin, 0), *self.shape[1:])
        return self._view(self.address + begin * row, shape)

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return the same items in another shape, in the same memory.

        Raises
        ------
        ValueError
            If it has another number of items.
        """
        if math.prod(shape) != self.size:
            raise ValueError(f"shape {self.shape} does not become {shape}")
        return self._view(self.address, shape)

    def _view(self, address: int, shape: tuple[int, ...]) -> DeviceArray:
        view = DeviceArray.__new__(DeviceArray)
        view.shape, view.dtype, view.stream = shape, self.dtype, self.stream
        view.address, view._gpu, view._owner = address, self._gpu, self
        return view

    def keep(self, stream: object) -> None:
        """Let the object whose stream this is live as long as the memory does."""
        owner = self
        while owner._owner is not None:
            owner = owner._owner
        owner._kept = stream

    def copy_to_host(self) -> NDArray[Any]:
        """Return a copy in host memory, once everything written to the array is there.

        Raises
        ------
        LaunchError
            If the device failed.
        """
        host = np.empty(self.shape, self.dtype)
        self._gpu.copy(host.ctypes.data, self.address, host.nbytes, self.stream)
        self._gpu.wait(self.stream)
        return host

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the array is on a device; copy_to_host() brings it here")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": protocol_stream(self.stream),
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._gpu.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"the array stays on device {self._gpu.ordinal} and is not copied; "
                f"copy_to_host() returns one in host memory"
            )
        if stream != _NO_ORDER:
            own = protocol_stream(self.stream)
            written = DeviceView(self.address, self.shape, self.dtype, own, self)
            order(written, protocol_stream(stream or 0), self._gpu)
        with self._gpu.launcher.current():
            exported = export_dlpack(self, self.address, self.shape, self.dtype)
            return exported.__dlpack__(stream=_NO_ORDER, max_version=max_version)

    def __repr__(self) -> str:
        return (
            f"DeviceArray(shape={self.shape}, dtype={self.dtype}, "
            f"device={self._gpu.ordinal}, address={self.address:#x})"
        )
