"""The models of what Numba itself emits: collectives, barriers, bits, atomics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from hps_numba.kernels.cuda.ptx import (
    load_u32,
    load_u64,
    shuffle_u64,
    store_u32,
    store_u64,
)
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch

u32, u64, i32 = np.uint32, np.uint64, np.int32
RANDOM = np.random.default_rng(20260731)
N_ROUNDS = 40
FULL = u32(0xFFFFFFFF)


def random_masks() -> np.ndarray:
    """Return each lane's mask for each round, of random partitions of the warp."""
    groups = RANDOM.integers(0, 5, (N_ROUNDS, 32))
    groups[0] = 0
    groups[1] = np.arange(32)
    same = groups[:, :, None] == groups[:, None, :]
    return (same * (1 << np.arange(32))).sum(axis=2).astype(np.uint32)


def members(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


def run_rounds(kernel: Any, *inputs: np.ndarray, **options: Any) -> np.ndarray:
    """Run a kernel of (in, out) on a warp; what it is given is stacked by round."""
    stacked = np.stack([np.asarray(one, np.uint64) for one in inputs], axis=-1)
    memory = DeviceMemory()
    given = memory.copy(stacked.astype(np.uint32))
    out = memory.array(stacked.shape[:2], np.uint32)
    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.uint64))
    args = (memory.address(given), memory.address(out))
    cpuexec.run(Launch(compiled, 1, 32, args), memory, **options)
    return out


VOTES = {
    "ballot": (cuda.ballot_sync, lambda yes, mask: yes),
    "all": (cuda.all_sync, lambda yes, mask: int(yes == mask)),
    "any": (cuda.any_sync, lambda yes, mask: int(yes != 0)),
    "eq": (cuda.eq_sync, lambda yes, mask: int(yes in (0, mask))),
}


@pytest.mark.parametrize("schedule", ["uniform", "priority", "ordered"])
@pytest.mark.parametrize("name", VOTES)
def test_votes_under_random_masks_equal_the_plain_model(name, schedule):
    vote, model = VOTES[name]

    def kernel(source, out):
        lane = u64(cuda.laneid)
        for i in range(N_ROUNDS):
            place = u64(i) * u64(32) + lane
            mask = load_u32(source + place * u64(8))
            yes = load_u32(source + place * u64(8) + u64(4))
            store_u32(out + place * u64(4), u32(vote(mask, yes != u32(0))))

    masks = random_masks()
    chance = RANDOM.choice([0.05, 0.5, 0.95], N_ROUNDS)[:, None]
    answers = RANDOM.random((N_ROUNDS, 32)) < chance
    got = run_rounds(kernel, masks, answers, schedule=schedule)
    yes = (answers * (1 << np.arange(32))).sum(axis=1)
    for i in range(N_ROUNDS):
        expected = [model(int(yes[i]) & int(mask), int(mask)) for mask in masks[i]]
        assert got[i].tolist() == expected


def test_a_shuffle_under_random_masks_equals_the_plain_model():
    def kernel(source, out):
        lane = u64(cuda.laneid)
        for i in range(N_ROUNDS):
            place = u64(i) * u64(32) + lane
            mask = load_u32(source + place * u64(12))
            value = i32(load_u32(source + place * u64(12) + u64(4)))
            lane_from = i32(load_u32(source + place * u64(12) + u64(8)))
            got = cuda.shfl_sync(mask, value, lane_from)
            store_u32(out + place * u64(4), u32(got))

    masks = random_masks()
    values = RANDOM.integers(0, 2**32, masks.shape, np.uint32)
    sources = [[RANDOM.choice(members(int(mask))) for mask in row] for row in masks]
    got = run_rounds(kernel, masks, values, sources)
    np.testing.assert_array_equal(got, np.take_along_axis(values, np.array(sources), 1))


