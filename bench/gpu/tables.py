"""A filled cache, the same rows in a dense table, and keys to look up in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.gpu.device import Array, Device, Scratch
from bench.gpu.kernels import BLOCK, fill_kernel, row_words
from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.layout import (
    DUMP_BYTES,
    DUMPED,
    MAX_KEYS,
    SIZE,
    WAYS,
    CacheLayout,
    Policy,
    RowLayout,
    TableLayout,
    WorkLayout,
)
from hps_numba.kernels.cuda.operands import Workspace

_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = np.uint64(pow(_FACTOR, -1, 1 << 64))


def keys_of(numbers: Array) -> Array:
    """Return the keys of rows by their numbers, all over int64."""
    return ((numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)).view(
        np.int64
    )


def numbers_of(keys: Array) -> Array:
    """Return the numbers of keys as uint64."""
    numbers: Array = keys.view(np.uint64) * _INVERSE - np.uint64(1)
    return numbers


@dataclass(frozen=True)
class Lookup:
    """Keys of several launches, one after the other, in device memory.

    Launch i has ``n`` keys from ``i * n`` on. ``numbers`` are those of their rows;
    ``absent`` tells which of them are not in the cache.
    """

    n: int
    n_launches: int
    numbers: Array
    absent: Array
    keys: int
    indices: int

    def at(self, i: int) -> slice:
        """Return which of all keys launch ``i`` has."""
        return slice(i * self.n, (i + 1) * self.n)


class Table:
    """One cache of one table, filled to a load.

    Parameters
    ----------
    device
        Where it lies.
    rows
        How rows lie in it.
    n_slots
        Rows that it holds at most, roughly.
    load
        Share of the slots that are taken; from 1 on, as many as can be had.
    seed
        Of the order of keys.
    """

    def __init__(
        self, device: Device, rows: RowLayout, *, n_slots: int, load: float, seed: int
    ) -> None:
        self.device = device
        self.rows = rows
        self.nominal_load = load
        self.rng = np.random.default_rng(seed)
        layout = TableLayout.for_rows(n_slots)
        # Not every key finds room in its set when the table is nearly full.
        self.n_rows = int(layout.n_slots * (1.6 if load >= 1 else load))
        self.memory = scratch = Scratch(device)
        self.cache = build_cache(device, rows, [layout], scratch.block)
        self.dense = scratch.block(self.n_rows * rows.row_bytes)
        self.fill(self.dense, 0, self.n_rows)
        keys = scratch.upload(keys_of(np.arange(self.n_rows)))
        self.insert_range(keys, 0, self.n_rows)
        self.resident = self.rng.permutation(self._dumped())

    @property
    def load(self) -> float:
        """Share of the slots that are taken."""
        return len(self.resident) / self.cache.layout.tables[0].n_slots

    def fill(self, address: int, first: int, n: int) -> None:
        """Write the rows with these numbers."""
        spec = fill_kernel(self.rows)
        grid = -(-n * (self.rows.row_bytes // 4) // BLOCK), 1
        launch = self.device.gpu.launcher.launch
        launch(spec, grid, (address, first, n), self.device.stream)

    def insert_range(self, keys: int, first: int, n: int) -> None:
        """Insert rows of the dense table; ``keys`` is the address of all its keys."""
        for start in range(first, first + n, MAX_KEYS):
            self.cache.insert(
                0,
                min(MAX_KEYS, first + n - start),
                keys=keys + 8 * start,
                values=self.dense + start * self.rows.row_bytes,
                epoch=0,
                stream=self.device.stream,
            )

    def size(self) -> int:
        """Return how many keys the cache has."""
        return int(self.device.read(self.cache.base + SIZE, 1, np.uint64)[0])

    def _dumped(self) -> Array:
        """Return the numbers of all keys that are in the cache."""
        device, n_sets = self.device, self.cache.layout.tables[0].n_sets
        with device.scratch() as scratch:
            keys = scratch.block(n_sets * WAYS * 8)
            counts = scratch.block(DUMP_BYTES)
            device.gpu.zero(counts, DUMP_BYTES, device.stream)
            self.cache.dump(
                0, 0, n_sets, keys=keys, counts=counts, stream=device.stream
            )
            n = int(device.read(counts + DUMPED, 1, np.uint64)[0])
            return numbers_of(device.read(keys, n, np.int64))

    def lookup(
        self,
        n: int,
        n_launches: int,
        *,
        block: Callable[[Array], int],
        hit_rate: float = 1.0,
        zipf: float | None = None,
    ) -> Lookup:
        """Draw keys for launches: each once over all of them, or by a power law.

        ``block`` puts an array into device memory.
        """
        total = n * n_launches
        if zipf is None:
            numbers = self.resident[:total].copy()
        else:
            numbers = self.resident[_ranks(self.rng, len(self.resident), total, zipf)]
        absent = np.zeros(total, bool)
        n_absent = round(total * (1 - hit_rate))
        if n_absent:
            absent[self.rng.permutation(total)[:n_absent]] = True
            # Numbers past the table's: nobody ever inserted them.
            numbers[absent] = self.n_rows + np.arange(n_absent, dtype=np.uint64)
        indices = np.where(absent, np.uint64(0), numbers)
        keys = keys_of(numbers)
        return Lookup(n, n_launches, numbers, absent, block(keys), block(indices))

    def expected(self, numbers: Array) -> Array:
        """Return rows as queries give them out, of the output's type."""
        stored = row_words(self.rows, numbers).view(self.rows.stored)
        return stored.astype(self.rows.out)

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()


def build_cache(
    device: Device,
    rows: RowLayout,
    tables: list[TableLayout],
    block: Callable[[int], int],
) -> Cache:
    """Return an empty cache in memory that ``block`` gives."""
    layout = CacheLayout(rows, tuple(tables))
    base = block(layout.n_bytes)
    device.gpu.zero(base, layout.n_zero_bytes, device.stream)
    device.write(base, layout.header(base))
    for i in range(len(tables)):
        device.gpu.zero(base + layout.default_row(i), rows.row_bytes, device.stream)
    return Cache(layout, Policy.LRU, base=base, launcher=device.gpu.launcher)


def build_workspace(
    device: Device, n_keys: int, block: Callable[[int], int], *, n_tables: int = 1
) -> Workspace:
    """Return a workspace in memory that ``block`` gives."""
    layout = WorkLayout(n_keys, n_tables)
    base = block(layout.n_bytes)
    device.gpu.zero(base, layout.n_bytes, device.stream)
    device.write(base, layout.header(base))
    return Workspace(layout, base)


def _ranks(rng: np.random.Generator, n_rows: int, n: int, exponent: float) -> Array:
    """Return ranks from 0 on, the r-th with a probability like ``(r + 1) ** -e``."""
    weights = np.arange(1, n_rows + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights)
    ranks = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
    clipped: Array = np.minimum(ranks, n_rows - 1)
    return clipped
