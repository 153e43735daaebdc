"""The clock of scores, and the least rank of a warp, against plain Python."""

from __future__ import annotations

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.layout import CLOCK, MAX_KEYS, TABLE_BYTES, TICK_SHIFT
from hps_numba.kernels.cuda.ptx import load_u32, load_u64, store_u32, store_u64
from hps_numba.kernels.cuda.scores import chance, least_in_warp, step_of, tick_after
from tests.kernels.cuda.device_kernels import Array, run_threads

u32, u64 = np.uint32, np.uint64

N = 2048
WORD = 2**64 - 1


def tables_with(clocks: Array, shifts: Array) -> Array:
    """Return a descriptor of a table each, of which nothing else is set."""
    tables = np.full((N, TABLE_BYTES // 8), 0xEE, np.uint64)
    tables[:, CLOCK // 8] = clocks
    tables[:, TICK_SHIFT // 8] = shifts
    return tables


def clock_kernel(tables, counts, out):
    i = u64(cuda.grid(1))
    table = tables + i * u64(TABLE_BYTES)
    step = step_of(table, load_u64(counts + i * u64(8)))
    store_u64(out + i * u64(24), step)
    store_u64(out + i * u64(24) + u64(8), u64(tick_after(table, u64(0))))
    store_u64(out + i * u64(24) + u64(16), u64(tick_after(table, step)))


def test_a_query_moves_the_clock_by_its_keys_and_a_tick_at_most() -> None:
    rng = np.random.default_rng(21)
    shifts = rng.integers(0, 25, N, np.uint64)
    ticks = np.uint64(1) << shifts
    counts = rng.integers(0, 2 * ticks, dtype=np.uint64)
    counts[:256] = ticks[:256]
    counts[256:512] = ticks[256:512] - np.uint64(1)
    counts[512:768] = ticks[512:768] + np.uint64(1)
    counts[768:800] = MAX_KEYS
    clocks = rng.integers(0, 2**48, N, np.uint64)
    # Just before the 256th tick, where the score begins again.
    clocks[::4] = (np.uint64(256) << shifts[::4]) - np.uint64(1)
    clocks[1::4] = (np.uint64(256) << shifts[1::4]) - ticks[1::4]
    out = np.full((N, 3), 0xEE, np.uint64)
    got = run_threads(clock_kernel, N, tables_with(clocks, shifts), counts, out=out)
    rows = zip(clocks.tolist(), shifts.tolist(), counts.tolist(), strict=True)
    expected = []
    for clock, shift, count in rows:
        step = min(count, 2**shift)
        expected.append([step, (clock >> shift) % 256, (clock + step >> shift) % 256])
    assert got.tolist() == expected
    moved = (got[:, 2] - got[:, 1]) % np.uint64(256)
    assert set(moved.tolist()) == {0, 1}
    whole = got[:, 0] == ticks
    assert set(moved[whole].tolist()) == {1}
    began_again = (got[:, 1] == 255) & (got[:, 2] == 0)
    assert np.count_nonzero(began_again) > N // 8


def chance_kernel(tables, scores, out):
    i = u64(cuda.grid(1))
    table = tables + i * u64(TABLE_BYTES)
    score = load_u64(scores + i * u64(8))
    for count in range(256):
        taken = chance(table, score, u32(count))
        store_u32(out + (i * u64(256) + u64(count)) * u64(4), u32(taken))


def test_a_use_counts_by_the_place_and_the_clock() -> None:
    rng = np.random.default_rng(22)
    clocks, scores = rng.integers(0, 2**64, (2, N), np.uint64)
    out = np.full((N, 256), 0xEEEEEEEE, np.uint32)
    given = tables_with(clocks, np.full(N, 16)), scores
    got = run_threads(chance_kernel, N, *given, out=out)
    mixed = (clocks ^ scores) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
    counts = np.arange(256, dtype=np.uint64)
    odds = (np.uint64(1) << (counts >> np.uint64(3))) - np.uint64(1)
    np.testing.assert_array_equal(got, (mixed[:, None] & odds) == 0)
    # A use of a way with few counts always counts; each 8 counts halve the odds.
    assert got[:, :8].all()
    taken = got.sum(axis=0)
    for count in range(8, 40, 8):
        odds_of_count = N / 2 ** (count // 8)
        assert abs(taken[count] - odds_of_count) < 5 * np.sqrt(odds_of_count)


def least_kernel(ranks, out):
    i = u64(cuda.grid(1)) * u64(4)
    store_u32(out + i, least_in_warp(load_u32(ranks + i), u32(cuda.laneid)))


def test_all_lanes_learn_the_least_rank_of_their_warp() -> None:
    rng = np.random.default_rng(23)
    ranks = rng.integers(0, 2**32, (128, 32), np.uint32)
    ranks[:32] |= np.uint32(2**31)
    ranks[np.arange(32), np.arange(32)] = np.arange(32)  # the least in each lane once
    ranks[32:64] = rng.integers(5, 8, (32, 32))  # equal ones
    ranks[64] = 2**32 - 1
    out = np.full((128, 32), 0xEEEEEEEE, np.uint32)
    got = run_threads(least_kernel, 128 * 32, ranks, out=out)
    least = np.repeat(ranks.min(axis=1, keepdims=True), 32, axis=1)
    np.testing.assert_array_equal(got, least)
