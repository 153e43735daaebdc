"""How rows are summed: a warp's 32 rows, weighted, into one row of float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.layout import RowLayout
from hps_numba.kernels.cuda.ptx import (
    bits_to_float32,
    float32_to_bits,
    load_const_u32,
    opaque,
    roughly_inverse,
    shuffle_u32,
)
from hps_numba.kernels.cuda.rows import quad_load, unit_code

u32, u64, f32 = np.uint32, np.uint64, np.float32

WEIGHT_BYTES = 4


@cuda.jit(device=True, forceinline=True)
def inverse(n):
    """Return 1 / n of a positive float32: the nearest float32, or its neighbour."""
    guess = roughly_inverse(n)
    return f32(guess + f32(guess * f32(f32(1) - f32(n * guess))))


@cuda.jit(device=True, forceinline=True)
def weight_at(weights, position, scale):
    """Return the weight of an occurrence; ``weights`` may be address 0."""
    weight = scale
    if weights != u64(0):
        given = load_const_u32(weights + position * u64(WEIGHT_BYTES))
        weight = f32(scale * bits_to_float32(given))
    return weight


@cuda.jit(device=True, forceinline=True)
def add_unit(total, bits, weight, wanted):
    """Return ``total`` with a weighted unit; a row that is not wanted may be NaN."""
    if wanted:
        return (
            f32(total[0] + f32(weight * bits_to_float32(bits[0]))),
            f32(total[1] + f32(weight * bits_to_float32(bits[1]))),
            f32(total[2] + f32(weight * bits_to_float32(bits[2]))),
            f32(total[3] + f32(weight * bits_to_float32(bits[3]))),
        )
    return total


@cuda.jit(device=True, forceinline=True)
def _add_float(value, lane):
    other = shuffle_u32(float32_to_bits(value), lane)
    return f32(value + bits_to_float32(other))


@cache
def sum_rows(rows: RowLayout, stride_bytes: int) -> Any:
    """Return a device function that adds a warp's rows to one row of the output.

    A row takes as many lanes as it has units, rounded up to a power of two, 32 at most;
    so a warp reads several short rows at once and adds them up at the end. The order of
    the additions follows from the bag, from which of its keys hit, and from the pieces
    in which the others were fetched: the same in the same case.
    """
    code = unit_code(rows)
    load, convert, store = code.load, code.convert, code.store
    load_out = quad_load(rows.store_bytes)
    units, load_bytes, store_bytes = rows.units, rows.load_bytes, rows.store_bytes
    lanes = min(32, 1 << (units - 1).bit_length())
    at_once = 32 // lanes
    row_shift = lanes.bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    def fetch(base, number, row, unit):
        start = u64(shuffle_u32(number, u32(row & u32(31)))) * u64(stride_bytes)
        return convert(load(base + start + u64(unit) * u64(load_bytes)))

    @cuda.jit(device=True, forceinline=True)
    def add_row(total, bits, weight, wanted, row):
        known = bits_to_float32(
            shuffle_u32(float32_to_bits(weight), u32(row & u32(31)))
        )
        is_wanted = row < u32(32) and (u32(wanted >> u32(row & u32(31))) & u32(1)) != 0
        return add_unit(total, bits, known, is_wanted)

    @cuda.jit(device=True, forceinline=True)
    def unit_sum(base, number, weight, wanted, n_rows, unit, lane):
        """Return this lane's unit, summed over the rows that its group reads."""
        total = f32(0), f32(0), f32(0), f32(0)
        for start in range(0, n_rows, 4 * at_once):
            first = u32(u32(start) + u32(lane >> u32(row_shift)))
            second = u32(first + u32(at_once))
            third = u32(first + u32(2 * at_once))
            fourth = u32(first + u32(3 * at_once))
            a = fetch(base, number, first, unit)
            b = fetch(base, number, second, unit)
            c = fetch(base, number, third, unit)
            d = fetch(base, number, fourth, unit)
            total = add_row(total, a, weight, wanted, first)
            total = add_row(total, b, weight, wanted, second)
            total = add_row(total, c, weight, wanted, third)
            total = add_row(total, d, weight, wanted, fourth)
        return total

    @cuda.jit(device=True, forceinline=True)
    def accumulate(base, number, weight, wanted, n_rows, target, fresh, lane):
        """Add rows to the row at ``target``, or begin it where ``fresh``."""
        tile, end = u32(0), u32(units) if units <= 32 else opaque(u32(units))
        while tile < end:
            unit = u32(tile + u32(lane & u32(lanes - 1)))
            exists = unit < u32(units)
            part = unit if exists else u32(0)
            a, b, c, d = unit_sum(base, number, weight, wanted, n_rows, part, lane)
            distance = u32(lanes)
            while distance < u32(32):
                other = u32(lane ^ distance)
                a, b = _add_float(a, other), _add_float(b, other)
                c, d = _add_float(c, other), _add_float(d, other)
                distance = u32(distance << u32(1))
            if exists and lane < u32(lanes):
                address = target + u64(unit) * u64(store_bytes)
                total = a, b, c, d
                if not fresh:
                    before = load_out(address)
                    total = add_unit(total, before, f32(1), True)
                a, b, c, d = total
                store(
                    address,
                    (
                        float32_to_bits(a),
                        float32_to_bits(b),
                        float32_to_bits(c),
                        float32_to_bits(d),
                    ),
                )
            tile = u32(tile + u32(32))

    return accumulate
