"""Kernels of the benchmarks' own: rows to look up, a plain gather, random sectors."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from bench.gpu.device import Array
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.layout import RowLayout
from hps_numba.kernels.cuda.ptx import (
    FULL_WARP,
    load_const_u64,
    load_u32,
    store_u32,
)
from hps_numba.kernels.cuda.rows import gather_rows

u32, u64 = np.uint32, np.uint64

BLOCK = 128
NAP_NS = 2000
SECTOR_BYTES = 32
SECTORS_A_THREAD = 8
# Bits of a 4-byte word that differ between rows, and those that are always set, so that
# each value is from 1 to 2.
_BITS = {"float32": (0x007FFFFF, 0x3F800000), "float16": (0x03FF03FF, 0x3C003C00)}
_SECTOR_FACTOR, _SECTOR_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_ROW_FACTOR, _PLACE_FACTOR, _MIX = 0x9E3779B1, 0x85EBCA77, 0x2C1B3C6D


def has_words(rows: RowLayout) -> bool:
    """Return whether rows can be filled: whole words of a type that is known."""
    return rows.stored in _BITS and rows.row_bytes % 4 == 0


def row_words(rows: RowLayout, numbers: Array) -> Array:
    """Return the rows of these numbers as uint32 (n, words), as the kernel fills them.

    ``rows`` have a whole number of words, of float32 or float16.
    """
    mask, ones = (np.uint32(bits) for bits in _BITS[rows.stored])
    places = np.arange(rows.row_bytes // 4, dtype=np.uint32) * np.uint32(_PLACE_FACTOR)
    mixed = (numbers.astype(np.uint32) * np.uint32(_ROW_FACTOR))[:, None] + places
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(_MIX)
    mixed ^= mixed >> np.uint32(12)
    words: Array = (mixed & mask) | ones
    return words


def fill_kernel(rows: RowLayout) -> KernelSpec:
    """Return a kernel that writes ``n`` rows without gaps, numbered from ``first``.

    Launch   a thread per 4 bytes
    Writes   rows as ``row_words``
    """
    return _fill_kernel(rows.row_bytes // 4, rows.stored)


@cache
def _fill_kernel(n_words: int, stored: str) -> KernelSpec:
    mask, ones = _BITS[stored]

    def fill(out: Any, first: Any, n: Any) -> None:
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        number = thread // u64(n_words)
        if number < n:
            place = u32(thread - number * u64(n_words))
            row = u32(u32(first + number) * u32(_ROW_FACTOR))
            mixed = u32(row + u32(place * u32(_PLACE_FACTOR)))
            mixed = u32(mixed ^ u32(mixed >> u32(15)))
            mixed = u32(mixed * u32(_MIX))
            mixed = u32(mixed ^ u32(mixed >> u32(12)))
            word = u32(u32(mixed & u32(mask)) | u32(ones))
            store_u32(out + thread * u64(4), word)

    return KernelSpec(f"fill_{stored}_{n_words}", fill, "UUU", block=BLOCK)


@cache
def gather_kernel(rows: RowLayout) -> KernelSpec:
    """Return a gather by row number: a query's copy without its search.

    Launch   a thread per number, a warp copies the rows of its 32
    Reads    numbers uint64 (n,), rows without gaps
    Writes   out (n, dim)
    """
    copy = gather_rows(rows, rows.row_bytes, contiguous=True)
    out_bytes = rows.out_bytes

    def gather(base: Any, numbers: Any, n: Any, out: Any) -> None:
        lane = u32(cuda.laneid)
        position = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        number = u32(0)
        if position < n:
            number = u32(load_const_u64(numbers + position * u64(8)))
        wanted = u32(cuda.ballot_sync(FULL_WARP, position < n))
        if wanted != u32(0):
            target = out + (position - u64(lane)) * u64(out_bytes)
            copy(base, number, target, wanted, lane)

    return KernelSpec(f"gather_{rows.name}", gather, "UUUU", block=BLOCK)


@cache
def nap_kernel() -> KernelSpec:
    """Return a kernel that keeps a stream busy without touching memory.

    Launch   one warp
    Reads    ``n_naps`` of about two microseconds
    """

    def nap(n_naps: Any) -> None:
        for _ in range(n_naps):
            cuda.nanosleep(u32(NAP_NS))

    return KernelSpec("nap", nap, "U", block=32)


def sector_of(n: Array) -> Array:
    """Return random numbers of sectors, uint64, of which the kernel takes low bits."""
    mixed = n.astype(np.uint64) * np.uint64(_SECTOR_FACTOR)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(_SECTOR_MIX)
    drawn: Array = mixed >> np.uint64(16)
    return drawn


@cache
def sectors_kernel() -> KernelSpec:
    """Return a kernel that reads random sectors.

    Launch   a thread per ``SECTORS_A_THREAD`` sectors, all in flight together
    Reads    a word of each 32-byte sector; ``mask`` is their number less one
    Writes   out uint32 (n_threads,): the first words of a thread's sectors, combined by
             exclusive or, so that nothing of it can be left out
    """

    def sectors(base: Any, mask: Any, seed: Any, out: Any) -> None:
        thread = u64(cuda.blockIdx.x) * u64(BLOCK) + u64(cuda.threadIdx.x)
        total = u32(0)
        for i in range(SECTORS_A_THREAD):
            mixed = u64(seed + thread * u64(SECTORS_A_THREAD) + u64(i))
            mixed = u64(mixed * u64(_SECTOR_FACTOR))
            mixed = u64(mixed ^ u64(mixed >> u64(29))) * u64(_SECTOR_MIX)
            number = u64(mixed >> u64(16)) & mask
            total = u32(total ^ load_u32(base + number * u64(SECTOR_BYTES)))
        store_u32(out + thread * u64(4), total)

    return KernelSpec("sectors", sectors, "UUUU", block=BLOCK)
