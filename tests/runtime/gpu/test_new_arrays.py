"""New arrays are CuPy's where it is installed, on the right device and stream."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.gpu import OutOfDeviceMemoryError
from hps_numba.runtime.gpu import new_arrays
from hps_numba.runtime.gpu.device_array import DeviceArray
from hps_numba.runtime.gpu.new_arrays import cupy_maker, new_array


class FakeCuPy:
    """As much of CuPy as is used, with a trace of what was current when.

    Before version 14 streams of others had a class of their own; since then that warns.
    """

    class OutOfMemoryError(MemoryError):
        pass

    def __init__(self, version: int) -> None:
        self.device = 0
        self.stream = 0
        self.streams_made = 0
        self.full = False
        self.made: list[tuple[int, int]] = []
        self.cuda = SimpleNamespace(
            Device=lambda ordinal: _Current(self, "device", ordinal),
            Stream=SimpleNamespace(),
            ExternalStream=self._external,
            runtime=SimpleNamespace(getDevice=lambda: self.device),
        )

        self._version = version
        if version >= 14:
            self.cuda.Stream.from_external = self._adopted

    def _external(self, handle: int) -> Any:
        assert self._version < 14, "ExternalStream is deprecated"
        self.streams_made += 1
        return _Current(self, "stream", handle)

    def _adopted(self, stream: Any) -> Any:
        self.streams_made += 1
        protocol, handle = stream.__cuda_stream__()
        assert protocol == 0
        return _OfDevice(self, "stream", handle)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if self.full:
            raise self.OutOfMemoryError("Out of memory allocating 8 bytes")
        self.made.append((self.device, self.stream))
        where = SimpleNamespace(ptr=0x100 * len(self.made))
        return SimpleNamespace(shape=shape, dtype=np.dtype(dtype), data=where)


class _Current:
    def __init__(self, cupy: FakeCuPy, name: str, value: int) -> None:
        self.cupy, self.name, self.value = cupy, name, value
        self.before: list[int] = []

    def __enter__(self) -> None:
        self.before.append(getattr(self.cupy, self.name))
        setattr(self.cupy, self.name, self.value)

    def __exit__(self, *failure: Any) -> None:
        setattr(self.cupy, self.name, self.before.pop())


class _OfDevice(_Current):
    """A stream that may be used on the device where it was wrapped."""

    def __init__(self, cupy: FakeCuPy, name: str, value: int) -> None:
        super().__init__(cupy, name, value)
        self.device = cupy.device

    def __enter__(self) -> None:
        if self.device != self.cupy.device:
            raise RuntimeError("the stream is of another device")
        super().__enter__()


@pytest.fixture(params=[13, 14])
def cupy(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[FakeCuPy]:
    fake = FakeCuPy(request.param)
    monkeypatch.setattr(importlib, "import_module", {"cupy": fake}.__getitem__)
    new_arrays._maker.cache_clear()
    yield fake
    new_arrays._maker.cache_clear()


def gpu(ordinal: int) -> Any:
    return SimpleNamespace(ordinal=ordinal)


def test_arrays_are_made_on_the_device_and_the_stream_given(cupy: FakeCuPy) -> None:
    for ordinal, stream in ((0, 0), (0, 77), (1, 0), (1, 77)):
        array, address = new_array((2, 3), np.float32, gpu=gpu(ordinal), stream=stream)
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        assert address == array.data.ptr
        assert cupy.made[-1] == (ordinal, stream)
    assert (cupy.device, cupy.stream) == (0, 0)


def test_a_stream_is_wrapped_once(cupy: FakeCuPy) -> None:
    for _ in range(5):
        new_array((1,), np.int64, gpu=gpu(0), stream=77)
    assert cupy.streams_made == 1


def test_streams_do_not_pile_up(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_arrays, "_MOST_STREAMS", 4)
    make = cupy_maker(cupy)
    for stream in range(10):
        make((1,), np.int64, gpu(0), stream)
    assert [stream for _, stream in cupy.made] == list(range(10))
    kept = next(
        cell.cell_contents
        for function in (make, *_called(make))
        for cell in function.__closure__ or ()
        if isinstance(cell.cell_contents, dict)
    )
    assert len(kept) <= 4


def _called(function: Any) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [cell for cell in cells if callable(cell) and hasattr(cell, "__closure__")]


def test_cupy_without_memory_is_a_device_without_memory(cupy: FakeCuPy) -> None:
    cupy.full = True
    for ordinal in (0, 1):
        with pytest.raises(OutOfDeviceMemoryError, match=f"device {ordinal}: Out of"):
            new_array((1,), np.int64, gpu=gpu(ordinal), stream=5)
    assert (cupy.device, cupy.stream) == (0, 0)


@pytest.mark.device
def test_without_cupy_arrays_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from hps_numba.kernels.cuda.gpu import Gpu

    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    new_arrays._maker.cache_clear()
    try:
        array, address = new_array((2, 3), np.float16, gpu=Gpu(0), stream=0)
    finally:
        new_arrays._maker.cache_clear()
    assert isinstance(array, DeviceArray)
    assert (array.address, array.shape, array.dtype) == (address, (2, 3), np.float16)
