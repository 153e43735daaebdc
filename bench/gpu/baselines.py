"""What PyTorch and CuPy do with the same rows at the same addresses."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from bench.gpu.device import Device
from bench.gpu.timing import Work
from bench.gpu.works import Stage
from hps_numba.kernels.cuda.layout import RowLayout

TORCH_GATHER, CUPY_GATHER = "torch.index_select", "cupy.take"


class DeviceArray:
    """Device memory as other libraries take it over, without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


class Libraries:
    """PyTorch and CuPy, where they are installed.

    Parameters
    ----------
    device
        Where they work.
    alone
        Whether to do without them.

    Attributes
    ----------
    absent
        Why a library is not there, by its name.
    """

    def __init__(self, device: Device, *, alone: bool = False) -> None:
        self.device = device
        self.absent: dict[str, str] = {}
        self._alone = alone
        self.torch = self._imported("torch")
        self.cupy = self._imported("cupy")

    def versions(self) -> dict[str, str]:
        """Return the versions of those that are there."""
        found = {"torch": self.torch, "cupy": self.cupy}
        return {name: str(m.__version__) for name, m in found.items() if m}

    def _imported(self, name: str) -> Any:
        if self._alone:
            self.absent[name] = "left out, as was asked"
            return None
        try:
            return import_module(name)
        # A library that does not find its own parts raises more than ImportError.
        except Exception as exc:
            self.absent[name] = f"{type(exc).__name__}: {exc}"[:200]
            return None

    # -- PyTorch ------------------------------------------------------------------

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """Return memory as a tensor of PyTorch."""
        array = DeviceArray(address, shape, dtype)
        return self.torch.as_tensor(array, device=self._torch_device)

    def on_torch_stream(self, call: Callable[[int], Any]) -> Callable[[int], None]:
        """Return a function of PyTorch's that queues on the stream under test."""
        cuda = self.torch.cuda
        stream = cuda.ExternalStream(self.device.stream, device=self._torch_device)

        def queue(i: int) -> None:
            with cuda.stream(stream):
                call(i)

        return queue

    @property
    def _torch_device(self) -> str:
        return f"cuda:{self.device.gpu.ordinal}"

    # -- CuPy ---------------------------------------------------------------------

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """Return memory as an array of CuPy."""
        return self.cupy.asarray(DeviceArray(address, shape, dtype))

    def on_cupy_stream(self, call: Callable[[int], Any]) -> Callable[[int], None]:
        """Return a function of CuPy's that queues on the stream under test."""
        stream = self._cupy_stream()

        def queue(i: int) -> None:
            with stream:
                call(i)

        return queue

    def _cupy_stream(self) -> Any:
        cuda = self.cupy.cuda
        adopt = getattr(cuda.Stream, "from_external", None)
        if adopt is None:  # before CuPy 14
            return cuda.ExternalStream(self.device.stream, self.device.gpu.ordinal)
        return adopt(self.device)


def unable(libraries: Libraries, rows: RowLayout) -> dict[str, str]:
    """Return the gathers that cannot give such rows, and why."""
    if rows.stored == rows.out:
        return {}
    reason = f"rows of {rows.stored} do not become {rows.out} on the way"
    names = {TORCH_GATHER: libraries.torch, CUPY_GATHER: libraries.cupy}
    return {name: reason for name, library in names.items() if library is not None}


def gathers(libraries: Libraries, stage: Stage, *, embedding: bool) -> list[Work]:
    """Return gathers of the same rows by their numbers, those that can be had."""
    if stage.table.rows.stored != stage.table.rows.out:
        return []
    found = []
    if libraries.torch is not None:
        found.append(_index_select(libraries, stage))
        if embedding:
            found.append(_embedding(libraries, stage))
    if libraries.cupy is not None:
        found.append(_take(libraries, stage))
    return found


def _shapes(stage: Stage) -> tuple[Any, ...]:
    """Return the arguments of the dense table, and of launch i's indices and rows."""
    table, lookup = stage.table, stage.lookup
    dense = table.dense, (table.n_rows, table.rows.dim), table.rows.stored

    def indices(i: int) -> tuple[Any, ...]:
        return lookup.indices + 8 * i * lookup.n, (lookup.n,), "int64"

    def rows(i: int) -> tuple[Any, ...]:
        return stage.out_at(i), (lookup.n, table.rows.dim), table.rows.out

    return dense, indices, rows


def _work(name: str, stage: Stage, call: Callable[[int], None]) -> Work:
    lookup = stage.lookup
    written = stage.rows_written
    return Work(
        *(name, call, lookup.n_launches, lookup.n, stage.check_rows, written),
        is_baseline=True,
    )


def _index_select(libraries: Libraries, stage: Stage) -> Work:
    dense, indices, rows = _shapes(stage)
    torch, table = libraries.torch, libraries.tensor(*dense)
    n = stage.lookup.n_launches
    asked = [libraries.tensor(*indices(i)) for i in range(n)]
    out = [libraries.tensor(*rows(i)) for i in range(n)]

    def call(i: int) -> None:
        torch.index_select(table, 0, asked[i], out=out[i])

    return _work(TORCH_GATHER, stage, libraries.on_torch_stream(call))


def _embedding(libraries: Libraries, stage: Stage) -> Work:
    dense, indices, rows = _shapes(stage)
    table = libraries.tensor(*dense)
    n = stage.lookup.n_launches
    asked = [libraries.tensor(*indices(i)) for i in range(n)]
    out = [libraries.tensor(*rows(i)) for i in range(n)]
    embedding = libraries.torch.nn.functional.embedding
    given: list[Any] = [None]

    def call(i: int) -> None:
        # It allocates what it returns; the memory is the caller's until the next call.
        given[0] = embedding(asked[i], table)

    def check() -> None:
        call_all = libraries.on_torch_stream(lambda i: out[i].copy_(given[0]))
        for i in range(n):
            queue(i)
            call_all(i)
        stage.device.wait()
        stage.check_rows()

    queue = libraries.on_torch_stream(call)
    lookup = stage.lookup
    name, written = "torch embedding", stage.rows_written
    return Work(
        *(name, queue, lookup.n_launches, lookup.n, check, written), is_baseline=True
    )


def _take(libraries: Libraries, stage: Stage) -> Work:
    dense, indices, rows = _shapes(stage)
    cupy, table = libraries.cupy, libraries.array(*dense)
    n = stage.lookup.n_launches
    asked = [libraries.array(*indices(i)) for i in range(n)]
    out = [libraries.array(*rows(i)) for i in range(n)]

    def call(i: int) -> None:
        cupy.take(table, asked[i], axis=0, out=out[i])

    return _work(CUPY_GATHER, stage, libraries.on_cupy_stream(call))
