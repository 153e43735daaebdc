"""Weak memory of the CPU executor among lanes and launches, and its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    fence,
    load_acquire_u32,
    load_u32,
    store_release_u32,
    store_u32,
)
from tests.kernels.cuda.litmus import OUT, X, Y, nothing, outcomes, write_out
from tests.kernels.cuda.word_kernels import ADDRESS_AND_NUMBER
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, KernelError, Launch, weakening

u32, u64 = np.uint32, np.uint64


# -- warps and blocks ----------------------------------------------------------------


def publish_as_a_warp(meet: Any, store_flag: Any) -> Any:
    """Return a kernel: all lanes of a warp store, then lane 0 a flag."""

    def kernel(words, number):
        lane = u64(cuda.laneid)
        if cuda.blockIdx.x == 0:
            store_u32(words + X + lane * u64(4), u32(1))
            meet()
            if lane == u64(0):
                store_flag(words + OUT + u64(64), u32(1))
        elif lane == u64(0):
            while load_acquire_u32(words + OUT + u64(64)) == u32(0):
                cuda.nanosleep(u32(100))
            total = u32(0)
            for i in range(32):
                total = u32(total + load_u32(words + X + u64(i) * u64(4)))
            write_out(words, 0, total)

    return kernel


@cuda.jit(device=True, forceinline=True)
def meet_as_warp():
    cuda.syncwarp(FULL_WARP)


@cuda.jit(device=True, forceinline=True)
def meet_as_block():
    cuda.syncthreads()


@cuda.jit(device=True, forceinline=True)
def vote_only():
    cuda.ballot_sync(FULL_WARP, True)


@cuda.jit(device=True, forceinline=True)
def fence_and_vote():
    fence()
    cuda.ballot_sync(FULL_WARP, True)


@pytest.mark.parametrize("meet", [meet_as_warp, meet_as_block], ids=["warp", "block"])
def test_a_release_behind_a_barrier_covers_the_stores_of_all_lanes(meet):
    seen = outcomes(publish_as_a_warp(meet, store_release_u32), threads=32, results=1)
    assert set(seen) == {(32,)}


@pytest.mark.parametrize(
    ("meet", "store_flag"),
    [
        (nothing, store_release_u32),
        (vote_only, store_release_u32),
        (fence_and_vote, store_release_u32),
        (meet_as_warp, store_u32),
    ],
    ids=["no barrier", "vote", "fence and vote", "relaxed"],
)
def test_without_a_barrier_or_a_release_lanes_may_be_left_behind(meet, store_flag):
    seen = outcomes(publish_as_a_warp(meet, store_flag), threads=32, results=1)
    assert len(set(seen)) > 1


def acquire_for_a_warp(meet: Any) -> Any:
    """Return a kernel: lane 0 finds a flag, lane 1 reads what it stands for."""

    def kernel(words, number):
        lane = cuda.laneid
        if cuda.blockIdx.x == 0:
            if lane == 0:
                store_u32(words + X, u32(1))
                store_release_u32(words + Y, u32(1))
        else:
            if lane == 0:
                write_out(words, 0, load_acquire_u32(words + Y))
            meet()
            if lane == 1:
                write_out(words, 1, load_u32(words + X))

    return kernel


def test_a_barrier_shares_what_a_lane_has_acquired():
    assert (1, 0) not in outcomes(acquire_for_a_warp(meet_as_warp), threads=32)
    assert (1, 0) in outcomes(acquire_for_a_warp(vote_only), threads=32, seeds=1000)


# -- launches and options ------------------------------------------------------------


def add_one(words, number):
    value = load_u32(words + X)
    store_u32(words + X, u32(value + u32(1)))
    if value != u32(number):
        write_out(words, 0, value)


def test_a_launch_sees_all_that_the_one_before_it_did():
    kernel = cpuexec.compile_kernel(add_one, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(64, np.uint32)
    address = memory.address(words)
    launches = [
        Launch(kernel, 1, 1, (address, i), after=i - 1 if i else None) for i in range(9)
    ]
    for seed in range(50):
        words[:] = 0
        cpuexec.run_together(launches, memory, seed=seed, weak=1.0)
        assert words[0] == 9
        assert words[32] == 0


def test_launches_beside_each_other_may_miss_what_the_other_did():
    kernel = cpuexec.compile_kernel(add_one, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(64, np.uint32)
    launches = [Launch(kernel, 1, 1, (memory.address(words), 0)) for _ in range(2)]
    totals = set()
    for seed in range(50):
        words[:] = 0
        # Without preemption one of them ends before the other begins.
        cpuexec.run_together(launches, memory, seed=seed, weak=0.5, preempt=0.0)
        totals.add(int(words[0]))
    assert totals == {1, 2}


def read_often(words, number):
    lane = u64(cuda.grid(1))
    total = u32(0)
    for i in range(8):
        store_u32(words + lane * u64(4), u32(i))
        total = u32(total + load_u32(words + u64(u64(31) - lane) * u64(4)))
    write_out(words, lane, total)


def test_a_seed_decides_which_values_are_old():
    def run_of(seed: int) -> tuple[int, bytes]:
        kernel = cpuexec.compile_kernel(read_often, ADDRESS_AND_NUMBER)
        memory = DeviceMemory()
        words = memory.array(64, np.uint32)
        launch = Launch(kernel, 8, 4, (memory.address(words), 0))
        steps = cpuexec.run(launch, memory, seed=seed, weak=0.5)
        return steps, words.tobytes()

    runs = [run_of(seed) for seed in range(40)]
    assert runs == [run_of(seed) for seed in range(40)]
    assert len(set(runs)) == 40


def store_after_the_end(words, number):
    store_u32(words + u64(256), u32(1))


def test_bounds_are_checked_at_the_store_itself():
    kernel = cpuexec.compile_kernel(store_after_the_end, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    launch = Launch(kernel, 1, 1, (memory.address(memory.array(64, np.uint32)), 0))
    with pytest.raises(KernelError, match=r"4-byte store .* past the end of"):
        cpuexec.run(launch, memory, weak=0.5)


def fill_shared_and_local(words, number):
    shared = cuda.shared.array(32, np.uint32)
    local = cuda.local.array(4, np.uint32)
    for i in range(4):
        local[i] = i + cuda.laneid
    shared[cuda.laneid] = local[2]
    cuda.syncthreads()
    write_out(words, cuda.laneid, shared[31 - cuda.laneid])


def test_shared_and_local_arrays_stay_strong():
    seen = outcomes(fill_shared_and_local, blocks=1, threads=32, results=32, seeds=20)
    assert set(seen) == {tuple(33 - lane for lane in range(32))}


@pytest.mark.parametrize("options", [{"weak": -0.1}, {"weak": 1.1}])
def test_a_chance_of_old_values_is_between_0_and_1(options):
    with pytest.raises(ValueError, match="weak"):
        cpuexec.run_together([], DeviceMemory(), **options)


def test_weak_memory_has_one_worker():
    with pytest.raises(ValueError, match="more than one worker"):
        cpuexec.run_together([], DeviceMemory(), weak=0.5, workers=2)


# -- what has no model ---------------------------------------------------------------


def clear_array(array, number):
    for i in range(number):
        array[i] = 0


def test_a_loop_that_became_a_fill_is_refused():
    kinds = (types.uint8[::1], types.uint64)
    kernel = cpuexec.compile_kernel(clear_array, kinds)
    memory = DeviceMemory()
    array = memory.array(1000, np.uint8, fill=1)
    cpuexec.run(Launch(kernel, 1, 1, (array, 1000)), memory)
    assert not array.any()
    with pytest.raises(KernelError, match="fill of 1000 bytes has no model"):
        cpuexec.run(Launch(kernel, 1, 1, (array, 1000)), memory, weak=0.5)


def store_many(words, number):
    for i in range(number):
        store_u32(words + u64(i) * u64(4), u32(1))


def test_a_run_that_stores_to_too_many_words_is_refused():
    kernel = cpuexec.compile_kernel(store_many, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(2**20 + 1, np.uint32)
    for n in (2**20, 2**20 + 1):
        launch = Launch(kernel, 1, 1, (memory.address(words), n))
        if n == 2**20:
            cpuexec.run(launch, memory, weak=0.0)
            assert words.sum() == n
        else:
            with pytest.raises(KernelError, match="too many words"):
                cpuexec.run(launch, memory, weak=0.0)


def test_an_acquire_fence_that_belongs_to_no_load_is_refused():
    text = "define void @kernel() {\n  fence acquire\n  ret void\n}\n"
    with pytest.raises(NotImplementedError, match="stands for itself"):
        weakening.insert(text)