SHUFFLES = {
    "up": (cuda.shfl_up_sync, lambda lane, by: lane - by),
    "down": (cuda.shfl_down_sync, lambda lane, by: lane + by),
    "xor": (cuda.shfl_xor_sync, lambda lane, by: lane ^ by),
    "index": (cuda.shfl_sync, lambda lane, by: by),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_shuffle_of_a_whole_warp_equals_the_plain_model(name):
    shuffle, model = SHUFFLES[name]

    def kernel(source, out):
        lane = u64(cuda.laneid)
        for by in range(32):
            place = u64(by) * u64(32) + lane
            value = i32(load_u32(source + place * u64(4)))
            store_u32(out + place * u64(4), u32(shuffle(FULL, value, i32(by))))

    values = RANDOM.integers(0, 2**32, (32, 32), np.uint32)
    got = run_rounds(kernel, values)
    for by in range(32):
        sources = [model(lane, by) for lane in range(32)]
        kept = [s if 0 <= s < 32 else lane for lane, s in enumerate(sources)]
        np.testing.assert_array_equal(got[by], values[by, kept])


def test_a_shuffle_of_64_bits_moves_both_halves():
    def kernel(source, out):
        lane = u32(cuda.laneid)
        value = load_u64(source + u64(lane) * u64(8))
        got = shuffle_u64(value, u32(31) - lane)
        store_u64(out + u64(lane) * u64(8), got)

    values = RANDOM.integers(0, 2**32, (2, 32), np.uint32)
    got = run_rounds(kernel, values)
    wide = values.reshape(-1).view(np.uint64)
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint64), wide[::-1])


def test_matches_under_random_masks_equal_the_plain_model():
    def kernel(source, out):
        lane = u64(cuda.laneid)
        for i in range(N_ROUNDS):
            place = u64(i) * u64(32) + lane
            mask = load_u32(source + place * u64(8))
            value = i32(load_u32(source + place * u64(8) + u64(4)))
            same = u32(cuda.match_any_sync(mask, value))
            all_of, equal = cuda.match_all_sync(mask, value)
            if equal:
                same = u32(~u32(all_of))
            store_u32(out + place * u64(4), same)

    masks = random_masks()
    values = RANDOM.integers(0, 3, masks.shape)
    values[::3] = values[::3, :1]
    got = run_rounds(kernel, masks, values)
    for i in range(N_ROUNDS):
        for lane in range(32):
            mask = int(masks[i, lane])
            same = [one for one in members(mask) if values[i, one] == values[i, lane]]
            expected = sum(1 << one for one in same)
            assert got[i, lane] == (expected ^ FULL if expected == mask else expected)


def test_what_a_thread_knows_of_its_warp():
    def kernel(source, out):
        thread = u64(cuda.threadIdx.x)
        word = u32(u32(cuda.laneid) | u32(u32(cuda.warpsize) << u32(8)))
        store_u32(out + thread * u64(8), word)
        store_u32(out + thread * u64(8) + u64(4), u32(cuda.activemask()))

    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.uint64))
    memory = DeviceMemory()
    out = memory.array((50, 2), np.uint32)
    launch = Launch(compiled, 1, 50, (0, memory.address(out)))
    cpuexec.run(launch, memory, preempt=0.0, schedule="uniform")
    np.testing.assert_array_equal(out[:, 0], np.arange(50) % 32 + (32 << 8))
    # A lane that has exited is no longer active; each finds itself.
    assert all(int(out[i, 1]) >> (i % 32) & 1 for i in range(50))
    assert all(int(mask) < 2**18 for mask in out[32:, 1])


def test_barriers_count_and_combine_over_the_block():
    def kernel(source, out):
        thread = u64(cuda.threadIdx.x)
        for i in range(8):
            one = i32(load_u32(source + (u64(i) * u64(96) + thread) * u64(4)))
            place = out + (u64(i) * u64(96) + thread) * u64(12)
            store_u32(place, u32(cuda.syncthreads_count(one)))
            store_u32(place + u64(4), u32(cuda.syncthreads_and(one)))
            store_u32(place + u64(8), u32(cuda.syncthreads_or(one)))

    ones = RANDOM.integers(0, 2, (8, 96)).astype(np.uint32) * 6
    ones[0], ones[1] = 0, 5
    memory = DeviceMemory()
    given, out = memory.copy(ones), memory.array((8, 96, 3), np.uint32)
    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.uint64))
    args = (memory.address(given), memory.address(out))
    cpuexec.run(Launch(compiled, 1, 96, args), memory)
    count = np.count_nonzero(ones, axis=1)[:, None]
    expected = np.stack([count, count == 96, count > 0], axis=-1)
    np.testing.assert_array_equal(out != 0, np.broadcast_to(expected != 0, out.shape))
    np.testing.assert_array_equal(out[:, :, 0], np.broadcast_to(count, (8, 96)))


