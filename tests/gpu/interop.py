"""Arrays to and from CuPy and PyTorch, as these really are: on a real GPU.

The stand-in for the driver cannot run either, so the test suite has nothing of this:
``make gpu`` calls :func:`check_cupy` and :func:`check_torch`, which raise of a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.gpu import Gpu, OutOfDeviceMemoryError
from hps_numba.runtime.gpu.arrays import (
    device_keys,
    device_output,
    is_on_device,
    order,
    protocol_stream,
    view,
)
from hps_numba.runtime.gpu.device_array import DeviceArray
from hps_numba.runtime.gpu.new_arrays import cupy_stream, new_array
from hps_numba.types import RowDtype, TableSpec

TABLE = TableSpec("m", "t", dim=4)
HALF = TableSpec("m", "half", dim=4, dtype=RowDtype.FLOAT16)
DTYPES = (np.float32, np.float16, np.int64, np.bool_)
# Enough to keep a GPU busy while the host goes on.
N_LONG, N_ROUNDS = 1 << 24, 64


def check_cupy(gpu: Gpu) -> int:
    """Check arrays of CuPy on a device; return how many checks there were."""
    import cupy

    checks = (
        _keys_of_cupy_are_where_cupy_says,
        _other_keys_of_cupy_are_refused,
        _an_output_of_cupy_is_where_cupy_says,
        _arrays_of_cupy_name_their_stream,
        _what_cupy_writes_is_waited_for,
        _new_arrays_are_of_cupy,
        _memory_of_cupy_is_used_again_on_its_stream,
        _cupy_without_memory_is_a_device_without_memory,
        _cupy_takes_our_arrays,
        _cupy_waits_for_our_arrays,
    )
    with cupy.cuda.Device(gpu.ordinal):
        return _check_all(gpu, checks)


def check_torch(gpu: Gpu) -> int:
    """Check tensors of PyTorch on a device; return how many checks there were."""
    import torch

    checks = (
        _keys_of_torch_are_where_torch_says,
        _other_keys_of_torch_are_refused,
        _an_output_of_torch_is_where_torch_says,
        _what_torch_writes_is_waited_for,
        _torch_takes_our_arrays,
        _torch_waits_for_our_arrays,
    )
    with torch.cuda.device(gpu.ordinal):
        return _check_all(gpu, checks)


def _check_all(gpu: Gpu, checks: Sequence[Callable[[Gpu], None]]) -> int:
    for check in checks:
        check(gpu)
    return len(checks)


def _written(gpu: Gpu, values: Any, stream: int = 0) -> DeviceArray:
    host = np.require(values, requirements="C")
    array = DeviceArray(host.shape, host.dtype, gpu=gpu, stream=stream)
    gpu.copy(array.address, host.ctypes.data, host.nbytes, stream)
    return array


def _copied(gpu: Gpu, address: int, like: Any, stream: int) -> Any:
    """Copy what lies at an address, after what ``stream`` was given."""
    host = np.empty_like(like)
    gpu.copy(host.ctypes.data, address, host.nbytes, stream)
    gpu.wait(stream)
    return host


def _keys_of_cupy_are_where_cupy_says(gpu: Gpu) -> None:
    import cupy

    for dtype in (np.int64, np.uint64):
        keys = cupy.arange(6, dtype=dtype).reshape(2, 3)
        assert is_on_device(keys)
        found = device_keys(keys, TABLE, stream=0, gpu=gpu)
        assert (found.address, found.shape) == (keys.data.ptr, (2, 3))
        assert np.array_equal(_copied(gpu, found.address, keys.get(), 0), keys.get())
    none = device_keys(cupy.empty(0, np.int64), TABLE, stream=0, gpu=gpu)
    assert none.size == 0
    part = cupy.arange(10)[4:]
    assert device_keys(part, TABLE, stream=0, gpu=gpu).address == part.data.ptr


def _other_keys_of_cupy_are_refused(gpu: Gpu) -> None:
    import cupy

    with pytest.raises(TypeError, match="int64 or uint64; got an array of dtype int32"):
        device_keys(cupy.arange(3, dtype=np.int32), TABLE, stream=0, gpu=gpu)
    for strided in (cupy.arange(6)[::2], cupy.arange(6).reshape(2, 3).T):
        with pytest.raises(ValueError, match="keys must be contiguous"):
            device_keys(strided, TABLE, stream=0, gpu=gpu)


def _an_output_of_cupy_is_where_cupy_says(gpu: Gpu) -> None:
    import cupy

    for spec, dtype in ((TABLE, np.float32), (HALF, np.float16), (HALF, np.float32)):
        out = cupy.empty((3, 4), dtype)
        found = device_output(out, (3,), spec, stream=0, gpu=gpu)
        assert (found.address, found.dtype) == (out.data.ptr, dtype)


def _arrays_of_cupy_name_their_stream(gpu: Gpu) -> None:
    import cupy

    keys = cupy.arange(3)
    default = view(keys, gpu=gpu, stream=0, what="keys").stream
    assert default in (None, protocol_stream(0))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert view(keys, gpu=gpu, stream=0, what="keys").stream == stream.ptr


def _what_cupy_writes_is_waited_for(gpu: Gpu) -> None:
    import cupy

    writing = cupy.cuda.Stream(non_blocking=True)
    reading = gpu.stream()
    with writing:
        busy, keys = cupy.ones(N_LONG, np.float32), cupy.zeros(4, np.int64)
        for _ in range(N_ROUNDS):
            busy *= 1.0
        keys += 7 * (busy[:4] == 1)
        found = device_keys(keys, TABLE, stream=reading, gpu=gpu)
    order(found, reading, gpu)
    assert (
        _copied(gpu, found.address, np.empty(4, np.int64), reading).tolist() == [7] * 4
    )
    writing.synchronize()
    gpu.drop_stream(reading)


def _new_arrays_are_of_cupy(gpu: Gpu) -> None:
    import cupy

    stream = gpu.stream()
    for dtype in DTYPES:
        for used in (0, stream):
            array, address = new_array((2, 3), dtype, gpu=gpu, stream=used)
            assert isinstance(array, cupy.ndarray)
            assert (array.shape, array.dtype) == ((2, 3), dtype)
            assert (array.data.ptr, array.device.id) == (address, gpu.ordinal)
            gpu.zero(address, array.nbytes, used)
            gpu.wait(used)
            assert not array.get().any()
    gpu.drop_stream(stream)


def _memory_of_cupy_is_used_again_on_its_stream(gpu: Gpu) -> None:
    stream = gpu.stream()
    seen = set()
    for _ in range(10):
        array, address = new_array((1 << 16,), np.float32, gpu=gpu, stream=stream)
        seen.add(address)
        del array
    assert len(seen) == 1
    # The memory is free, but only for what the same stream does next.
    for _ in range(10):
        array, elsewhere = new_array((1 << 16,), np.float32, gpu=gpu, stream=0)
        assert elsewhere not in seen
        del array
    _, address = new_array((1 << 16,), np.float32, gpu=gpu, stream=stream)
    assert address in seen
    gpu.drop_stream(stream)


def _cupy_without_memory_is_a_device_without_memory(gpu: Gpu) -> None:
    with pytest.raises(
        OutOfDeviceMemoryError, match=f"device {gpu.ordinal}: Out of memory"
    ):
        new_array((1 << 44,), np.float32, gpu=gpu, stream=0)
    with pytest.raises(OutOfDeviceMemoryError, match=f"device {gpu.ordinal} has no"):
        DeviceArray((1 << 44,), np.float32, gpu=gpu)


def _cupy_takes_our_arrays(gpu: Gpu) -> None:
    import cupy

    for dtype in DTYPES:
        want = np.arange(6).reshape(2, 3).astype(dtype)
        array = _written(gpu, want)
        for taken in (cupy.asarray(array), cupy.from_dlpack(array)):
            assert (taken.data.ptr, taken.dtype) == (array.address, dtype)
            assert np.array_equal(taken.get(), want)
    taken = cupy.from_dlpack(_written(gpu, np.arange(1000)))
    _written(gpu, np.zeros(1000, int))
    assert np.array_equal(taken.get(), np.arange(1000))


def _cupy_waits_for_our_arrays(gpu: Gpu) -> None:
    import cupy

    for take in (cupy.asarray, cupy.from_dlpack):
        writing = gpu.stream()
        array = _written(gpu, np.zeros(4, np.int64), writing)
        with cupy_stream(cupy, writing):
            busy, ours = cupy.ones(N_LONG, np.float32), cupy.asarray(array)
            for _ in range(N_ROUNDS):
                busy *= 1.0
            ours += 7 * (busy[:4] == 1)
        with cupy.cuda.Stream(non_blocking=True) as reading:
            taken = take(array) + 1
            reading.synchronize()
            assert taken.get(stream=reading).tolist() == [8] * 4
        gpu.wait(writing)
        del array, ours, busy
        gpu.drop_stream(writing)


def _keys_of_torch_are_where_torch_says(gpu: Gpu) -> None:
    import torch

    host = torch.arange(6).reshape(2, 3)
    assert not is_on_device(host)
    assert not is_on_device(host.pin_memory())
    keys = host.cuda()
    for _ in range(2):  # The second time the type is known.
        assert is_on_device(keys)
        found = device_keys(keys, TABLE, stream=0, gpu=gpu)
        assert (found.address, found.shape) == (keys.data_ptr(), (2, 3))
    assert np.array_equal(_copied(gpu, found.address, host.numpy(), 0), host.numpy())
    part = keys[1:]
    assert device_keys(part, TABLE, stream=0, gpu=gpu).address == part.data_ptr()
    assert device_keys(keys[:0], TABLE, stream=0, gpu=gpu).size == 0


def _other_keys_of_torch_are_refused(gpu: Gpu) -> None:
    import torch

    with pytest.raises(TypeError, match="int64 or uint64; got an array of dtype int32"):
        device_keys(torch.arange(3).int().cuda(), TABLE, stream=0, gpu=gpu)
    with pytest.raises(TypeError, match="table hps_et"):
        device_keys(torch.zeros(3).bfloat16().cuda(), TABLE, stream=0, gpu=gpu)
    keys = torch.arange(6, device="cuda")
    for strided in (keys[::2], keys.reshape(2, 3).T):
        with pytest.raises(ValueError, match="keys must be contiguous"):
            device_keys(strided, TABLE, stream=0, gpu=gpu)


def _an_output_of_torch_is_where_torch_says(gpu: Gpu) -> None:
    import torch

    for spec, dtype in ((TABLE, torch.float32), (HALF, torch.float16)):
        out = torch.empty((3, 4), dtype=dtype, device="cuda")
        found = device_output(out, (3,), spec, stream=0, gpu=gpu)
        assert found.address == out.data_ptr()
    wanting = torch.empty((3, 4), device="cuda", requires_grad=True)
    with pytest.raises(ValueError, match="out wants gradients"):
        device_output(wanting, (3,), TABLE, stream=0, gpu=gpu)
    free = wanting.detach()
    found = device_output(free, (3,), TABLE, stream=0, gpu=gpu)
    assert found.address == free.data_ptr()


def _what_torch_writes_is_waited_for(gpu: Gpu) -> None:
    import torch

    writing, reading = torch.cuda.Stream(), gpu.stream()
    with torch.cuda.stream(writing):
        busy, keys = torch.ones(N_LONG, device="cuda"), torch.zeros(4, device="cuda")
        for _ in range(N_ROUNDS):
            busy *= 1.0
        keys = (keys + 7 * busy[:4]).long()
        found = device_keys(keys, TABLE, stream=reading, gpu=gpu)
    order(found, reading, gpu)
    assert (
        _copied(gpu, found.address, np.empty(4, np.int64), reading).tolist() == [7] * 4
    )
    writing.synchronize()
    gpu.drop_stream(reading)


def _torch_takes_our_arrays(gpu: Gpu) -> None:
    import torch

    for dtype in DTYPES:
        want = np.arange(6).reshape(2, 3).astype(dtype)
        array = _written(gpu, want)
        taken = torch.from_dlpack(array)
        assert taken.data_ptr() == array.address
        assert np.array_equal(taken.cpu().numpy(), want)
        assert np.array_equal(torch.as_tensor(array, device="cuda").cpu().numpy(), want)
    taken = torch.from_dlpack(_written(gpu, np.arange(1000)))
    _written(gpu, np.zeros(1000, int))
    assert np.array_equal(taken.cpu().numpy(), np.arange(1000))


def _torch_waits_for_our_arrays(gpu: Gpu) -> None:
    import torch

    writing = gpu.stream()
    array = _written(gpu, np.zeros(4, np.int64), writing)
    with torch.cuda.stream(torch.cuda.ExternalStream(writing)):
        busy, ours = torch.ones(N_LONG, device="cuda"), torch.from_dlpack(array)
        for _ in range(N_ROUNDS):
            busy *= 1.0
        ours += 7 * busy[:4].long()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert (torch.from_dlpack(array) + 1).cpu().tolist() == [8] * 4
    gpu.wait(writing)
    del array, ours, busy
    gpu.drop_stream(writing)
