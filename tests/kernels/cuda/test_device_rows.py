"""Units of rows, their conversion, and weights, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from hps_numba.kernels.cuda import pooling
from hps_numba.kernels.cuda.layout import MAX_DIM, MAX_KEYS, RowLayout
from hps_numba.kernels.cuda.pooling import add_unit, inverse, weight_at
from hps_numba.kernels.cuda.ptx import (
    bits_to_float32,
    float32_to_bits,
    load_quad,
    load_u32,
    load_u64,
    store_row,
    store_u8,
    store_u32,
)
from hps_numba.kernels.cuda.rows import row_of_unit, unit_code
from tests.kernels.cuda.device_kernels import Array, run_threads

u32, u64 = np.uint32, np.uint64

WARP_ROWS = 32

store_quad = store_row[16]


@pytest.mark.parametrize("part", range(8))
def test_the_row_of_a_unit_is_exact_for_every_length_of_a_row(part: int) -> None:
    # It grows with the unit, so that the first and last unit of each row decide.
    rows = np.arange(WARP_ROWS)
    for units in range(part * MAX_DIM // 8 + 1, (part + 1) * MAX_DIM // 8 + 1):
        row_of = row_of_unit.__wrapped__(units).py_func
        firsts = rows * units
        np.testing.assert_array_equal(row_of(firsts), rows)
        np.testing.assert_array_equal(row_of(firsts + units - 1), rows)


@pytest.mark.parametrize("units", [1, 2, 3, 7, 25, 32, 250, 8191, 32767, 32768])
def test_a_kernel_finds_the_row_of_every_unit(units: int) -> None:
    row_of, n = row_of_unit(units), WARP_ROWS * units
    n_threads = 1024

    def kernel(out):
        for unit in range(cuda.grid(1), n, n_threads):
            store_u8(out + u64(unit), row_of(u32(unit)))

    got = run_threads(kernel, n_threads, out=np.full(n, 0xEE, np.uint8))
    np.testing.assert_array_equal(got, np.arange(n) // units)
    model = row_of.py_func(np.arange(n))
    np.testing.assert_array_equal(model, got)


def run_units(rows: RowLayout, source: Array, out: Array) -> Array:
    """Load, convert and store unit after unit, each as a thread."""
    code = unit_code(rows)
    load, convert, store = code.load, code.convert, code.store
    load_bytes, store_bytes = rows.load_bytes, rows.store_bytes

    def kernel(source, out):
        i = u64(cuda.grid(1))
        store(out + i * u64(store_bytes), convert(load(source + i * u64(load_bytes))))

    return run_threads(kernel, source.nbytes // load_bytes, source, out=out)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_unit_of_float16_becomes_float32(dim: int) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    rows = RowLayout(dim, "float16", "float32")
    assert rows.unit_values == dim
    got = run_units(rows, patterns, np.full(2**16, 0xEE, np.uint32))
    expected = patterns.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got[number], expected[number].view(np.uint32))
    assert np.isnan(got[~number].view(np.float32)).all()
    # The sign and the payload of a NaN come along; it is quiet.
    payload = (patterns[~number].astype(np.uint32) & 0x3FF) << 13
    sign = (patterns[~number].astype(np.uint32) & 0x8000) << 16
    nans = sign | payload | np.uint32(0x7FC00000)
    np.testing.assert_array_equal(got[~number], nans)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_unit_of_bfloat16_becomes_float32(dim: int) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    rows = RowLayout(dim, "bfloat16", "float32")
    assert rows.unit_values == dim
    got = run_units(rows, patterns, np.full(2**16, 0xEE, np.uint32))
    np.testing.assert_array_equal(got, patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_a_unit_that_is_not_converted_keeps_its_bits(dim: int, stored: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    rows = RowLayout(dim, stored, stored)
    assert rows.unit_values == dim
    got = run_units(rows, patterns, np.full(2**16, 0xEE, np.uint16))
    np.testing.assert_array_equal(got, patterns)


def inverse_kernel(numbers, out):
    i = u64(cuda.grid(1)) * u64(4)
    value = inverse(bits_to_float32(load_u32(numbers + i)))
    store_u32(out + i, float32_to_bits(value))


def lengths_of_bags() -> Array:
    """Return float32: 1 to 100,000, and longer ones up to a launch's keys."""
    longer = np.linspace(100_001, MAX_KEYS, 352).astype(np.int64)
    return np.concatenate([np.arange(1, 100_001), longer]).astype(np.float32)


