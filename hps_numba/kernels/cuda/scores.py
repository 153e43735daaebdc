"""What hits and inserts leave in a way's score, and which way of a full set yields.

LRU: a score is the tick of the table's clock at the last use, modulo 256. The way
whose tick is longest ago yields. LFU: a score counts uses, roughly as a logarithm. The
numbers here come from ``docs/decisions/0005-cache-policies.md``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.layout import CLOCK, SCORES, TICK_SHIFT, WAYS, Policy
from hps_numba.kernels.cuda.ptx import (
    load_const_u64,
    load_u8,
    load_u64,
    shuffle_u32,
    store_u8,
)

u32, u64 = np.uint32, np.uint64

AGE_AT_INSERT = 2  # ticks: hits outlive what came in beside them
LFU_START = 1
LFU_STEPS_SHIFT = 3  # counts a doubling of the odds takes: 2 ** 3
LFU_HALVING = 56  # writes to a set between two halvings of its counts


@cuda.jit(device=True, forceinline=True)
def step_of(table, n_keys):
    """Return how far a query moves the clock: one tick at most, however many keys."""
    tick = u64(1) << load_const_u64(table + u64(TICK_SHIFT))
    return min(n_keys, tick)


@cuda.jit(device=True, forceinline=True)
def tick_after(table, step):
    """Return the tick, modulo 256, of a table's clock after another ``step``."""
    clock = load_u64(table + u64(CLOCK)) + step
    return u32((clock >> load_const_u64(table + u64(TICK_SHIFT))) & u64(0xFF))


@cuda.jit(device=True, forceinline=True)
def chance(table, score, count):
    """Return true once in 2 ** (count >> 3) uses, by the way's place and the clock."""
    mixed = (score ^ load_u64(table + u64(CLOCK))) * u64(0x9E3779B97F4A7C15)
    odds = u32(u32(u32(1) << u32(count >> u32(LFU_STEPS_SHIFT))) - u32(1))
    return (u32(mixed >> u64(32)) & odds) == u32(0)


@cache
def toucher(policy: Policy) -> Any:
    """Return a device function that records a hit; others may be writing the score.

    Hits of a launch bear the tick that the clock will show after it, and so do inserts
    of what it missed. A late store may fall on a way that has just changed its owner:
    harmless.
    """

    @cuda.jit(device=True, forceinline=True)
    def touch_lru(table, score, n_keys):
        tick = tick_after(table, step_of(table, n_keys))
        if load_u8(score) != tick:
            store_u8(score, tick)

    @cuda.jit(device=True, forceinline=True)
    def touch_lfu(table, score, n_keys):
        count = load_u8(score)
        if count < u32(255) and chance(table, score, count):
            store_u8(score, u32(count + u32(1)))

    @cuda.jit(device=True, forceinline=True)
    def touch_nothing(table, score, n_keys):
        pass

    return {
        Policy.LRU: touch_lru,
        Policy.LFU: touch_lfu,
        Policy.STATIC: touch_nothing,
    }[policy]


@cuda.jit(device=True, forceinline=True)
def least_in_warp(rank, lane):
    """Return the smallest uint32 of a warp, to all its lanes."""
    distance = u32(16)
    while distance > u32(0):
        rank = min(rank, shuffle_u32(rank, u32(lane ^ distance)))
        distance = u32(distance >> u32(1))
    return rank


@cache
def victim_chooser(policy: Policy) -> Any:
    """Return a device function: the way that yields in a full set, as a warp.

    Among equals the choice rotates with the set's number, so that keys inserted within
    one tick do not push each other out of one way. Counts of LFU are halved now and
    then, so that what was popular once can go.
    """
    by_age = policy == Policy.LRU  # compiled code does not compare members of an enum

    @cuda.jit(device=True, forceinline=True)
    def choose(table, meta, seq, lane):
        rank = u32(0xFFFFFFFF)
        turn = u32((seq >> u32(1)) % u32(WAYS))
        if lane < u32(WAYS):
            score = meta + u64(SCORES) + u64(lane)
            worth = load_u8(score)
            if by_age:
                age = u32(u32(tick_after(table, u64(0)) - worth) & u32(255))
                worth = u32(u32(255) - age)
            elif u32(u32(seq >> u32(1)) + u32(1)) % u32(LFU_HALVING) == u32(0):
                worth = u32(worth >> u32(1))
                store_u8(score, worth)
            order = u32(lane + u32(WAYS) - turn)
            if order >= u32(WAYS):
                order = u32(order - u32(WAYS))
            rank = u32(u32(worth << u32(5)) | order)
        least = least_in_warp(rank, lane)
        return u32(u32(u32(least & u32(31)) + turn) % u32(WAYS))

    return choose


@cache
def scorer(policy: Policy) -> Any:
    """Return a device function that scores a way which has just got another key."""

    @cuda.jit(device=True, forceinline=True)
    def score_lru(table, score):
        tick = tick_after(table, u64(0))
        store_u8(score, u32(tick - u32(AGE_AT_INSERT)) & u32(0xFF))

    @cuda.jit(device=True, forceinline=True)
    def score_lfu(table, score):
        store_u8(score, u32(LFU_START))

    @cuda.jit(device=True, forceinline=True)
    def score_nothing(table, score):
        pass

    return {
        Policy.LRU: score_lru,
        Policy.LFU: score_lfu,
        Policy.STATIC: score_nothing,
    }[policy]
