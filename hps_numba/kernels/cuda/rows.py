"""How rows move: units of a row, converted on the way, several in flight per lane."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.device import first_bit
from hps_numba.kernels.cuda.layout import RowLayout, widest
from hps_numba.kernels.cuda.ptx import (
    float16_bits_to_float32_bits,
    load_row,
    opaque,
    shuffle_u32,
    shuffle_u64,
    store_out,
    store_row,
)

u32, u64 = np.uint32, np.uint64


class UnitCode(NamedTuple):
    """Device functions that load a unit, convert it, and store it to the output."""

    load: Any
    convert: Any
    store: Any


def quad_load(n_bytes: int) -> Any:
    """Return a device function that loads 2 to 16 bytes of a row into four words."""
    load = load_row[n_bytes]
    if n_bytes >= 8:
        return load

    @cuda.jit(device=True, forceinline=True)
    def load_one(address):
        return load(address), u32(0), u32(0), u32(0)

    return load_one


def _quad_store(stores: dict[int, Any], n_bytes: int) -> Any:
    store = stores[n_bytes]
    if n_bytes >= 8:
        return store

    @cuda.jit(device=True, forceinline=True)
    def store_one(address, quad):
        store(address, quad[0])

    return store_one


@cuda.jit(device=True, forceinline=True)
def _same(quad):
    return quad


@cuda.jit(device=True, forceinline=True)
def _widen_float16(quad):
    low, high = quad[0], quad[1]
    return (
        float16_bits_to_float32_bits(u32(low & u32(0xFFFF))),
        float16_bits_to_float32_bits(u32(low >> u32(16))),
        float16_bits_to_float32_bits(u32(high & u32(0xFFFF))),
        float16_bits_to_float32_bits(u32(high >> u32(16))),
    )


@cuda.jit(device=True, forceinline=True)
def _widen_bfloat16(quad):
    # A bfloat16 is the upper half of a float32.
    low, high = quad[0], quad[1]
    return (
        u32(low << u32(16)),
        u32(low & u32(0xFFFF0000)),
        u32(high << u32(16)),
        u32(high & u32(0xFFFF0000)),
    )


@cache
def unit_code(rows: RowLayout) -> UnitCode:
    """Return how a unit of such rows is loaded, converted and stored."""
    if rows.out == rows.stored:
        convert = _same
    else:
        convert = _widen_float16 if rows.stored == "float16" else _widen_bfloat16
    return UnitCode(
        load=quad_load(rows.load_bytes),
        convert=convert,
        store=_quad_store(store_out, rows.store_bytes),
    )


@cache
def row_of_unit(units: int) -> Any:
    """Return a device function: in which row of ``units`` units a unit lies.

    A multiplication instead of a division: the error of ``magic``, below ``units``,
    times a unit of 32 rows of up to 32768 units stays below 2 ** 48, so the result is
    exact.
    """
    magic = -(-(1 << 48) // units)

    @cuda.jit(device=True, forceinline=True)
    def row_of(unit):
        return u32((u64(unit) * u64(magic)) >> u64(48))

    return row_of


@cache
def gather_rows(rows: RowLayout, stride_bytes: int, *, contiguous: bool) -> Any:
    """Return a device function that copies up to 32 rows to the output, as a warp.

    With ``contiguous`` the targets are rows one after the other, and ``target`` is the
    first one's address; without, each lane gives the address of its own.

    Unit ``i * 32 + lane`` of the 32 rows is lane's in round i, so that neighbours touch
    neighbouring bytes whatever the dim. Four rounds' loads are in flight before the
    first store. There is no branch between the
    loads: for a row that is not wanted, only the store is left out.
    """
    load, convert, store = unit_code(rows)
    units, load_bytes, store_bytes = rows.units, rows.load_bytes, rows.store_bytes
    whole_rounds = units % 4 == 0
    row_of = row_of_unit(units)

    @cuda.jit(device=True, forceinline=True)
    def fetch(base, number, unit):
        row = row_of(unit)
        part = u32(unit - u32(row * u32(units)))
        start = u64(shuffle_u32(number, u32(row & u32(31)))) * u64(stride_bytes)
        return load(base + start + u64(part) * u64(load_bytes))

    @cuda.jit(device=True, forceinline=True)
    def put(target, wanted, unit, quad):
        row = row_of(unit)
        address = target + u64(unit) * u64(store_bytes)
        if not contiguous:
            part = u32(unit - u32(row * u32(units)))
            address = shuffle_u64(target, u32(row & u32(31)))
            address = address + u64(part) * u64(store_bytes)
        if (u32(wanted >> u32(row & u32(31))) & u32(1)) != u32(0):
            store(address, convert(quad))

    @cuda.jit(device=True, forceinline=True)
    def gather(base, number, target, wanted, lane):
        """Copy row ``number`` of those at ``base``, for lanes in ``wanted``, not 0."""
        # Lanes that want no row ask for one that is wanted: it is there, and near.
        common = shuffle_u32(number, first_bit(wanted))
        if (u32(wanted >> lane) & u32(1)) == u32(0):
            number = common
        # Unrolled further, the loop would need more registers than it has time to win.
        end = opaque(u32(units))
        start = u32(0)
        while start < end:
            first = u32(start * u32(32) + lane)
            second = u32(first + u32(32))
            third = u32(first + u32(64))
            fourth = u32(first + u32(96))
            has_second = whole_rounds or u32(start + u32(1)) < u32(units)
            has_third = whole_rounds or u32(start + u32(2)) < u32(units)
            has_fourth = whole_rounds or u32(start + u32(3)) < u32(units)
            a = fetch(base, number, first)
            b = c = d = a
            if has_second:
                b = fetch(base, number, second)
            if has_third:
                c = fetch(base, number, third)
            if has_fourth:
                d = fetch(base, number, fourth)
            put(target, wanted, first, a)
            if has_second:
                put(target, wanted, second, b)
            if has_third:
                put(target, wanted, third, c)
            if has_fourth:
                put(target, wanted, fourth, d)
            start = u32(start + u32(4))

    return gather


@cache
def write_row(rows: RowLayout) -> Any:
    """Return a device function that copies one row of the caller's into its slot."""
    width = widest(rows.row_bytes)
    load, store = quad_load(width), _quad_store(store_row, width)
    n_units = rows.row_bytes // width

    @cuda.jit(device=True, forceinline=True)
    def write(source, target, lane):
        """Move units of the row, four in flight a lane."""
        end = opaque(u32(n_units))
        unit = lane
        while unit < end:
            second, third = u32(unit + u32(32)), u32(unit + u32(64))
            fourth = u32(unit + u32(96))
            # A lane without a unit there loads its first one again.
            a = load(source + u64(unit) * u64(width))
            b = load(source + u64(second if second < end else unit) * u64(width))
            c = load(source + u64(third if third < end else unit) * u64(width))
            d = load(source + u64(fourth if fourth < end else unit) * u64(width))
            store(target + u64(unit) * u64(width), a)
            if second < end:
                store(target + u64(second) * u64(width), b)
            if third < end:
                store(target + u64(third) * u64(width), c)
            if fourth < end:
                store(target + u64(fourth) * u64(width), d)
            unit = u32(unit + u32(128))

    return write
