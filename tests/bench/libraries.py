"""As much of PyTorch and CuPy as the GPU benchmarks use, over kernels of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.gpu.device import Device
from bench.gpu.kernels import BLOCK, gather_kernel
from hps_numba.kernels.cuda.gpu import Block
from hps_numba.kernels.cuda.layout import RowLayout


class Tensor:
    """Device memory that somebody else owns, or a block."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.address, self.shape, self.dtype = address, shape, dtype
        self.nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.block: Block | None = None

    @classmethod
    def of(cls, array: Any) -> Tensor:
        given = array.__cuda_array_interface__
        assert given["strides"] is None
        dtype = np.dtype(given["typestr"]).name
        return cls(given["data"][0], given["shape"], dtype)


class Torch:
    """Stands for the module ``torch``; ``embedding_bag`` is more than it can."""

    __version__ = "0"

    def __init__(self, device: Device) -> None:
        self._device = device
        self.cuda = self
        self.nn = self.functional = self
        self.calls: list[str] = []
        self._stream = 0

    # -- streams

    def ExternalStream(self, handle: int, device: str) -> int:  # noqa: N802 (its name)
        assert device == "cuda:0"
        return handle

    @contextlib.contextmanager
    def stream(self, handle: int) -> Iterator[None]:
        self._stream = handle
        yield
        self._stream = 0

    # -- tensors

    def as_tensor(self, array: Any, device: str) -> Tensor:
        assert device == "cuda:0"
        tensor = Tensor.of(array)
        tensor.copy_ = lambda other: self._copy(tensor, other)  # type: ignore[attr-defined]
        return tensor

    def _copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        place = target.address, source.address, target.nbytes
        self._device.gpu.copy(*place, self._stream)

    def index_select(
        self, table: Tensor, dim: int, indices: Tensor, *, out: Tensor
    ) -> None:
        assert dim == 0
        assert out.shape == (*indices.shape, table.shape[1])
        self.calls.append("index_select")
        rows = RowLayout(table.shape[1], table.dtype, table.dtype)
        n = indices.shape[0]
        args = (table.address, indices.address, n, out.address)
        launch = self._device.gpu.launcher.launch
        launch(gather_kernel(rows), (-(-n // BLOCK), 1), args, self._stream)

    def embedding(self, indices: Tensor, table: Tensor) -> Tensor:
        shape = indices.shape[0], table.shape[1]
        block = self._device.block(shape[0] * shape[1] * 4)
        made = Tensor(block.address, shape, table.dtype)
        made.block = block
        self.index_select(table, 0, indices, out=made)
        return made

    def embedding_bag(self, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError("no sums here")


class WrongCupy:
    """Stands for the module ``cupy``; ``take`` takes the wrong rows."""

    __version__ = "0"

    def __init__(self, device: Device) -> None:
        self._torch = Torch(device)
        self.cuda = self.Stream = self

    @contextlib.contextmanager
    def _current(self, handle: int) -> Iterator[None]:
        with self._torch.stream(handle):
            yield

    def from_external(self, stream: Any) -> Any:
        outer = self
        protocol, handle = stream.__cuda_stream__()
        assert protocol == 0

        class Stream:
            def __enter__(self) -> None:
                outer._entered = outer._current(handle)
                outer._entered.__enter__()

            def __exit__(self, *exc: Any) -> None:
                outer._entered.__exit__(*exc)

        return Stream()

    def asarray(self, array: Any) -> Tensor:
        return Tensor.of(array)

    def take(self, table: Tensor, indices: Tensor, *, axis: int, out: Tensor) -> None:
        assert axis == 0
        row_bytes = table.nbytes // table.shape[0]
        shifted = Tensor(table.address + row_bytes, table.shape, table.dtype)
        first = Tensor(indices.address, (1,), indices.dtype)
        target = Tensor(out.address, (1, out.shape[1]), out.dtype)
        self._torch.index_select(shifted, 0, first, out=target)
