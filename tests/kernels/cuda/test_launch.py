"""Launches reach the device with the arguments, grid and stream that were given."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver
from cuda.core import Device
from numba import cuda

from hps_numba.kernels.cuda import launch, ptx
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.cubins import CubinCache
from hps_numba.kernels.cuda.launch import (
    CudaLauncher,
    DeviceUnavailableError,
    LaunchError,
)
from tests.support import fakegpu

pytestmark = pytest.mark.device


def store_arguments(out, word, half, signed, signed_half, real):
    ptx.store_u64(out, word)
    ptx.store_u64(out + np.uint64(8), np.uint64(half))
    ptx.store_u64(out + np.uint64(16), np.uint64(signed))
    ptx.store_u64(out + np.uint64(24), np.uint64(np.int64(signed_half)))
    ptx.store_u64(out + np.uint64(32), np.uint64(ptx.float32_to_bits(real)))


def store_place(out, columns):
    """Each block writes its number where only it belongs."""
    if cuda.threadIdx.x == 0:
        at = np.uint64(cuda.blockIdx.y) * np.uint64(columns) + np.uint64(
            cuda.blockIdx.x
        )
        number = np.uint32(cuda.blockIdx.y * 1000 + cuda.blockIdx.x)
        ptx.store_u32(out + at * np.uint64(4), np.uint32(number + cuda.blockDim.x))


def count(address):
    if cuda.threadIdx.x == 0:
        ptx.add_u32(address, np.uint32(1))


def nothing():
    pass


ARGUMENTS = KernelSpec("store_arguments", store_arguments, "UUuIif", block=32)
PLACE = KernelSpec("store_place", store_place, "Uu", block=64)
COUNT = KernelSpec("count", count, "U", block=32)
NOTHING = KernelSpec("nothing", nothing, "", block=32)


def synchronize() -> None:
    """Wait for the current device."""
    (status,) = driver.cuCtxSynchronize()
    assert not status


class Memory:
    """Device memory of a test, and copies that wait."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stream = device.create_stream()
        self._buffers: list[Any] = []

    def address(self, n_bytes: int) -> int:
        buffer = self._device.allocate(n_bytes, stream=self._stream)
        self._buffers.append(buffer)
        address = int(buffer.handle)
        (status,) = driver.cuMemsetD8(address, 0, n_bytes)
        assert not status
        synchronize()  # Other streams do not wait for the one that fills.
        return address

    def read(self, address: int, n: int, dtype: Any) -> Any:
        array = np.empty(n, dtype)
        (status,) = driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes)
        assert not status
        return array


@pytest.fixture
def launcher(tmp_path_factory: pytest.TempPathFactory) -> CudaLauncher:
    folder = tmp_path_factory.getbasetemp() / "cubins"
    return CudaLauncher(0, cubins=CubinCache(folder))


@pytest.fixture
def memory(launcher: CudaLauncher) -> Iterator[Memory]:
    launcher.device.set_current()
    yield Memory(launcher.device)
    synchronize()


@pytest.mark.parametrize(
    "args",
    [
        (2**64 - 1, 2**32 - 1, -(2**63), -(2**31), -1.5),
        (2**63, 2**31, 2**63 - 1, 2**31 - 1, 0.1),
        (0, 0, 0, 0, 0.0),
        (1, 2, -3, -4, float("inf")),
        (np.uint64(5), np.uint32(6), np.int64(-7), np.int32(-8), np.float32(9.25)),
        (True, np.int8(3), np.uint8(4), False, 5),
    ],
)
def test_each_argument_arrives_in_its_parameters_type(
    launcher: CudaLauncher, memory: Memory, args: tuple[Any, ...]
) -> None:
    out = memory.address(40)
    launcher.launch(ARGUMENTS, (1, 1), (out, *args))
    word, half, signed, signed_half, real = memory.read(out, 5, np.uint64)
    assert (word, half) == (int(args[0]), int(args[1]))
    assert np.int64(signed) == int(args[2])
    assert np.int64(signed_half) == int(args[3])
    assert np.uint32(real) == np.array([args[4]], np.float32).view(np.uint32)[0]