def test_shared_memory_is_exchanged_across_a_barrier():
    def kernel(source, out):
        shared = cuda.shared.array(96, np.uint32)
        thread = u32(cuda.threadIdx.x)
        block = u32(u32(cuda.blockIdx.x) * u32(96))
        for i in range(5):
            shared[thread] = u32(u32(block + thread) * u32(i))
            cuda.syncthreads()
            other = shared[u32(95) - thread]
            cuda.syncthreads()
        store_u32(out + u64(u32(block + thread)) * u64(4), other)

    memory = DeviceMemory()
    out = memory.array((3, 96), np.uint32)
    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.uint64))
    for schedule in ("uniform", "priority", "ordered"):
        launch = Launch(compiled, 3, 96, (0, memory.address(out)))
        cpuexec.run(launch, memory, schedule=schedule)
        expected = (np.arange(3 * 96).reshape(3, 96) * 4)[:, ::-1]
        np.testing.assert_array_equal(out, expected)


def words_with_edges(bits: int) -> np.ndarray:
    words = RANDOM.integers(0, 2**bits, 64, f"u{bits // 8}")
    words >>= RANDOM.integers(0, bits, 64).astype(words.dtype)
    words[:3] = [0, 1, 2**bits - 1]
    return words


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_functions_equal_the_plain_model(bits):
    load = load_u64 if bits == 64 else load_u32
    n_bytes = bits // 8

    def kernel(source, out):
        i = u64(cuda.threadIdx.x)
        word = load(source + i * u64(n_bytes))
        place = out + i * u64(32)
        store_u64(place, u64(cuda.popc(word)))
        store_u64(place + u64(8), u64(cuda.clz(word)))
        store_u64(place + u64(16), u64(cuda.ffs(word)))
        store_u64(place + u64(24), u64(cuda.brev(word)))

    words = words_with_edges(bits)
    memory = DeviceMemory()
    given, out = memory.copy(words), memory.array((64, 4), np.uint64)
    compiled = cpuexec.compile_kernel(kernel, (types.uint64, types.uint64))
    args = (memory.address(given), memory.address(out))
    cpuexec.run(Launch(compiled, 1, 64, args), memory)
    for word, got in zip(words.tolist(), out.tolist(), strict=True):
        backwards = int(f"{word:0{bits}b}"[::-1], 2)
        lowest = (word & -word).bit_length()
        assert got == [
            bin(word).count("1"),
            bits - word.bit_length(),
            lowest,
            backwards,
        ]


WORDS = types.Array(types.uint32, 1, "C")
TABLE = types.Array(types.uint32, 2, "C")
ATOMICS = (
    lambda old, n: (old + n) % 2**32,
    lambda old, n: (old - n) % 2**32,
    max,
    min,
    lambda old, n: old & n,
    lambda old, n: old | n,
    lambda old, n: old ^ n,
    lambda old, n: n,
    lambda old, n: 0 if old >= n else old + 1,
    lambda old, n: n if old == 0 or old > n else old - 1,
)


@cuda.jit(device=True)
def change_each(words, out, i, n):
    """Apply one atomic of each kind, each to its own word."""
    out[0, i] = cuda.atomic.add(words, (0, i), n)
    out[1, i] = cuda.atomic.sub(words, (1, i), n)
    out[2, i] = cuda.atomic.max(words, (2, i), n)
    out[3, i] = cuda.atomic.min(words, (3, i), n)
    out[4, i] = cuda.atomic.and_(words, (4, i), n)
    out[5, i] = cuda.atomic.or_(words, (5, i), n)
    out[6, i] = cuda.atomic.xor(words, (6, i), n)
    out[7, i] = cuda.atomic.exch(words, (7, i), n)
    out[8, i] = cuda.atomic.inc(words, (8, i), n)
    out[9, i] = cuda.atomic.dec(words, (9, i), n)


