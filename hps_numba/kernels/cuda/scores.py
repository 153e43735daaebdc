"""What hits and inserts leave in a way's score, and which way of a full set yields.

LRU: a score is the tick of the table's clock at the last use, modulo 256. The way whose
tick is longest ago yields. LFU: a score counts uses, roughly as a logarithm.
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

LFU_START = 8
LFU_STEPS_SHIFT = 3  # counts a doubling takes: 2 ** 3


@cuda.jit(device=True, forceinline=True)
def tick_of(table):
    """Return the clock of a table's scores, modulo 256."""
    clock = load_u64(table + u64(CLOCK))
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

    A late store may fall on a way that has just changed its owner: harmless.
    """

    @cuda.jit(device=True, forceinline=True)
    def touch_lru(table, score):
        tick = tick_of(table)
        if load_u8(score) != tick:
            store_u8(score, tick)

    @cuda.jit(device=True, forceinline=True)
    def touch_lfu(table, score):
        count = load_u8(score)
        if count < u32(255) and chance(table, score, count):
            store_u8(score, u32(count + u32(1)))

    @cuda.jit(device=True, forceinline=True)
    def touch_nothing(table, score):
        pass

    return {
        Policy.LRU: touch_lru,
        Policy.LFU: touch_lfu,
        Policy.STATIC: touch_nothing,
    }[policy]


@cuda.jit(device=True, forceinline=True)
def least_in_warp(rank, lane):
    """Return the smallest uint32 of a warp, to all its lanes."""
    for distance in (16, 8, 4, 2, 1):
        other = shuffle_u32(rank, u32(lane ^ u32(distance)))
        rank = min(rank, other)
    return rank


@cache
def victim_chooser(policy: Policy) -> Any:
    """Return a device function: the way that yields in a full set, as a warp.

    Among equals the choice rotates with the set's number, so that keys inserted within
    one tick do not push each other out of one way.
    """

    @cuda.jit(device=True, forceinline=True)
    def choose(table, meta, seq, lane):
        rank = u32(0xFFFFFFFF)
        turn = u32((seq >> u32(1)) % u32(WAYS))
        if lane < u32(WAYS):
            worth = load_u8(meta + u64(SCORES) + u64(lane))
            if policy == Policy.LRU:
                worth = u32(u32(255) - u32(u32(tick_of(table) - worth) & u32(255)))
            order = u32(lane + u32(WAYS) - turn)
            if order >= u32(WAYS):
                order = u32(order - u32(WAYS))
            rank = u32(u32(worth << u32(5)) | order)
        least = least_in_warp(rank, lane)
        return u32(u32(u32(least & u32(31)) + turn) % u32(WAYS))

    return choose


@cache
def scorer(policy: Policy) -> Any:
    """Return a device function that scores a way whose row has just been written."""

    @cuda.jit(device=True, forceinline=True)
    def score_lru(table, score, replaced):
        store_u8(score, tick_of(table))

    @cuda.jit(device=True, forceinline=True)
    def score_lfu(table, score, replaced):
        if not replaced:
            store_u8(score, u32(LFU_START))

    @cuda.jit(device=True, forceinline=True)
    def score_nothing(table, score, replaced):
        pass

    return {
        Policy.LRU: score_lru,
        Policy.LFU: score_lfu,
        Policy.STATIC: score_nothing,
    }[policy]
