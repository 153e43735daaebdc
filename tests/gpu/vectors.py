"""What the oracle says of a key, for many keys at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hps_numba.kernels.cuda.layout import RowLayout
from tests.kernels.cuda.oracle import STORED, Array, handed_out

_CHUNK = 1 << 16
_THREADS = ThreadPoolExecutor(8)

u64 = np.uint64


def _turned_right(x: Array, n: int) -> Array:
    return (x >> u64(n)) | (x << u64(64 - n))


def hashes_of(keys: Array) -> Array:
    """Return the hashes of int64 keys as uint64."""
    x = keys.view(np.uint64)
    x = x ^ _turned_right(x, 25) ^ _turned_right(x, 50)
    x = x * u64(0xA24BAED4963EE407)
    x = x ^ _turned_right(x, 24) ^ _turned_right(x, 49)
    x = x * u64(0x9FB21C651E98DF25)
    return x ^ (x >> u64(28))


def sets_of(keys: Array, n_sets: int) -> Array:
    """Return the sets of keys; ``n_sets`` is below 2 ** 32."""
    return _scaled(hashes_of(keys), n_sets)


def second_sets_of(keys: Array, n_sets: int) -> Array:
    """Return the second sets that keys have in a static table."""
    step = _scaled(hashes_of(keys) << u64(24), n_sets - 1)
    return (sets_of(keys, n_sets) + 1 + step) % n_sets


def _scaled(words: Array, n: int) -> Array:
    """Return words as fractions of 2 ** 64, times ``n``."""
    high, low = words >> u64(32), words & u64(0xFFFFFFFF)
    return ((high * u64(n) + (low * u64(n) >> u64(32))) >> u64(32)).astype(np.int64)


def digests_of(keys: Array) -> Array:
    """Return the digests of keys, 1 to 255."""
    return (u64(1) + ((hashes_of(keys) & u64(0xFF)) * u64(255) >> u64(8))).astype(
        np.uint8
    )


def stamps_of(keys: Array, n_stamps: int) -> Array:
    """Return which update stamp each key has."""
    return ((hashes_of(keys) >> u64(8)) & u64(n_stamps - 1)).astype(np.int64)


def chunks(n: int) -> Iterator[slice]:
    """Yield parts of ``n`` rows that fit the caches of a core."""
    for start in range(0, n, _CHUNK):
        yield slice(start, min(n, start + _CHUNK))


def by_chunks(work: Callable[[slice], Array], n: int) -> Array:
    """Return what ``work`` makes of each part, put together; parts run on threads."""
    return np.concatenate(list(_THREADS.map(work, chunks(n)))) if n else work(slice(0))


def stored_rows(rows: RowLayout, numbers: Array, versions: Array) -> Array:
    """Return the rows of keys by number and version: any bits, of the stored type."""
    n_words = -(-rows.row_bytes // 4)
    places = np.arange(n_words, dtype=np.uint32) * np.uint32(0x85EBCA77)
    seeds = numbers.astype(np.uint32) * np.uint32(0x9E3779B1)
    seeds = seeds ^ (versions.astype(np.uint32) * np.uint32(0x27D4EB2F))

    def part(which: slice) -> Array:
        words = seeds[which, None] + places
        words ^= words >> np.uint32(15)
        words *= np.uint32(0x2C1B3C6D)
        words ^= words >> np.uint32(13)
        used = words.view(np.uint8)[:, : rows.row_bytes]
        return np.ascontiguousarray(used).view(STORED[rows.stored])

    made = by_chunks(part, len(numbers))
    return made.reshape(len(numbers), rows.dim)


def finite_rows(rows: RowLayout, numbers: Array, versions: Array) -> Array:
    """Return rows of values between 1 and 2 in the place of any bits."""
    bits = stored_rows(rows, numbers, versions).view(f"u{rows.item_bytes}")
    keep, ones = {
        "float32": (0x007FFFFF, 0x3F800000),
        "float16": (0x03FF, 0x3C00),
        "bfloat16": (0x007F, 0x3F80),
    }[rows.stored]
    kind = bits.dtype.type
    return ((bits & kind(keep)) | kind(ones)).view(STORED[rows.stored])


def differing(got: Array, stored: Array, rows: RowLayout) -> Array:
    """Return the places of output rows that are not those of the stored ones.

    Of a float16 that is widened any NaN will do: the conversion makes it a quiet one.
    """
    bits = f"u{rows.out_item_bytes}"
    widened = rows.stored == "float16" and rows.out == "float32"

    def part(which: slice) -> Array:
        wanted, given = handed_out(stored[which], rows), got[which]
        equal = given.view(bits) == np.ascontiguousarray(wanted).view(bits)
        if widened:
            equal |= np.isnan(given) & np.isnan(wanted)
        return ~equal.all(1)

    return np.flatnonzero(by_chunks(part, len(got)))
