"""Weak memory of the CPU executor: PTX's litmus tests.

What PTX allows is seen under some seed, and what it forbids under none. Blocks of one
thread take the parts of a test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda

from hps_numba.kernels.cuda.ptx import (
    add_u32,
    fence,
    load_acquire_quad,
    load_acquire_u32,
    load_row,
    load_u8,
    load_u32,
    load_u64,
    store_release_u32,
    store_row,
    store_u8,
    store_u32,
    store_u64,
    swap_acquire_u32,
)
from tests.kernels.cuda.litmus import SEEDS, X, Y, nothing, outcomes, write_out
from tests.kernels.cuda.word_kernels import ADDRESS_AND_NUMBER
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch

u32, u64 = np.uint32, np.uint64
load_row_16, store_row_16 = load_row[16], store_row[16]


# -- message passing -----------------------------------------------------------------


def pass_a_message(
    before_flag: Any, store_flag: Any, load_flag: Any, after: Any
) -> Any:
    """Return a kernel: block 0 stores X, then a flag; block 1 loads them."""

    def kernel(words, number):
        if cuda.blockIdx.x == 0:
            store_u32(words + X, u32(1))
            before_flag()
            store_flag(words + Y, u32(1))
        else:
            flag = load_flag(words + Y)
            after()
            value = load_u32(words + X)
            write_out(words, 0, flag)
            write_out(words, 1, value)

    return kernel


@cuda.jit(device=True, forceinline=True)
def add_to_flag(address, value):
    add_u32(address, value)


@cuda.jit(device=True, forceinline=True)
def exchange_flag(address, value):
    swap_acquire_u32(address, u32(0), value)


@cuda.jit(device=True, forceinline=True)
def load_flag_quad(address):
    return load_acquire_quad(address)[0]


ORDERED = {
    "fences": (fence, store_u32, load_u32, fence),
    "release and acquire": (nothing, store_release_u32, load_acquire_u32, nothing),
    "release and fence": (nothing, store_release_u32, load_u32, fence),
    "fence and acquire": (fence, store_u32, load_acquire_u32, nothing),
    "release and acquire of a vector": (
        nothing,
        store_release_u32,
        load_flag_quad,
        nothing,
    ),
    "fence and atomic": (fence, add_to_flag, load_acquire_u32, nothing),
}
UNORDERED = {
    "nothing": (nothing, store_u32, load_u32, nothing),
    "no release": (nothing, store_u32, load_acquire_u32, nothing),
    "no acquire": (nothing, store_release_u32, load_u32, nothing),
    "reader's fence alone": (nothing, store_u32, load_u32, fence),
    "writer's fence alone": (fence, store_u32, load_u32, nothing),
    "acquire does not release": (nothing, exchange_flag, load_acquire_u32, nothing),
}


@pytest.mark.parametrize("how", ORDERED)
def test_a_message_that_is_ordered_comes_after_its_data(how):
    seen = outcomes(pass_a_message(*ORDERED[how]))
    assert set(seen) == {(0, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize("how", UNORDERED)
def test_a_message_that_is_not_ordered_may_overtake_its_data(how):
    seen = outcomes(pass_a_message(*UNORDERED[how]))
    assert set(seen) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (1, 0) not in outcomes(pass_a_message(*UNORDERED[how]), weak=None)
    assert (1, 0) not in outcomes(pass_a_message(*UNORDERED[how]), weak=0.0)


# -- one word, one lane --------------------------------------------------------------


def read_twice(words, number):
    if cuda.blockIdx.x == 0:
        store_u32(words + X, u32(1))
        store_u32(words + X, u32(2))
    else:
        write_out(words, 0, load_u32(words + X))
        write_out(words, 1, load_u32(words + X))


def test_a_lane_does_not_see_a_word_go_back():
    seen = outcomes(read_twice)
    assert set(seen) == {(a, b) for a in range(3) for b in range(a, 3)}


def read_own(words, number):
    store_u64(words + X, u64(0x1111111122222222))
    store_u8(words + X + u64(5), u32(0x33))
    write_out(words, 0, load_u8(words + X + u64(5)))
    write_out(words, 1, load_u32(words + X + u64(4)))
    store_u32(words + X, u32(number))
    row = load_row_16(words + X)
    write_out(words, 2, row[0])
    write_out(words, 3, row[1])
    write_out(words, 4, add_u32(words + X, u32(5)))
    write_out(words, 5, load_u32(words + X))


def test_a_lane_sees_its_own_stores_of_any_width():
    seen = outcomes(read_own, blocks=1, results=6, seeds=50, weak=1.0)
    assert set(seen) == {(0x33, 0x11113311, 0, 0x11113311, 0, 5)}


def race_for_numbers(words, number):
    before = add_u32(words + X, u32(1))
    write_out(words, before, u32(before + u32(1)))


def test_atomic_operations_read_the_newest_value():
    seen = outcomes(race_for_numbers, blocks=4, results=4, seeds=100, weak=1.0)
    assert set(seen) == {(1, 2, 3, 4)}


def race_for_a_lock(words, number):
    for _ in range(1000):
        if swap_acquire_u32(words + Y, u32(0), u32(1)) == u32(0):
            break
    value = load_u32(words + X)
    store_u32(words + X, u32(value + u32(1)))
    store_release_u32(words + Y, u32(0))
    write_out(words, cuda.blockIdx.x, 1)


def test_what_a_lock_guards_is_never_old():
    kernel = cpuexec.compile_kernel(race_for_a_lock, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(64, np.uint32)
    for seed in range(SEEDS):
        words[:] = 0
        launch = Launch(kernel, 4, 1, (memory.address(words), 0))
        cpuexec.run(launch, memory, seed=seed, preempt=0.3, weak=0.5)
        assert words[0] == 4


def write_wide(words, number):
    if cuda.blockIdx.x == 0:
        store_u64(words + X, u64(0x0000000100000001))
        store_row_16(words + Y, (u32(1), u32(1), u32(1), u32(1)))
    else:
        both = load_u64(words + X)
        write_out(words, 0, u32(both))
        write_out(words, 1, u32(both >> u64(32)))
        row = load_row_16(words + Y)
        write_out(words, 2, row[0])
        write_out(words, 3, row[3])


def test_a_word_of_64_bits_is_read_whole_and_a_vector_may_be_torn():
    seen = outcomes(write_wide, results=4)
    assert {one[:2] for one in seen} == {(0, 0), (1, 1)}
    assert {one[2:] for one in seen} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def write_in_order(words, number):
    if cuda.blockIdx.x == 0:
        for i in range(4):
            store_release_u32(words + X + u64(i) * u64(4), u32(1))
    else:
        row = load_acquire_quad(words + X)
        for i in range(4):
            write_out(words, i, row[i])


def test_elements_of_a_vector_are_acquired_in_any_order():
    seen = set(outcomes(write_in_order, results=4, seeds=1000))
    assert (0, 0, 0, 0) in seen
    assert (1, 1, 1, 1) in seen
    assert (1, 1, 0, 0) in seen
    # The first was loaded before the second.
    assert (0, 1, 1, 1) in seen


def write_bytes(words, number):
    if cuda.blockIdx.x == 0:
        store_u32(words + Y, u32(1))
        fence()
        store_u8(words + X, u32(1))
    elif cuda.blockIdx.x == 1:
        store_u8(words + X + u64(1), u32(1))
    else:
        write_out(words, 0, load_u8(words + X))
        fence()
        write_out(words, 1, load_u32(words + Y))


def test_another_byte_of_its_word_does_not_unbind_a_message():
    seen = outcomes(write_bytes, blocks=3)
    assert set(seen) == {(0, 0), (0, 1), (1, 1)}


# -- two words, two lanes and more ---------------------------------------------------


def store_both(order: Any) -> Any:
    """Return Dekker's test: each block stores its word and loads the other's."""

    def kernel(words, number):
        mine = u64(cuda.blockIdx.x) * Y
        store_u32(words + mine, u32(1))
        order()
        write_out(words, cuda.blockIdx.x, load_u32(words + (Y - mine)))

    return kernel


@cuda.jit(device=True, forceinline=True)
def fence_sc():
    cuda.threadfence()


@pytest.mark.parametrize(
    "order", [nothing, fence, fence_sc], ids=["none", "acq_rel", "sc"]
)
def test_only_fences_of_sequential_consistency_keep_dekkers_rule(order):
    seen = outcomes(store_both(order))
    allowed = {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert set(seen) == (allowed - {(0, 0)} if order is fence_sc else allowed)


def read_in_two_orders(order: Any) -> Any:
    """Return a kernel: two blocks store a word each, two read both, each its way."""

    def kernel(words, number):
        block = cuda.blockIdx.x
        if block < 2:
            store_u32(words + u64(block) * Y, u32(1))
        else:
            first = u64(block - 2) * Y
            write_out(words, 2 * (block - 2), load_u32(words + first))
            order()
            write_out(words, 2 * (block - 2) + 1, load_u32(words + (Y - first)))

    return kernel


@pytest.mark.parametrize("order", [fence, fence_sc], ids=["acq_rel", "sc"])
def test_two_readers_agree_on_the_order_of_stores_only_by_fences_of_sc(order):
    seen = outcomes(read_in_two_orders(order), blocks=4, results=4, seeds=1000)
    assert ((1, 0, 1, 0) in seen) == (order is fence)


def pass_it_on(words, number):
    block = cuda.blockIdx.x
    if block == 0:
        store_u32(words + X, u32(1))
        store_release_u32(words + Y, u32(1))
    elif block == 1:
        if load_acquire_u32(words + Y) == u32(1):
            add_u32(words + Y, u32(1))
    else:
        write_out(words, 0, load_acquire_u32(words + Y))
        write_out(words, 1, load_u32(words + X))


def test_an_atomic_operation_hands_on_what_it_has_read():
    seen = outcomes(pass_it_on, blocks=3)
    assert set(seen) == {(0, 0), (0, 1), (1, 1), (2, 1)}


def pass_it_by_two(words, number):
    block = cuda.blockIdx.x
    if block == 0:
        store_u32(words + X, u32(1))
    elif block == 1:
        value = load_u32(words + X)
        store_release_u32(words + Y, value)
    else:
        write_out(words, 0, load_acquire_u32(words + Y))
        write_out(words, 1, load_u32(words + X))


def test_a_release_covers_what_its_lane_has_read_of_others():
    seen = outcomes(pass_it_by_two, blocks=3)
    assert set(seen) == {(0, 0), (0, 1), (1, 1)}