@pytest.mark.parametrize(
    "args",
    [
        (2**64, 0, 0, 0, 0.0),
        (-1, 0, 0, 0, 0.0),
        (0, 2**32, 0, 0, 0.0),
        (0, -1, 0, 0, 0.0),
        (0, 0, 2**63, 0, 0.0),
        (0, 0, 0, 2**31, 0.0),
        (0, 0, 0, 0, 1e300),
        (0.5, 0, 0, 0, 0.0),
        (0, 1.0, 0, 0, 0.0),
        (0, 0, 0, 0, "1"),
        (0, 0, 0, 0),
        (0, 0, 0, 0, 0.0, 0),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_before_the_launch(
    launcher: CudaLauncher, memory: Memory, args: tuple[Any, ...]
) -> None:
    out = memory.address(40)
    with pytest.raises(ValueError, match=r"kernel store_arguments: arguments .*UUuIif"):
        launcher.launch(ARGUMENTS, (1, 1), (out, *args))
    assert not memory.read(out, 40, np.uint8).any()


@pytest.mark.parametrize("grid", [(1, 1), (7, 1), (3, 5)])
def test_every_block_of_the_grid_runs_with_the_specs_threads(
    launcher: CudaLauncher, memory: Memory, grid: tuple[int, int]
) -> None:
    n = grid[0] * grid[1]
    out = memory.address(4 * n)
    launcher.launch(PLACE, grid, (out, grid[0]))
    wanted = [1000 * y + x + 64 for y in range(grid[1]) for x in range(grid[0])]
    assert memory.read(out, n, np.uint32).tolist() == wanted


@pytest.mark.parametrize("grid", [(0, 1), (1, 0), (0, 0)])
def test_a_grid_of_no_blocks_launches_nothing(
    launcher: CudaLauncher, memory: Memory, grid: tuple[int, int]
) -> None:
    out = memory.address(4)
    launcher.launch(COUNT, grid, (out,))
    assert memory.read(out, 1, np.uint32).tolist() == [0]


def test_a_kernel_without_parameters_runs(
    launcher: CudaLauncher, memory: Memory
) -> None:
    launcher.launch(NOTHING, (1, 1), ())
    synchronize()


class ForeignStream:
    """What other libraries' streams are: a handle behind a protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@pytest.mark.parametrize(
    "as_given",
    [
        lambda stream: stream,
        lambda stream: int(stream.handle),
        lambda stream: ForeignStream(int(stream.handle)),
    ],
)
def test_a_stream_may_be_of_any_library_or_a_handle(
    launcher: CudaLauncher, memory: Memory, as_given: Any
) -> None:
    stream = launcher.device.create_stream()
    out = memory.address(4)
    event = launcher.device.create_event()
    launcher.launch(COUNT, (3, 1), (out,), as_given(stream))
    stream.record(event)
    event.sync()
    assert memory.read(out, 1, np.uint32).tolist() == [3]


def test_the_default_stream_waits_as_the_legacy_stream_does(
    launcher: CudaLauncher, memory: Memory
) -> None:
    out = memory.address(4)
    for stream in (None, 0, 1):
        launcher.launch(COUNT, (1, 1), (out,), stream)
    # The copy is on the legacy stream: after all three.
    assert memory.read(out, 1, np.uint32).tolist() == [3]


def test_a_launch_does_not_wait(launcher: CudaLauncher, memory: Memory) -> None:
    """Neither for the device nor for other streams: what it does, it queues."""
    fake = fakegpu.current()
    if fake is None:
        pytest.skip("a real device may have run before anybody looks")
    launcher.warm_up([COUNT])
    stream, out = launcher.device.create_stream(), memory.address(4)
    before = len(fake.launches)
    launcher.launch(COUNT, (1, 1), (out,), stream)
    assert len(fake.launches) == before
    stream.sync()
    assert len(fake.launches) == before + 1


def test_a_launch_makes_one_call_to_the_driver_and_no_other(
    launcher: CudaLauncher, memory: Memory
) -> None:
    """It allocates nothing, loads nothing, and does not look at the device."""
    if fakegpu.current() is None:
        pytest.skip("only the stand-in counts calls")
    stream, out = launcher.device.create_stream(), memory.address(40)
    launcher.warm_up([COUNT, ARGUMENTS])
    launcher.launch(COUNT, (1, 1), (out,), stream)
    before = fakegpu.calls()
    for _ in range(5):
        launcher.launch(COUNT, (1, 1), (out,), stream)
        launcher.launch(ARGUMENTS, (1, 1), (out, 1, 2, 3, 4, 5.0), int(stream.handle))
    assert fakegpu.calls() - before == {"cuLaunchKernel": 10}


def test_streams_are_ordered_by_events_only(
    launcher: CudaLauncher, memory: Memory
) -> None:
    """The second stream's kernel overwrites what the first one's wrote."""
    first, second = (launcher.device.create_stream() for _ in range(2))
    out = memory.address(40)
    for value in range(1, 9):
        launcher.launch(ARGUMENTS, (1, 1), (out, 0, 0, 0, 0, 0.0), first)
        second.wait(first.record())
        launcher.launch(ARGUMENTS, (1, 1), (out, value, 0, 0, 0, 0.0), second)
        second.sync()
        assert memory.read(out, 1, np.uint64).tolist() == [value]


def test_a_captured_graph_replays_the_launch(
    launcher: CudaLauncher, memory: Memory
) -> None:
    out, stream = memory.address(4), launcher.device.create_stream()
    launcher.warm_up([COUNT])
    builder = launcher.device.create_graph_builder().begin_building()
    launcher.launch(COUNT, (2, 1), (out,), builder.stream)
    launcher.launch(COUNT, (3, 1), (out,), builder)
    graph = builder.end_building().complete()
    assert memory.read(out, 1, np.uint32).tolist() == [0]
    for replays in (1, 2, 3):
        graph.launch(stream)
        stream.sync()
        assert memory.read(out, 1, np.uint32).tolist() == [5 * replays]


def test_threads_launch_at_once(launcher: CudaLauncher, memory: Memory) -> None:
    """Also the first time, and from threads that have never seen the device."""
    out = [memory.address(48) for _ in range(4)]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            launcher.launch(COUNT, (1, 1), (out[i],))
            stream = launcher.device.create_stream()
            for n in range(20):
                args = (out[i] + 8, i, n, -i, -n, 0.0)
                launcher.launch(ARGUMENTS, (1, 1), args, stream)
            stream.sync()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for i in range(4):
        words = memory.read(out[i], 4, np.uint64)
        assert words.tolist() == [1, i, 19, 2**64 - i if i else 0]


def test_a_thread_without_a_device_gets_this_one(
    launcher: CudaLauncher, memory: Memory
) -> None:
    """Even where the stream says it all: not every driver looks there."""
    stream, seen = launcher.device.create_stream(), []

    def work() -> None:
        before = int(driver.cuCtxGetCurrent()[1])
        launcher.launch(NOTHING, (1, 1), (), stream)
        seen.append((before, int(driver.cuCtxGetDevice()[1])))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, 0)]


def test_the_current_device_of_a_thread_stays(launcher: CudaLauncher) -> None:
    if len(Device.get_all_devices()) < 2:
        pytest.skip("one device cannot be mixed up")
    other = Device(1)
    other.set_current()
    second = CudaLauncher(1)
    for one in (launcher, second, CudaLauncher(0)):
        one.launch(NOTHING, (1, 1), ())
        assert Device().device_id == 1
    launcher.device.set_current()
    second.launch(NOTHING, (1, 1), ())
    assert Device().device_id == 0


def test_warming_up_loads_all_and_reports_progress(
    launcher: CudaLauncher, memory: Memory
) -> None:
    seen: list[tuple[int, int]] = []
    launcher.warm_up(
        iter([COUNT, PLACE, COUNT]), lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    launcher.warm_up([])


def test_a_kernel_is_loaded_once(launcher: CudaLauncher, memory: Memory) -> None:
    loads = fakegpu.calls()["cuLibraryLoadData"]
    for _ in range(3):
        launcher.warm_up([COUNT])
        launcher.launch(COUNT, (1, 1), (memory.address(4),))
    assert (
        fakegpu.current() is None or fakegpu.calls()["cuLibraryLoadData"] == loads + 1
    )


def test_two_kernels_of_one_name_are_refused(launcher: CudaLauncher) -> None:
    launcher.warm_up([NOTHING])
    equal = KernelSpec("nothing", nothing, "", block=32)
    launcher.launch(equal, (1, 1), ())
    with pytest.raises(ValueError, match="two different kernels are named nothing"):
        launcher.launch(KernelSpec("nothing", nothing, "", block=64), (1, 1), ())


def test_a_launch_that_the_driver_refuses_says_which(launcher: CudaLauncher) -> None:
    with pytest.raises(LaunchError, match=r"kernel nothing, grid \(1, 65536\): "):
        launcher.launch(NOTHING, (1, 65536), ())
    launcher.launch(NOTHING, (1, 1), ())


def test_a_cubin_that_the_driver_refuses_names_the_kernel(
    monkeypatch: pytest.MonkeyPatch, memory: Memory
) -> None:
    cubins = CubinCache(None)
    broken = dataclasses.replace(cubins.get(NOTHING, (9, 0)), code=b"no cubin" * 8)
    monkeypatch.setattr(cubins, "get", lambda spec, cc: broken)
    launcher = CudaLauncher(0, cubins=cubins)
    with pytest.raises(LaunchError, match="kernel nothing was not loaded: "):
        launcher.warm_up([NOTHING])


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceUnavailableError, match="no CUDA device 99: the driver"):
        CudaLauncher(99)
    with pytest.raises(DeviceUnavailableError, match="no CUDA device -1"):
        CudaLauncher(-1)


def test_a_device_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken:
        def set_current(self) -> None:
            raise RuntimeError("CUDA_ERROR_DEVICE_UNAVAILABLE")

    monkeypatch.setattr(launch, "_open", lambda ordinal: Taken())
    message = "CUDA device 0 cannot be used: CUDA_ERROR_DEVICE_UNAVAILABLE"
    with pytest.raises(DeviceUnavailableError, match=message):
        CudaLauncher(0)


def test_a_failed_device_is_reported_by_the_next_launch(tmp_path: Path) -> None:
    """In a process of its own: the device does not recover."""
    code = (
        "import os\n"
        "from tests.support import fakegpu\n"
        "from tests.support.fakegpu import shim\n"
        "if not shim.real_driver(): fakegpu.install()\n"
        "from tests.kernels.cuda.test_launch import *\n"
        f"launcher = CudaLauncher(0, cubins=CubinCache(Path({str(tmp_path)!r})))\n"
        "launcher.device.set_current()\n"
        "stream = launcher.device.create_stream()\n"
        "launcher.launch(COUNT, (1, 1), (4096,), stream)\n"
        "try:\n"
        "    stream.sync()\n"
        "except Exception as exc:\n"
        "    print(type(exc).__name__)\n"
        "try:\n"
        "    launcher.launch(NOTHING, (1, 1), (), stream)\n"
        "except LaunchError as exc:\n"
        "    print(exc, flush=True)\n"
        "os._exit(0)\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert lines[0] == "CUDAError"
    assert lines[1].startswith("kernel nothing, grid (1, 1): ")
