"""Lanes that wait for each other: what is refused, and what each lane gets."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    load_u32,
    shuffle_u32,
    store_u32,
    swap_acquire_u32,
)
from tests.kernels.cuda.word_kernels import run_on_words
from tests.support.cpuexec import KernelError

u32, u64 = np.uint32, np.uint64


def test_a_lane_outside_its_own_mask_is_an_error():
    def kernel(words, number):
        cuda.ballot_sync(number, True)

    with pytest.raises(
        KernelError, match=r"vote: the calling lane .* not in mask 0xfe"
    ):
        run_on_words(kernel, 0xFE)


def test_a_mask_that_names_a_lane_that_does_not_exist_is_an_error():
    def kernel(words, number):
        cuda.syncwarp(u32(number))

    run_on_words(kernel, 0xFFFF, block=16)
    with pytest.raises(KernelError, match="syncwarp: mask 0x1ffff names lane 16"):
        run_on_words(kernel, 0x1FFFF, block=16)


def test_a_lane_that_exits_before_others_name_it_is_an_error():
    def kernel(words, number):
        if cuda.laneid != number:
            cuda.syncwarp(u32(FULL_WARP))

    # Which of the two comes first is up to the schedule.
    reason = "lane 5 exits while lanes wait|names lane 5, which has exited"
    for seed in range(4):
        with pytest.raises(KernelError, match=reason):
            run_on_words(kernel, 5, seed=seed, block=32)


def test_a_shuffle_from_a_lane_outside_the_mask_is_an_error():
    def kernel(words, number):
        lane = u32(cuda.laneid)
        if lane < u32(8):
            got = cuda.shfl_sync(u32(0xFF), np.int32(lane), np.int32(number))
            store_u32(words, u32(got))

    run_on_words(kernel, 7)
    with pytest.raises(KernelError, match="reads lane 8, which is not in mask 0xff"):
        run_on_words(kernel, 8)


def test_different_operations_under_one_mask_are_a_divergence():
    def kernel(words, number):
        if cuda.laneid == number:
            cuda.ballot_sync(u32(FULL_WARP), True)
        else:
            cuda.syncwarp(u32(FULL_WARP))

    with pytest.raises(KernelError, match="divergence: "):
        run_on_words(kernel, 3)


def test_the_same_operation_in_two_branches_is_a_divergence():
    def kernel(words, number):
        lane = u32(cuda.laneid)
        if lane < number:
            got = shuffle_u32(lane, u32(1))
            store_u32(words, got)
        else:
            got = shuffle_u32(lane, u32(2))
            store_u32(words + u64(4), u32(got + u32(1)))

    with pytest.raises(KernelError, match=r"divergence: .* from two places"):
        run_on_words(kernel, 16)


def test_lanes_that_name_each_other_in_different_masks_are_a_divergence():
    def kernel(words, number):
        mask = u32(0xFFFF)
        if u32(cuda.laneid) >= u32(8):
            mask = u32(FULL_WARP)
        cuda.syncwarp(mask)

    with pytest.raises(KernelError, match=r"divergence: syncwarp with mask 0x.* while"):
        run_on_words(kernel)


def test_a_lane_may_wait_for_one_that_waits_elsewhere_first():
    def kernel(words, number):
        lane = u32(cuda.laneid)
        if lane < u32(2):
            cuda.syncwarp(u32(0b11))
        if u32(1) <= lane and lane < u32(3):
            cuda.syncwarp(u32(0b110))
        store_u32(words + u64(cuda.threadIdx.x) * u64(4), u32(1))

    for seed in range(10):
        assert run_on_words(kernel, seed=seed, preempt=0.5).all()


def test_a_collective_in_the_head_of_a_loop_is_no_divergence():
    def kernel(words, number):
        lane = u32(cuda.laneid)
        rounds = u32(0)
        while cuda.ballot_sync(u32(FULL_WARP), rounds < lane):
            rounds = u32(rounds + u32(1))
        store_u32(words + u64(lane) * u64(4), rounds)

    assert set(run_on_words(kernel)[:32]) == {31}


def test_threads_at_different_barriers_are_a_divergence():
    def kernel(words, number):
        if cuda.threadIdx.x < number:
            cuda.syncthreads()
        else:
            cuda.syncthreads_or(1)

    with pytest.raises(KernelError, match="divergence: syncthreads"):
        run_on_words(kernel, 32)


def test_lanes_that_wait_for_each_other_are_a_deadlock():
    def kernel(words, number):
        if cuda.threadIdx.x < number:
            cuda.syncthreads()
        else:
            cuda.syncwarp(u32(FULL_WARP))

    with pytest.raises(KernelError, match="deadlock: waits for ever at") as caught:
        run_on_words(kernel, 8)
    assert "where" in caught.value.reason


def test_threads_that_have_exited_are_not_waited_for_at_a_barrier():
    def kernel(words, number):
        if cuda.threadIdx.x < number:
            cuda.syncthreads()
            store_u32(words + u64(cuda.threadIdx.x) * u64(4), u32(7))

    np.testing.assert_array_equal(run_on_words(kernel, 40), [7] * 40 + [0] * 24)


@pytest.mark.parametrize(("preempt", "nap"), [(0.05, 0), (0.0, 0), (0.0, 1), (1.0, 1)])
def test_a_lock_that_is_never_released_is_a_livelock(preempt, nap):
    def kernel(words, number):
        while swap_acquire_u32(words, u32(0), u32(1)) != u32(0):
            if number:
                cuda.nanosleep(u32(20))

    with pytest.raises(KernelError, match="step limit of 20000 exceeded"):
        run_on_words(kernel, nap, preempt=preempt, max_steps=20_000)


@pytest.mark.parametrize("schedule", ["uniform", "priority", "ordered"])
@pytest.mark.parametrize("preempt", [0.0, 0.05])
def test_a_lock_that_is_released_is_got_by_everyone(schedule, preempt):
    def kernel(words, number):
        done = False
        while not done:
            if swap_acquire_u32(words, u32(0), u32(1)) == u32(0):
                store_u32(words + u64(4), u32(load_u32(words + u64(4)) + u32(1)))
                store_u32(words, u32(0))
                done = True

    assert run_on_words(kernel, schedule=schedule, preempt=preempt)[1] == 64
