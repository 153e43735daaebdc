"""Streams wait for each other where arrays pass between them, and nobody else waits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hps_numba.kernels.cuda.gpu import Gpu, PinnedBlock
from hps_numba.runtime.gpu import arrays
from hps_numba.runtime.gpu.arrays import order, protocol_stream, view
from hps_numba.runtime.gpu.device_array import DeviceArray
from tests.runtime.gpu.foreign import Described, uploaded
from tests.support import fakegpu

on_device = pytest.mark.device


@pytest.fixture
def stream(gpu: Gpu) -> Iterator[int]:
    stream = gpu.stream()
    yield stream
    gpu.wait(stream)
    gpu.drop_stream(stream)


def read_after_write(gpu: Gpu, seed: int, *, ordered: bool) -> int:
    """Write a number on one stream, read it on another, and return what was read."""
    fake = fakegpu.current()
    if fake is not None:
        fake.reseed(seed)
    writing, reading = gpu.stream(), gpu.stream()
    host = PinnedBlock(gpu, 16)
    source, target = host.array.view(np.int64)[:1], host.array.view(np.int64)[1:]
    source[0] = 7
    array = uploaded(gpu, [3])
    gpu.copy(array.address, host.address, 8, writing)
    described = array.__cuda_array_interface__ | {"stream": writing}
    found = view(Described(described), gpu=gpu, stream=reading, what="keys")
    if ordered:
        order(found, reading, gpu)
    gpu.copy(host.address + 8, found.address, 8, reading)
    gpu.wait(reading)
    got = int(target[0])
    gpu.wait(writing)
    gpu.drop_stream(writing)
    gpu.drop_stream(reading)
    return got


@on_device
def test_a_stream_that_reads_waits_for_the_one_that_writes(gpu: Gpu) -> None:
    assert {read_after_write(gpu, seed, ordered=True) for seed in range(8)} == {7}


@on_device
def test_without_an_order_old_bytes_are_read_now_and_then(gpu: Gpu) -> None:
    if fakegpu.current() is None:
        pytest.skip("a real device may be as fast as it likes")
    assert {read_after_write(gpu, seed, ordered=False) for seed in range(8)} == {3, 7}


@on_device
def test_order_takes_one_event_a_thread(gpu: Gpu, stream: int) -> None:
    if fakegpu.current() is None:
        pytest.skip("only the stand-in counts calls")
    found = view(
        Described(uploaded(gpu, [1]).__cuda_array_interface__ | {"stream": stream}),
        gpu=gpu,
        stream=0,
        what="keys",
    )
    order(found, 0, gpu)
    before = fakegpu.calls()
    for _ in range(10):
        order(found, 0, gpu)
    used = fakegpu.calls() - before
    assert (used["cuEventRecord"], used["cuStreamWaitEvent"]) == (10, 10)
    assert used["cuEventCreate"] == 0


@on_device
def test_nothing_is_ordered_that_is_in_order(gpu: Gpu, stream: int) -> None:
    array = uploaded(gpu, [1], stream)
    before = fakegpu.calls()["cuEventRecord"]
    order(view(array, gpu=gpu, stream=stream, what="keys"), stream, gpu)
    default = DeviceArray((1,), np.int64, gpu=gpu)
    found = view(default, gpu=gpu, stream=0, what="keys")
    assert found.stream == protocol_stream(0)
    order(found, 0, gpu)
    order(found, found.stream, gpu)
    assert fakegpu.calls()["cuEventRecord"] == before


def test_the_default_stream_is_the_one_that_the_driver_takes_for_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [protocol_stream(one) for one in (0, 1, 2, 77)] == [1, 1, 2, 77]
    monkeypatch.setattr(arrays, "_default_stream", arrays.THREAD_STREAM)
    assert [protocol_stream(one) for one in (0, 1, 2, 77)] == [2, 1, 2, 77]
