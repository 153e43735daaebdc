"""Schedules of the CPU executor: seeded, mixed, in stream order, and truly parallel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    add_u32,
    fence,
    load_row,
    load_u32,
    store_row,
    store_u32,
    swap_u64,
)
from tests.kernels.cuda.word_kernels import ADDRESS_AND_NUMBER
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, KernelError, Launch

u32, u64 = np.uint32, np.uint64
load_16, store_16 = load_row[16], store_row[16]


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory()


def write_down(log, mark):
    """Append the mark and the thread to a log, whose first word counts the entries."""
    place = add_u32(log, u32(1))
    thread = u32(u32(cuda.blockIdx.x) * u32(cuda.blockDim.x) + u32(cuda.threadIdx.x))
    store_u32(log + u64(4) + u64(place) * u64(4), u32(mark + thread))


WRITE_DOWN = cpuexec.compile_kernel(write_down, ADDRESS_AND_NUMBER)


def order_of(seed: int, schedule: str, preempt: float = 0.2) -> tuple[int, bytes]:
    memory = DeviceMemory()
    log = memory.array(257, np.uint32)
    launch = Launch(WRITE_DOWN, 4, 64, (memory.address(log), 0))
    options = {"seed": seed, "schedule": schedule, "preempt": preempt}
    steps = cpuexec.run(launch, memory, **options)
    assert sorted(log[1:]) == list(range(256))
    return steps, log.tobytes()


@pytest.mark.parametrize("schedule", ["uniform", "priority"])
def test_a_seed_decides_the_interleaving(schedule):
    orders = [order_of(seed, schedule) for seed in range(20)]
    assert orders == [order_of(seed, schedule) for seed in range(20)]
    assert len(set(orders)) == 20


def test_close_seeds_are_as_different_as_distant_ones():
    seeds = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    assert len({order_of(seed, "uniform") for seed in seeds}) == len(seeds)


def test_lanes_run_in_order_without_preemption():
    _, order = order_of(7, "ordered", preempt=0.0)
    log = np.frombuffer(order, np.uint32)[1:]
    np.testing.assert_array_equal(log.reshape(8, 32) % 32, [np.arange(32)] * 8)


def test_priorities_hold_a_warp_up_for_longer_than_chance_does():
    def longest_run_of_a_warp(schedule: str, seed: int) -> int:
        log = np.frombuffer(order_of(seed, schedule)[1], np.uint32)[1:] // 32
        ends = np.flatnonzero(np.diff(log)) + 1
        return int(np.diff([0, *ends, len(log)]).max())

    longest = {
        schedule: np.median([longest_run_of_a_warp(schedule, i) for i in range(30)])
        for schedule in ("uniform", "priority")
    }
    assert longest["priority"] > 4 * longest["uniform"]


@pytest.mark.parametrize("resident", [1, 2, 64])
def test_every_block_runs_once_however_many_are_resident(memory, resident):
    log = memory.array(1 + 50 * 3, np.uint32)
    launch = Launch(WRITE_DOWN, 50, 3, (memory.address(log), 0))
    cpuexec.run(launch, memory, resident=resident)
    assert sorted(log[1:]) == list(range(150))


def write_place(out, width):
    block = u32(u32(cuda.blockIdx.y) * u32(cuda.gridDim.x) + u32(cuda.blockIdx.x))
    threads = u32(u32(cuda.blockDim.x) * u32(cuda.blockDim.y))
    thread = u32(u32(cuda.threadIdx.y) * u32(cuda.blockDim.x) + u32(cuda.threadIdx.x))
    place = u32(block * threads + thread)
    x = u32(u32(cuda.blockIdx.x) * u32(cuda.blockDim.x) + u32(cuda.threadIdx.x))
    y = u32(u32(cuda.blockIdx.y) * u32(cuda.blockDim.y) + u32(cuda.threadIdx.y))
    store_u32(out + u64(place) * u64(4), u32(y * width + x))


def test_grids_and_blocks_have_two_dimensions(memory):
    kernel = cpuexec.compile_kernel(write_place, ADDRESS_AND_NUMBER)
    out = memory.array((2, 3, 5, 4), np.uint32)
    cpuexec.run(Launch(kernel, (3, 2), (4, 5), (memory.address(out), 12)), memory)
    expected = np.arange(120).reshape(2, 5, 3, 4).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(out, expected)


def marks_of(log: np.ndarray) -> np.ndarray:
    return log[1:] // 1000


@pytest.mark.parametrize("schedule", ["uniform", "priority", "ordered"])
def test_launches_run_beside_each_other(memory, schedule):
    log = memory.array(1 + 2 * 128, np.uint32)
    launches = [
        Launch(WRITE_DOWN, 2, 64, (memory.address(log), mark)) for mark in (0, 1000)
    ]
    mixed = 0
    for seed in range(10):
        log[0] = 0
        cpuexec.run_together(launches, memory, seed=seed, schedule=schedule)
        marks = marks_of(log)
        assert np.count_nonzero(marks) == 128
        mixed += marks[0] != marks[-1] or np.count_nonzero(np.diff(marks)) > 2
    assert mixed >= 8


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("schedule", ["uniform", "priority", "ordered"])
def test_a_launch_after_another_starts_when_that_has_finished(schedule, workers):
    memory = DeviceMemory()
    log = memory.array(1 + 3 * 128, np.uint32)
    address = memory.address(log)
    launches = [
        Launch(WRITE_DOWN, 4, 32, (address, 1000)),
        Launch(WRITE_DOWN, 4, 32, (address, 2000), after=0),
        Launch(WRITE_DOWN, 4, 32, (address, 3000)),
    ]
    for seed in range(10):
        log[0] = 0
        options = {"schedule": schedule, "workers": workers, "seed": seed}
        cpuexec.run_together(launches, memory, resident=4, **options)
        marks = marks_of(log)
        assert np.flatnonzero(marks == 1).max() < np.flatnonzero(marks == 2).min()
        assert [np.count_nonzero(marks == i) for i in (1, 2, 3)] == [128] * 3


def test_a_chain_of_launches_is_a_stream(memory):
    log = memory.array(1 + 5 * 32, np.uint32)
    launches = [
        Launch(WRITE_DOWN, 1, 32, (memory.address(log), 1000 * i), after=i - 1)
        for i in range(1, 5)
    ]
    launches.insert(0, Launch(WRITE_DOWN, 1, 32, (memory.address(log), 0)))
    cpuexec.run_together(launches, memory)
    np.testing.assert_array_equal(marks_of(log), np.repeat(np.arange(5), 32))


def test_a_failure_names_the_kernel_that_failed(memory):
    def beyond(words, number):
        store_u32(words + u64(4096), number)

    kernel = cpuexec.compile_kernel(beyond, ADDRESS_AND_NUMBER)
    log = memory.array(65, np.uint32)
    args = (memory.address(log), 0)
    launches = [Launch(WRITE_DOWN, 1, 64, args), Launch(kernel, 1, 64, args)]
    with pytest.raises(KernelError, match=r"^beyond, block ") as caught:
        cpuexec.run_together(launches, memory)
    assert caught.value.kernel == "beyond"


def test_no_launches_are_no_steps(memory):
    assert cpuexec.run_together([], memory) == 0


# A writer fills 32 bytes with its round's number, 16 at a time; a reader copies them.


def write_rounds(row, rounds):
    for i in range(rounds):
        word = u32(i)
        store_16(row, (word, word, word, word))
        store_16(row + u64(16), (word, word, word, word))


def read_rounds(row, out, rounds):
    for i in range(rounds):
        store_16(out + u64(i) * u64(32), load_16(row))
        store_16(out + u64(i) * u64(32) + u64(16), load_16(row + u64(16)))


def test_sixteen_bytes_are_read_whole_and_thirty_two_may_be_torn(memory):
    writer = cpuexec.compile_kernel(write_rounds, ADDRESS_AND_NUMBER)
    reader_types = (types.uint64, types.uint64, types.uint32)
    reader = cpuexec.compile_kernel(read_rounds, reader_types)
    row, out = memory.array(8, np.uint32), memory.array((100, 8), np.uint32)
    launches = [
        Launch(writer, 1, 1, (memory.address(row), 100)),
        Launch(reader, 1, 1, (memory.address(row), memory.address(out), 100)),
    ]
    n_torn = 0
    for seed in range(20):
        cpuexec.run_together(launches, memory, seed=seed, preempt=0.3)
        halves = out.reshape(200, 4)
        np.testing.assert_array_equal(halves, halves[:, :1] * np.ones(4, np.uint32))
        n_torn += np.count_nonzero(out[:, 0] != out[:, 4])
    assert n_torn > 0


def add_up(words, rounds):
    for _ in range(rounds):
        add_u32(words, u32(1))


def add_up_badly(words, rounds):
    for _ in range(rounds):
        store_u32(words, u32(load_u32(words) + u32(1)))


def sum_of(kernel: Any, seed: int, preempt: float) -> int:
    memory = DeviceMemory()
    words = memory.array(1, np.uint32)
    launch = Launch(kernel, 2, 64, (memory.address(words), 5))
    cpuexec.run(launch, memory, seed=seed, preempt=preempt)
    return int(words[0])


def test_a_sum_without_atomics_is_lost_under_preemption():
    good = cpuexec.compile_kernel(add_up, ADDRESS_AND_NUMBER)
    bad = cpuexec.compile_kernel(add_up_badly, ADDRESS_AND_NUMBER)
    assert {sum_of(good, seed, 0.5) for seed in range(5)} == {640}
    assert max(sum_of(bad, seed, 0.5) for seed in range(5)) < 640


def test_a_switch_before_each_access_loses_nearly_the_whole_sum():
    bad = cpuexec.compile_kernel(add_up_badly, ADDRESS_AND_NUMBER)
    # One thread at a time adds 5; with a switch before each access nearly all is lost.
    assert sum_of(bad, 0, 0.0) == 640
    assert sum_of(bad, 0, 1.0) < 64


def load_often(words, n):
    for _ in range(n):
        load_u32(words)


def store_often(words, n):
    for _ in range(n):
        store_16(words, (n, n, n, n))


def swap_often(words, n):
    for _ in range(n):
        swap_u64(words, u64(n), u64(n))


def fence_often(words, n):
    for _ in range(n):
        fence()


def vote_often(words, n):
    for _ in range(n):
        cuda.ballot_sync(u32(FULL_WARP), True)


def nap_often(words, n):
    for _ in range(n):
        cuda.nanosleep(u32(100))


@pytest.mark.parametrize(
    "function",
    [load_often, store_often, swap_often, fence_often, vote_often, nap_often],
)
def test_each_access_fence_and_collective_is_one_chance_to_switch(memory, function):
    kernel = cpuexec.compile_kernel(function, ADDRESS_AND_NUMBER)
    words = memory.array(4, np.uint32)

    def steps(n: int) -> int:
        launch = Launch(kernel, 1, 32, (memory.address(words), n))
        return cpuexec.run(launch, memory, preempt=1.0)

    more = steps(30) - steps(20)
    if function is vote_often:
        # All lanes but the last one to come also wait.
        assert more == 10 * (32 + 31)
    else:
        assert more == 10 * 32


def test_blocks_run_on_several_workers(memory):
    kernel = cpuexec.compile_kernel(add_up, ADDRESS_AND_NUMBER)
    words = memory.array(1, np.uint32)
    launch = Launch(kernel, 64, 64, (memory.address(words), 50))
    cpuexec.run(launch, memory, workers=2)
    assert words[0] == 64 * 64 * 50


def take_turns(words, role):
    """Add to word 0 when its parity says that it is this block's turn, 50 times."""
    mine = u32(u32(cuda.blockIdx.x) ^ role)
    done = u32(0)
    while done < u32(50):
        now = load_u32(words)
        if (now & u32(1)) == mine:
            store_u32(words, u32(now + u32(1)))
            done = u32(done + u32(1))


TAKE_TURNS = cpuexec.compile_kernel(take_turns, ADDRESS_AND_NUMBER)


def test_workers_run_at_the_same_time(memory):
    words = memory.array(1, np.uint32)
    launch = Launch(TAKE_TURNS, 2, 1, (memory.address(words), 0))
    cpuexec.run(launch, memory, workers=2, resident=1)
    assert words[0] == 100
    # A single worker with one resident block waits for a block that never starts.
    words[0] = 0
    with pytest.raises(KernelError, match="step limit"):
        cpuexec.run(launch, memory, workers=1, resident=1, max_steps=1000)


def test_runs_of_two_python_threads_overlap(memory):
    words = memory.array(1, np.uint32)

    def play(role: int) -> int:
        launch = Launch(TAKE_TURNS, 1, 1, (memory.address(words), role))
        return cpuexec.run(launch, memory)

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(play, (0, 1)))
    assert words[0] == 100
