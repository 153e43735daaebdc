"""The array that a lookup returns without CuPy: owned, ordered, handed on."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver
from cuda.core.utils import StridedMemoryView

from hps_numba.errors import DeviceError
from hps_numba.kernels.cuda.cubins import CubinCache
from hps_numba.kernels.cuda.gpu import Gpu, OutOfDeviceMemoryError, PinnedBlock
from hps_numba.kernels.cuda.launch import checked
from hps_numba.runtime.gpu.arrays import is_on_device
from hps_numba.runtime.gpu.device_array import DeviceArray
from hps_numba.runtime.gpu.errors import device_errors
from tests.runtime.gpu.foreign import uploaded
from tests.support import fakegpu
from tests.support.fakegpu.device import FakeDevice

RELAXED = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
pytestmark = pytest.mark.device


@pytest.fixture
def stream(gpu: Gpu) -> Iterator[int]:
    stream = gpu.stream()
    yield stream
    gpu.wait(stream)
    gpu.drop_stream(stream)


@pytest.fixture
def fake() -> FakeDevice:
    fake = fakegpu.current()
    if fake is None:
        pytest.skip("only the stand-in shows what is allocated")
    return fake


VALUES = [
    np.arange(12, dtype=np.float32).reshape(3, 4) / 3,
    np.arange(6, dtype=np.float16).reshape(1, 2, 3),
    np.array([-(2**63), 2**63 - 1]),
    np.array([2**64 - 1], np.uint64),
    np.array([True, False, True]),
    np.zeros((0, 4), np.float32),
    np.array(5.0, np.float32),
]
each_kind = pytest.mark.parametrize(
    "values", VALUES, ids=lambda v: f"{v.dtype}{v.ndim}"
)


@each_kind
def test_what_is_written_comes_back(gpu: Gpu, values: Any, stream: int) -> None:
    array = uploaded(gpu, values, stream)
    got = array.copy_to_host()
    assert (got.dtype, got.shape) == (values.dtype, values.shape)
    assert np.array_equal(got, values)
    assert (array.size, array.nbytes, array.ndim) == (
        values.size,
        values.nbytes,
        values.ndim,
    )


@each_kind
def test_dlpack_hands_out_the_same_memory(gpu: Gpu, values: Any) -> None:
    array = uploaded(gpu, values)
    assert is_on_device(array)
    found = StridedMemoryView.from_dlpack(array, stream_ptr=1)
    if values.size:
        assert found.ptr == array.address
    assert (tuple(found.shape), found.dtype) == (values.shape, values.dtype)
    assert (found.device_id, found.readonly) == (gpu.ordinal, False)


@each_kind
def test_the_interface_hands_out_the_same_memory(gpu: Gpu, values: Any) -> None:
    array = uploaded(gpu, values)
    found = StridedMemoryView.from_cuda_array_interface(array, stream_ptr=1)
    assert (found.ptr, tuple(found.shape)) == (array.address, values.shape)
    assert found.dtype == values.dtype
    assert not found.readonly


def test_the_interface_names_the_stream(gpu: Gpu, stream: int) -> None:
    for used, named in ((0, 1), (stream, stream)):
        array = DeviceArray((2,), np.int64, gpu=gpu, stream=used)
        described = array.__cuda_array_interface__
        assert (described["stream"], described["version"]) == (named, 3)


def test_its_length_is_that_of_the_first_axis(gpu: Gpu) -> None:
    assert len(DeviceArray((3, 2), np.float32, gpu=gpu)) == 3
    with pytest.raises(TypeError, match="without axes"):
        len(DeviceArray((), np.float32, gpu=gpu))


def test_slices_are_in_the_same_memory(gpu: Gpu, stream: int) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    array = uploaded(gpu, values, stream)
    for items in (slice(1, 3), slice(None), slice(-1, None), slice(2, 2), slice(3, 1)):
        part = array[items]
        want = values[items]
        assert (part.shape, part.stream) == (want.shape, stream)
        assert np.array_equal(part.copy_to_host(), want)
    assert array[1:].address == array.address + values[0].nbytes
    assert np.array_equal(array[1:][1:].copy_to_host(), values[2:])


def test_a_slice_is_of_items_that_follow_each_other(gpu: Gpu) -> None:
    array = DeviceArray((4, 2), np.float32, gpu=gpu)
    with pytest.raises(IndexError, match="a step of 2"):
        array[::2]
    for one in (0, (0, 1), None):
        with pytest.raises(TypeError, match="cut by slices"):
            array[one]  # type: ignore[index]


def test_another_shape_is_in_the_same_memory(gpu: Gpu) -> None:
    values = np.arange(12)
    array = uploaded(gpu, values)
    other = array.reshape((2, 3, 2))
    assert other.address == array.address
    assert np.array_equal(other.copy_to_host(), values.reshape(2, 3, 2))
    with pytest.raises(ValueError, match=r"\(12,\) does not become \(5, 2\)"):
        array.reshape((5, 2))


def test_memory_stays_while_there_is_a_slice_of_it(
    gpu: Gpu, stream: int, fake: FakeDevice
) -> None:
    array = DeviceArray((8,), np.int64, gpu=gpu, stream=stream)
    address = array.address
    part = array[2:].reshape((3, 2))[1:]
    del array
    gc.collect()
    gpu.wait(stream)
    assert fake.find(address) == (address, 64)
    assert part.address == address + 32
    del part
    gc.collect()
    gpu.wait(stream)
    assert fake.find(address) is None


def test_numpy_does_not_take_it_by_the_way(gpu: Gpu) -> None:
    with pytest.raises(TypeError, match=r"on a device; copy_to_host\(\) brings it"):
        np.asarray(DeviceArray((2,), np.int64, gpu=gpu))


def test_it_says_what_it_is(gpu: Gpu) -> None:
    array = DeviceArray((3, 2), np.float16, gpu=gpu)
    assert repr(array) == (
        f"DeviceArray(shape=(3, 2), dtype=float16, device=0, "
        f"address={array.address:#x})"
    )


def test_a_copy_to_the_host_waits_for_what_writes_it(gpu: Gpu, stream: int) -> None:
    array = uploaded(gpu, [1, 2], stream)
    host = PinnedBlock(gpu, 16)
    host.array.view(np.int64)[:] = [3, 4]
    gpu.copy(array.address, host.address, 16, stream)
    assert array.copy_to_host().tolist() == [3, 4]


@pytest.mark.parametrize("seed", range(6))
def test_whoever_takes_it_by_dlpack_waits_for_what_writes_it(
    gpu: Gpu, fake: FakeDevice, seed: int
) -> None:
    fake.reseed(seed)
    writing, reading = gpu.stream(), gpu.stream()
    array = uploaded(gpu, [1], writing)
    host = PinnedBlock(gpu, 16)
    host.array.view(np.int64)[:] = [2, 0]
    gpu.copy(array.address, host.address, 8, writing)
    found = StridedMemoryView.from_dlpack(array, stream_ptr=reading)
    gpu.copy(host.address + 8, found.ptr, 8, reading)
    gpu.wait(reading)
    assert host.array.view(np.int64).tolist() == [2, 2]
    gpu.wait(writing)
    gpu.drop_stream(reading)
    gpu.drop_stream(writing)


def test_a_taker_who_sees_to_the_order_waits_for_nothing(
    gpu: Gpu, stream: int, fake: FakeDevice
) -> None:
    array = DeviceArray((2,), np.int64, gpu=gpu, stream=stream)
    before = fakegpu.calls()
    array.__dlpack__(stream=-1)
    array.__dlpack__(stream=stream)
    assert (fakegpu.calls() - before)["cuStreamWaitEvent"] == 0
    array.__dlpack__()
    assert (fakegpu.calls() - before)["cuStreamWaitEvent"] == 1


@pytest.mark.parametrize("asked", [{"copy": True}, {"dl_device": (1, 0)}])
def test_dlpack_makes_no_copies(gpu: Gpu, asked: dict[str, Any]) -> None:
    array = DeviceArray((2,), np.int64, gpu=gpu)
    with pytest.raises(BufferError, match=r"stays on device 0 .* copy_to_host"):
        array.__dlpack__(**asked)
    array.__dlpack__(copy=False, dl_device=(2, 0))


def test_both_forms_of_a_capsule_can_be_had(gpu: Gpu) -> None:
    array = DeviceArray((2,), np.int64, gpu=gpu)
    assert '"dltensor"' in repr(array.__dlpack__())
    assert '"dltensor_versioned"' in repr(array.__dlpack__(max_version=(1, 0)))


def test_memory_is_given_back_with_the_array(
    gpu: Gpu, stream: int, fake: FakeDevice
) -> None:
    array = DeviceArray((8,), np.int64, gpu=gpu, stream=stream)
    address = array.address
    gpu.wait(stream)
    assert fake.find(address) == (address, 64)
    del array
    gc.collect()
    gpu.wait(stream)
    assert fake.find(address) is None


def test_memory_stays_while_somebody_has_taken_it(
    gpu: Gpu, stream: int, fake: FakeDevice
) -> None:
    array = DeviceArray((8,), np.int64, gpu=gpu, stream=stream)
    address = array.address
    taken = StridedMemoryView.from_dlpack(array, stream_ptr=stream)
    del array
    gc.collect()
    gpu.wait(stream)
    assert fake.find(address) == (address, 64)
    del taken
    gc.collect()
    gpu.wait(stream)
    assert fake.find(address) is None


def test_memory_is_given_back_after_what_uses_it(gpu: Gpu, stream: int) -> None:
    host = PinnedBlock(gpu, 8)
    array = uploaded(gpu, [7], stream)
    gpu.copy(host.address, array.address, 8, stream)
    del array
    gc.collect()
    uploaded(gpu, [0], stream)
    gpu.wait(stream)
    assert host.array.view(np.int64).tolist() == [7]


def test_an_array_may_outlive_its_stream(gpu: Gpu, fake: FakeDevice) -> None:
    stream = gpu.stream()
    array = uploaded(gpu, [7], stream)
    address = array.address
    gpu.drop_stream(stream)
    del array
    gc.collect()
    assert fake.find(address) is None


def test_an_array_may_outlive_what_it_was_made_with(fake: FakeDevice) -> None:
    gpu = Gpu(0, cubins=CubinCache(None))
    array = uploaded(gpu, [7])
    address = array.address
    del gpu
    gc.collect()
    assert array.copy_to_host().tolist() == [7]
    del array
    gc.collect()
    fake.wait_for_all()
    assert fake.find(address) is None


def test_a_graph_does_not_give_memory_back(
    gpu: Gpu, stream: int, fake: FakeDevice
) -> None:
    array = uploaded(gpu, [7], stream)
    address = array.address
    captured(driver.cuStreamBeginCapture(stream, RELAXED))
    del array
    gc.collect()
    graph = captured(driver.cuStreamEndCapture(stream))
    replay = captured(driver.cuGraphInstantiate(graph, 0))
    for _ in range(2):
        captured(driver.cuGraphLaunch(replay, stream))
    gpu.wait(stream)
    assert fake.find(address) == (address, 8)
    DeviceArray((1,), np.int64, gpu=gpu)  # Takes care of what was left.
    gpu.wait(stream)
    assert fake.find(address) is None


def captured(result: tuple[Any, ...]) -> Any:
    return checked(result, "capture")


def test_a_device_that_has_failed_is_not_asked_for_more() -> None:
    """In a process of its own, as the device does not recover."""
    if fakegpu.current() is None:
        pytest.skip("a real device is better left whole")
    code = (
        "import os\n"
        "from tests.support import fakegpu; fakegpu.install()\n"
        "from hps_numba.kernels.cuda.gpu import Gpu\n"
        "from hps_numba.runtime.gpu.device_array import DeviceArray\n"
        "array = DeviceArray((2,), 'int64', gpu=Gpu(0))\n"
        "fakegpu.current().failure = ValueError('planted')\n"
        "del array\n"
        "print('still there', flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("still there\n", "")


def test_memory_is_kept_between_arrays(gpu: Gpu, fake: FakeDevice) -> None:
    DeviceArray((2,), np.int64, gpu=gpu)
    before = fakegpu.calls()["cuMemPoolCreate"]
    DeviceArray((2,), np.int64, gpu=gpu)
    assert fakegpu.calls()["cuMemPoolCreate"] == before


def test_too_little_memory_is_said(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from hps_numba.kernels.cuda import interchange

    refused = (interchange.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    monkeypatch.setattr(
        interchange.driver, "cuMemAllocFromPoolAsync", lambda *_: refused
    )
    with pytest.raises(OutOfDeviceMemoryError, match="device 0 has no 8,000 bytes"):
        DeviceArray((1000,), np.int64, gpu=gpu)
    with (
        pytest.raises(DeviceError, match="a lookup: device 0 has no 8,000 bytes"),
        device_errors("a lookup"),
    ):
        DeviceArray((1000,), np.int64, gpu=gpu)
