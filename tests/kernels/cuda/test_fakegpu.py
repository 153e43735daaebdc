"""The stand-in for the driver is as unforgiving as a device, and as free."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver
from cuda.core import Device
from numba import cuda

from hps_numba.kernels.cuda import ptx
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.cubins import CubinCache
from hps_numba.kernels.cuda.launch import CudaLauncher, DeviceUnavailableError
from tests.support import fakegpu
from tests.support.fakegpu import shim
from tests.support.fakegpu.device import FRESH, FakeDevice

on_device = pytest.mark.device
NONBLOCKING, BLOCKING = 1, 0


def add(address, amount):
    if cuda.threadIdx.x == 0:
        ptx.store_u32(address, np.uint32(ptx.load_u32(address) + np.uint32(amount)))


def double(address):
    if cuda.threadIdx.x == 0:
        ptx.store_u32(address, np.uint32(ptx.load_u32(address) * np.uint32(2)))


ADD = KernelSpec("add", add, "Uu", block=32)
DOUBLE = KernelSpec("double", double, "U", block=32)


def ok(result: tuple[Any, ...]) -> Any:
    """Return what a driver call gives; it has to succeed."""
    status, *values = result
    assert not status, status
    return values[0] if values else None


def new(n_bytes: int) -> int:
    """Return the address of new device memory."""
    return int(ok(driver.cuMemAlloc(n_bytes)))


def status_of(result: tuple[Any, ...]) -> str:
    return str(result[0].name)


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    fake = fakegpu.current()
    if fake is None:
        pytest.skip("what a real device does is its own affair")
    Device(0).set_current()
    fake.reseed(0)
    yield fake
    fake.wait_for_all()
    fake.eager = False


@pytest.fixture
def launcher(device: FakeDevice) -> CudaLauncher:
    return CudaLauncher(0, cubins=CubinCache(None))


def words(*values: int) -> Any:
    return np.array(values, np.uint32)


def read(address: int, n: int = 1) -> list[int]:
    ok(driver.cuCtxSynchronize())
    array = np.empty(n, np.uint32)
    ok(driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))
    return array.tolist()


@on_device
def test_new_memory_holds_what_nobody_expects(device: FakeDevice) -> None:
    address = new(8)
    assert read(address, 2) == [int.from_bytes([FRESH] * 4, "little")] * 2
    ok(driver.cuMemFree(address))


@on_device
def test_nothing_runs_before_somebody_waits(device: FakeDevice) -> None:
    pinned, target = ok(driver.cuMemAllocHost(4)), new(4)
    stream = ok(driver.cuStreamCreate(NONBLOCKING))
    host = (ctypes.c_uint32).from_address(pinned)
    host.value = 1
    ok(driver.cuMemcpyHtoDAsync(target, pinned, 4, stream))
    # The copy has not read it yet, as it may not have on a device.
    host.value = 2
    ok(driver.cuStreamSynchronize(stream))
    assert read(target) == [2]


@on_device
def test_ordinary_memory_is_read_when_the_copy_is_queued(device: FakeDevice) -> None:
    target = new(4)
    stream = ok(driver.cuStreamCreate(NONBLOCKING))
    source = words(1)
    ok(driver.cuMemcpyHtoDAsync(target, source.ctypes.data, 4, stream))
    source[0] = 2
    ok(driver.cuStreamSynchronize(stream))
    assert read(target) == [1]


@on_device
def test_a_copy_into_ordinary_memory_waits(device: FakeDevice) -> None:
    source, stream = new(4), ok(driver.cuStreamCreate(NONBLOCKING))
    ok(driver.cuMemsetD32Async(source, 7, 1, stream))
    target = words(0)
    ok(driver.cuMemcpyDtoHAsync(target.ctypes.data, source, 4, stream))
    assert target[0] == 7


@on_device
def test_pinned_memory_keeps_old_bytes_until_the_copy_ran(device: FakeDevice) -> None:
    source, pinned = new(4), ok(driver.cuMemAllocHost(4))
    stream = ok(driver.cuStreamCreate(NONBLOCKING))
    host = (ctypes.c_uint32).from_address(pinned)
    host.value = 1
    ok(driver.cuMemsetD32Async(source, 9, 1, stream))
    ok(driver.cuMemcpyDtoHAsync(pinned, source, 4, stream))
    assert host.value == 1
    ok(driver.cuStreamSynchronize(stream))
    assert host.value == 9


@on_device
def test_a_stream_keeps_its_order_and_two_do_not(
    device: FakeDevice, launcher: CudaLauncher
) -> None:
    """(3 + 1) * 2 in order; 3 * 2 + 1 too, where nobody asks for an order."""
    address = new(4)
    launcher.warm_up([ADD, DOUBLE])

    def outcome(seed: int, second: Any, wait: bool) -> int:
        device.reseed(seed)
        ok(driver.cuMemsetD32(address, 3, 1))
        ok(driver.cuCtxSynchronize())
        first = streams[0]
        launcher.launch(ADD, (1, 1), (address, 1), first)
        if wait:
            second.wait(first.record())
        launcher.launch(DOUBLE, (1, 1), (address,), second)
        return read(address)[0]

    streams = [Device().create_stream() for _ in range(2)]
    seeds = range(12)
    assert {outcome(seed, streams[0], wait=False) for seed in seeds} == {8}
    assert {outcome(seed, streams[1], wait=True) for seed in seeds} == {8}
    assert {outcome(seed, streams[1], wait=False) for seed in seeds} >= {7, 8}
    again = [outcome(seed, streams[1], wait=False) for seed in seeds]
    assert again == [outcome(seed, streams[1], wait=False) for seed in seeds]


@on_device
def test_launches_of_two_streams_run_beside_each_other(
    device: FakeDevice, launcher: CudaLauncher
) -> None:
    """An update is lost when both have loaded before either stores."""
    address = new(4)
    streams = [Device().create_stream() for _ in range(2)]
    launcher.warm_up([ADD])
    device.preempt = 0.5
    totals = set()
    for seed in range(40):
        device.reseed(seed)
        ok(driver.cuMemsetD32(address, 0, 1))
        ok(driver.cuCtxSynchronize())
        launcher.launch(ADD, (1, 1), (address, 1), streams[0])
        launcher.launch(ADD, (1, 1), (address, 16), streams[1])
        totals.add(read(address)[0])
    device.preempt = 0.0
    assert totals - {17}


@on_device
def test_the_legacy_stream_orders_blocking_streams_only(device: FakeDevice) -> None:
    address = new(4)

    def outcomes(flags: int) -> set[int]:
        stream = ok(driver.cuStreamCreate(flags))
        found = set()
        for seed in range(16):
            device.reseed(seed)
            ok(driver.cuMemsetD32Async(address, 1, 1, stream))
            ok(driver.cuMemsetD32Async(address, 2, 1, 0))
            ok(driver.cuMemsetD32Async(address, 3, 1, stream))
            found.add(read(address)[0])
        return found

    assert outcomes(BLOCKING) == {3}
    assert outcomes(NONBLOCKING) == {2, 3}


@on_device
def test_memory_is_freed_in_the_streams_order(device: FakeDevice) -> None:
    stream = ok(driver.cuStreamCreate(NONBLOCKING))
    address = ok(driver.cuMemAllocAsync(4, stream))
    ok(driver.cuMemsetD32Async(address, 5, 1, stream))
    ok(driver.cuMemFreeAsync(address, stream))
    assert device.find(int(address)) is not None
    ok(driver.cuStreamSynchronize(stream))
    assert device.find(int(address)) is None


@on_device
def test_asking_lets_time_pass(device: FakeDevice) -> None:
    address, stream = new(4), ok(driver.cuStreamCreate(NONBLOCKING))
    event = ok(driver.cuEventCreate(0))
    assert status_of(driver.cuEventQuery(event)) == "CUDA_SUCCESS"
    ok(driver.cuMemsetD32Async(address, 5, 1, stream))
    ok(driver.cuEventRecord(event, stream))
    seen = []
    while not seen or seen[-1] == "CUDA_ERROR_NOT_READY":
        seen.append(status_of(driver.cuEventQuery(event)))
        assert len(seen) < 10
    assert seen == ["CUDA_ERROR_NOT_READY"] * 2 + ["CUDA_SUCCESS"]
    assert status_of(driver.cuStreamQuery(stream)) == "CUDA_SUCCESS"


@on_device
def test_eager_runs_at_once(device: FakeDevice) -> None:
    device.eager = True
    pinned, stream = (
        ok(driver.cuMemAllocHost(4)),
        ok(driver.cuStreamCreate(NONBLOCKING)),
    )
    ok(driver.cuMemsetD32Async(pinned, 6, 1, stream))
    assert (ctypes.c_uint32).from_address(pinned).value == 6


@on_device
def test_a_capture_may_not_wait_or_allocate(
    device: FakeDevice, launcher: CudaLauncher
) -> None:
    stream = ok(driver.cuStreamCreate(NONBLOCKING))
    launcher.warm_up([ADD])
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    ok(driver.cuStreamBeginCapture(stream, mode))
    refused = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert status_of(driver.cuStreamSynchronize(stream)) == refused
    assert status_of(driver.cuStreamQuery(stream)) == refused
    assert status_of(driver.cuMemAlloc(4)) == refused
    assert status_of(driver.cuStreamBeginCapture(stream, mode)) == refused
    ok(driver.cuStreamEndCapture(stream))
    assert status_of(driver.cuStreamBeginCapture(0, mode)) == refused
    ok(driver.cuMemFree(new(4)))


@on_device
def test_a_graph_takes_in_the_streams_that_fork_from_it(
    device: FakeDevice, launcher: CudaLauncher
) -> None:
    """And lets them go where they join; arguments are those of the capture."""
    address = new(4)
    ok(driver.cuMemsetD32(address, 1, 1))
    first, second = (Device().create_stream() for _ in range(2))
    launcher.warm_up([ADD, DOUBLE])
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    ok(driver.cuStreamBeginCapture(first.handle, mode))
    launcher.launch(ADD, (1, 1), (address, 2), first)
    fork, join = (ok(driver.cuEventCreate(0)) for _ in range(2))
    ok(driver.cuEventRecord(fork, first.handle))
    ok(driver.cuStreamWaitEvent(second.handle, fork, 0))
    launcher.launch(DOUBLE, (1, 1), (address,), second)
    ok(driver.cuEventRecord(join, second.handle))
    ok(driver.cuStreamWaitEvent(first.handle, join, 0))
    graph = ok(driver.cuStreamEndCapture(first.handle))
    ready = ok(driver.cuGraphInstantiate(graph, 0))
    assert read(address) == [1]
    ok(driver.cuGraphLaunch(ready, first.handle))
    assert read(address) == [(1 + 2) * 2]
    ok(driver.cuGraphLaunch(ready, second.handle))
    assert read(address) == [(6 + 2) * 2]


@on_device
def test_a_launch_of_more_threads_than_compiled_for_is_refused(
    device: FakeDevice, launcher: CudaLauncher
) -> None:
    launcher.warm_up([ADD])
    handle = launcher._loaded["add"].handle
    result = driver.cuLaunchKernel(handle, 1, 1, 1, 64, 1, 1, 0, 0, 0, 0)
    assert status_of(result) == "CUDA_ERROR_INVALID_VALUE"


@on_device
def test_handles_that_are_none_are_refused(device: FakeDevice) -> None:
    for result in (
        driver.cuStreamSynchronize(12345),
        driver.cuEventRecord(12345, 0),
        driver.cuLaunchKernel(12345, 1, 1, 1, 32, 1, 1, 0, 0, 0, 0),
    ):
        assert status_of(result) == "CUDA_ERROR_INVALID_HANDLE"
    assert status_of(driver.cuMemFree(12345)) == "CUDA_ERROR_INVALID_VALUE"


@on_device
def test_what_is_not_there_says_so(
    device: FakeDevice, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status_of(driver.cuTexObjectDestroy(0)) == "CUDA_ERROR_NOT_SUPPORTED"
    assert "fakegpu: cuTexObjectDestroy is not there" in capfd.readouterr().err


FAILURES = {
    "launcher.launch(ADD, (1, 1), (base + 8, 1))": "ILLEGAL_ADDRESS",
    "launcher.launch(ADD, (1, 1), (base + 1, 1))": "MISALIGNED_ADDRESS",
    "ok(driver.cuMemcpyDtoDAsync(base + 4, base, 8, 0))": "ILLEGAL_ADDRESS",
    "ok(driver.cuMemFreeAsync(base, 0)); launcher.launch(ADD, (1, 1), (base, 1))": (
        "ILLEGAL_ADDRESS"
    ),
}


@pytest.mark.parametrize("program", FAILURES)
def test_a_failure_stays(program: str) -> None:
    """In a process of its own, as the device does not recover."""
    if shim.real_driver():
        pytest.skip("what a real device does is its own affair")
    code = (
        "import os\n"
        "from tests.support import fakegpu; fakegpu.install()\n"
        "from tests.kernels.cuda.test_fakegpu import *\n"
        "launcher = CudaLauncher(0, cubins=CubinCache(None))\n"
        "launcher.device.set_current()\n"
        "base = new(8)\n"
        f"{program}\n"
        "print(status_of(driver.cuCtxSynchronize()))\n"
        "print(status_of(driver.cuStreamQuery(0)))\n"
        "print(status_of(driver.cuMemsetD32Async(base, 0, 1, 0)))\n"
        "print(fakegpu.current().failure, flush=True)\n"
        "os._exit(0)\n"
    )
    *statuses, reason = run_python(code).stdout.splitlines()
    assert statuses == [f"CUDA_ERROR_{FAILURES[program]}"] * 3
    assert "base" not in reason
    assert reason


def run_python(code: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_without_a_driver_a_launcher_says_so() -> None:
    if shim.real_driver():
        pytest.skip("this machine has a driver")
    with pytest.raises(DeviceUnavailableError, match="no CUDA driver on this machine"):
        CudaLauncher(0)


def test_the_stand_in_stays_away_from_a_real_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shim, "_loaded", [])
    monkeypatch.setattr(shim, "real_driver", lambda: True)
    with pytest.raises(RuntimeError, match="has a CUDA driver"):
        shim.load()


def test_the_stand_in_says_when_it_comes_too_late() -> None:
    """This process has imported what looks for the driver."""
    if shim.real_driver():
        pytest.skip("this machine has a driver")
    with pytest.raises(RuntimeError, match="too late"):
        fakegpu.install()
    assert fakegpu.current() is None