def distances(inverses: Array, numbers: Array) -> Array:
    """Return how many float32 each is from the one nearest to 1 / n."""
    nearest = np.float32(1) / numbers
    return np.abs(inverses.view(np.int32) - nearest.view(np.int32))


def test_an_inverse_is_the_nearest_float_or_its_neighbour() -> None:
    numbers = lengths_of_bags()
    out = np.zeros(len(numbers), np.float32)
    got = run_threads(inverse_kernel, len(numbers), numbers, out=out)
    assert distances(got, numbers).max() == 1
    powers = np.isin(numbers, 2.0 ** np.arange(25))
    assert np.count_nonzero(powers) > 16
    np.testing.assert_array_equal(got[powers], 1 / numbers[powers])


@pytest.mark.parametrize(
    ("off", "distance"), [(-1, 1), (0, 1), (1, 1), (-64, 2), (-16, 2), (16, 2), (64, 2)]
)
def test_an_inverse_is_close_whichever_way_and_however_far_the_guess_is_off(
    off: int, distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guess(numbers: Array) -> Array:
        bits = (np.float32(1) / numbers).view(np.int32) + np.int32(off)
        return bits.view(np.float32)

    monkeypatch.setattr(pooling, "roughly_inverse", guess)
    numbers = lengths_of_bags()
    assert distances(inverse.py_func(numbers), numbers).max() <= distance


def weight_kernel(weights, positions, scales, out):
    i = u64(cuda.grid(1))
    position = load_u64(positions + i * u64(8))
    scale = bits_to_float32(load_u32(scales + i * u64(4)))
    given = weight_at(weights, position, scale)
    store_u32(out + i * u64(8), float32_to_bits(given))
    alone = weight_at(u64(0), position, scale)
    store_u32(out + i * u64(8) + u64(4), float32_to_bits(alone))


def test_a_weight_is_the_scale_times_what_is_given_if_anything_is() -> None:
    rng = np.random.default_rng(31)
    weights = rng.standard_normal(1000).astype(np.float32)
    weights[:4] = [0.0, -0.0, np.inf, 1e-45]
    positions = rng.integers(0, 1000, 512, np.uint64)
    positions[:5] = [0, 1, 2, 3, 999]
    scales = rng.random(512).astype(np.float32)
    scales[10:20] = 1
    out = np.zeros((512, 2), np.float32)
    got = run_threads(weight_kernel, 512, weights, positions, scales, out=out)
    expected = np.stack([scales * weights[positions], scales], axis=1)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def add_kernel(totals, units, weights, out):
    i = u64(cuda.grid(1))
    start = load_quad(totals + i * u64(16))
    total = (
        bits_to_float32(start[0]),
        bits_to_float32(start[1]),
        bits_to_float32(start[2]),
        bits_to_float32(start[3]),
    )
    weight = bits_to_float32(load_u32(weights + i * u64(4)))
    wanted = (i & u64(1)) == u64(0)
    total = add_unit(total, load_quad(units + i * u64(16)), weight, wanted)
    bits = (
        float32_to_bits(total[0]),
        float32_to_bits(total[1]),
        float32_to_bits(total[2]),
        float32_to_bits(total[3]),
    )
    store_quad(out + i * u64(16), bits)


def test_a_row_that_is_not_wanted_leaves_the_sum_alone_even_if_it_is_nan() -> None:
    rng = np.random.default_rng(32)
    # Whole numbers, so that the sums are exact.
    totals, units = rng.integers(-1000, 1000, (2, 512, 4)).astype(np.float32)
    weights = rng.integers(-50, 50, 512).astype(np.float32)
    units[1::4], units[3::4] = np.nan, np.inf
    weights[5::16] = np.nan
    out = np.zeros((512, 4), np.float32)
    got = run_threads(add_kernel, 512, totals, units, weights, out=out)
    expected = totals.copy()
    expected[::2] += weights[::2, None] * units[::2]
    np.testing.assert_array_equal(got, expected)