@pytest.mark.parametrize("in_shared", [False, True])
def test_numbas_atomics_work_in_arrays_and_in_shared_memory(in_shared):
    def kernel(words, changes, out):
        shared = cuda.shared.array((10, 64), np.uint32)
        i = cuda.threadIdx.x
        if in_shared:
            for j in range(10):
                shared[j, i] = words[j, i]
            change_each(shared, out, i, changes[i])
            for j in range(10):
                words[j, i] = shared[j, i]
        else:
            change_each(words, out, i, changes[i])

    memory = DeviceMemory()
    words, changes = words_with_edges(32), RANDOM.permuted(words_with_edges(32))
    changes[::4] = words[::4]
    given, out = memory.copy(np.tile(words, (10, 1))), memory.array((10, 64), "u4")
    compiled = cpuexec.compile_kernel(kernel, (TABLE, WORDS, TABLE))
    args = (given, memory.copy(changes), out)
    cpuexec.run(Launch(compiled, 1, 64, args), memory)
    np.testing.assert_array_equal(out, np.tile(words, (10, 1)))
    for got, model in zip(given.tolist(), ATOMICS, strict=True):
        pairs = zip(words.tolist(), changes.tolist(), strict=True)
        assert got == [model(old, n) for old, n in pairs]


def test_numbas_compare_and_swap_and_float_sum():
    floats = types.Array(types.float32, 1, "C")

    def kernel(words, total, out):
        i = cuda.threadIdx.x
        out[i] = cuda.atomic.cas(words, i, u32(5), u32(9))
        cuda.atomic.add(total, 0, np.float32(0.5))

    memory = DeviceMemory()
    words = memory.copy(np.array([5, 6] * 32, np.uint32))
    total, out = memory.array(1, np.float32), memory.array(64, np.uint32)
    compiled = cpuexec.compile_kernel(kernel, (WORDS, floats, WORDS))
    cpuexec.run(Launch(compiled, 1, 64, (words, total, out)), memory)
    assert (words.tolist(), out.tolist()) == ([9, 6] * 32, [5, 6] * 32)
    assert total[0] == 32


def test_fences_naps_and_selections_leave_values_alone():
    def kernel(words, out):
        i = cuda.threadIdx.x
        cuda.threadfence()
        cuda.threadfence_block()
        cuda.threadfence_system()
        cuda.nanosleep(u32(20))
        out[i] = cuda.selp(words[i] > u32(9), u32(1), u32(2))
        small, large = np.float32(words[i]), np.float32(9.5)
        out[i + 64] = u32(max(small, large)) * u32(100) + u32(min(small, large))

    memory = DeviceMemory()
    words, out = memory.copy(np.arange(64, dtype=np.uint32)), memory.array(128, "u4")
    compiled = cpuexec.compile_kernel(kernel, (WORDS, WORDS))
    cpuexec.run(Launch(compiled, 1, 64, (words, out)), memory)
    np.testing.assert_array_equal(out[:64], np.where(words > 9, 1, 2))
    large, small = np.maximum(words, 9), np.minimum(words, 9)
    np.testing.assert_array_equal(out[64:], large * 100 + small)


def test_arguments_keep_their_bits():
    argtypes = (types.uint64, types.uint64, types.int64, types.int32, types.float32)

    def kernel(out, a, b, c, d):
        store_u64(out, a)
        store_u64(out + u64(8), u64(b))
        store_u64(out + u64(16), u64(np.int64(c)))
        store_u64(out + u64(24), u64(d * np.float32(2)))

    memory = DeviceMemory()
    out = memory.array(4, np.uint64)
    compiled = cpuexec.compile_kernel(kernel, argtypes)
    args = (memory.address(out), 2**64 - 1, -(2**63), -5, 1.5)
    cpuexec.run(Launch(compiled, 1, 1, args), memory)
    assert out.tolist() == [2**64 - 1, 2**63, 2**64 - 5, 3]
