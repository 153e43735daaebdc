"""Keys, rows and random operations for the tests of kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hps_numba.kernels.cuda.layout import TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.checked_pooling import Part, pooled_query, pooled_scatter
from tests.kernels.cuda.hashes import digest_of, door_of, set_of
from tests.kernels.cuda.oracle import Array

RAGGED = (0, 1, 31, 32, 33, 255, 256, 257, 1000)
LATEST = 2**64 - 1  # an epoch
EXTREME = (-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 2, 2**63 - 1)
# One set, a few with a doorkeeper and too few stamps, and many.
TABLES = (
    TableLayout(1, n_stamps=8, tick_shift=4),
    TableLayout(7, n_stamps=32, tick_shift=6, n_door=64),
    TableLayout(64, n_stamps=1024, tick_shift=9, n_door=1024),
)
N_KEYS = (60, 500, 3000)  # that each table is asked for; half of them fit, or more


def rows_for(cache: CheckedCache, n: int, *, seed: int) -> Array:
    """Return finite rows of the stored type, bfloat16 as its bits."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, cache.rows.dim)).astype(np.float32)
    if cache.rows.stored == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(cache.cpu.stored)


def keys_of_set(cache: CheckedCache, n_set: int = 0, table: int = 0) -> set[int]:
    """Return the keys that a set holds in the cache's memory."""
    taken = cache.cpu.digests(table)[n_set] != 0
    return set(cache.cpu.stored_keys(table)[n_set][taken].tolist())


def bits_for(cache: CheckedCache, n: int, *, seed: int) -> Array:
    """Return rows of any bits: NaN, infinity, denormals and minus zero among them."""
    bits = f"u{cache.rows.item_bytes}"
    rng = np.random.default_rng(seed)
    size = n, cache.rows.dim
    rows = rng.integers(0, 1 << 8 * cache.rows.item_bytes, size).astype(bits)
    half = cache.rows.stored == "float16"
    special = [0x8000, 0x0001, 0x7C00, 0xFC00, 0x7C01, 0xFE00]
    if not half:
        special = [0x8000, 0x0001, 0x7F80, 0xFF80, 0x7F81, 0xFFC0]
    words = np.array(special, bits) << (8 * cache.rows.item_bytes - 16)
    chosen = rng.random(size) < 0.2
    rows[chosen] = rng.choice(words, int(chosen.sum()))
    return rows.view(cache.cpu.stored)


def fill(cache: CheckedCache, keys: Array, rows: Array, *, table: int = 0) -> None:
    """Write keys and rows to memory without a kernel."""
    one = cache.oracle.tables[table]
    for key, row in zip(keys.tolist(), rows, strict=True):
        one.count(one.insert(key, row.tobytes(), epoch=LATEST)[0])
    cache.restore(table, {n_set for key in keys.tolist() for n_set in one.sets_of(key)})


def keys_in_set(
    n: int, *, n_sets: int = 1, n_set: int = 0, digest: int | None = None
) -> Array:
    """Return ``n`` keys of one set, and of one digest if it is given."""
    found: list[int] = []
    key = 0
    while len(found) < n:
        if set_of(key, n_sets) == n_set and digest in (None, digest_of(key)):
            found.append(key)
        key += 1
    return np.array(found, np.int64)


def key_pool(n: int, rng: np.random.Generator) -> Array:
    """Return extreme keys, consecutive ones, and keys from anywhere."""
    anywhere = rng.integers(-(2**63), 2**63, n, np.int64)
    parts = (EXTREME, range(2, 2 + n // 2), anywhere.tolist())
    keys = dict.fromkeys(key for part in parts for key in part)
    return np.array(list(keys)[:n], np.int64)


class RandomOperations:
    """Random operations on a cache of ``TABLES``, each compared with the oracle.

    Every table has an epoch that updates move on; inserts name one of the last few.
    """

    def __init__(self, cache: CheckedCache, seed: int) -> None:
        self.cache = cache
        self.rng = np.random.default_rng(seed)
        self.pools = [key_pool(n, self.rng) for n in N_KEYS]
        self.epochs = [2] * len(TABLES)
        self.work = cache.cpu.workspace(4096, len(TABLES))
        for i in range(len(TABLES)):
            cache.set_default(i, self._rows(1)[0])

    def run(self, n_keys: int) -> None:
        """Run until each kernel has had so many keys."""
        operations: dict[str, Callable[[], None]] = {
            "query": self.query,
            "scatter": self.query,
            "insert": self.insert,
            "update": self.update,
            "evict": self.evict,
            "dump": self.dump,
        }
        if self.cache.rows.out == "float32":
            operations["pooled query"] = operations["pooled scatter"] = self.pool
        # Nothing is found in a cache that is empty.
        with self.cache.memory.scratch():
            for _ in range(6):
                self.insert()
        left = list(operations)
        while left:
            with self.cache.memory.scratch():
                operations[str(self.rng.choice(left))]()
                # Nothing is found in a cache that is only emptied.
                if self.rng.random() < 0.3:
                    self.insert()
            left = [name for name in left if self.cache.keys[name] < n_keys]

    # -- single operations

    def query(self) -> None:
        n_tables = int(self.rng.integers(1, len(TABLES) + 1))
        parts = [self._some_keys(table) for table in range(n_tables)]
        flags = self.rng.random(3) < 0.5
        answer, found = self.cache.query(
            *parts,
            fill=bool(flags[0]),
            count_unique=bool(flags[1]),
            touch=bool(flags[2]),
            work=self.work,
        )
        table = int(self.rng.integers(n_tables))
        n_missing = answer.results(table)[1]
        first, window = 0, int(self.rng.choice([3, 64, 1000]))
        while first < n_missing:
            # The last rows of the last window are nobody's.
            self.cache.scatter(answer, found, table, self._rows(window), first)
            first += window if window > 3 else n_missing // 4 + 1

    def pool(self) -> None:
        n_tables = int(self.rng.integers(1, len(TABLES) + 1))
        parts = [self._some_bags(table) for table in range(n_tables)]
        n = sum(len(bag) for part in parts for bag in part)
        weighted = self.rng.random() < 0.5
        weights = self.rng.standard_normal(n).astype(np.float32) if weighted else None
        flags = self.rng.random(2) < 0.5
        run = pooled_query(
            self.cache,
            *parts,
            weights=weights,
            mean=bool(flags[0]),
            fill=bool(flags[1]),
            work=self.work,
        )
        for table in range(n_tables):
            split = int(self.rng.integers(0, 20))
            pooled_scatter(self.cache, run, table, self._rows(split))
            pooled_scatter(self.cache, run, table, self._rows(1000), split)

    def insert(self) -> None:
        table, keys = self._some_unique_keys()
        # So few keys of one set can still be put in order.
        keys = keys[: max(18, 8 * TABLES[table].n_sets)]
        n_door = TABLES[table].n_door
        admit = bool(n_door and self.rng.random() < 0.5)
        if admit:
            # Sets that share no entry are explained one by one.
            entries = [door_of(key, n_door) for key in keys.tolist()]
            keys = keys[np.sort(np.unique(entries, return_index=True)[1])]
        n = len(keys)
        selected = self.rng.integers(0, 2, n) if self.rng.random() < 0.3 else None
        self.cache.insert(
            keys,
            self._rows(n),
            table=table,
            epoch=self.epochs[table] - int(self.rng.choice([0, 0, 0, 1, 2])),
            selected=selected,
            admit=admit,
            make_room=bool(self.rng.random() < 0.8),
        )

    def update(self) -> None:
        table, keys = self._some_unique_keys()
        self.epochs[table] += 1
        rows = self._rows(len(keys))
        self.cache.update(keys, rows, table=table, epoch=self.epochs[table])

    def evict(self) -> None:
        table, keys = self._some_unique_keys()
        self.epochs[table] += 1
        if self.rng.random() < 0.1:
            self.cache.clear(table=table, epoch=self.epochs[table])
        else:
            self.cache.evict(keys, table=table, epoch=self.epochs[table])

    def dump(self) -> None:
        table = int(self.rng.integers(len(TABLES)))
        ends = self.rng.integers(0, TABLES[table].n_sets + 1, 2)
        self.cache.dump(int(ends.min()), int(np.ptp(ends)), table=table)

    # -- what they are given

    def _rows(self, n: int) -> Array:
        return rows_for(self.cache, n, seed=int(self.rng.integers(2**32)))

    def _some_keys(self, table: int) -> Array:
        n = int(self.rng.choice(RAGGED))
        if self.rng.random() < 0.1:
            return np.repeat(self.rng.choice(self.pools[table], 1), n)
        return self.rng.choice(self.pools[table], n)

    def _some_unique_keys(self) -> tuple[int, Array]:
        table = int(self.rng.integers(len(TABLES)))
        pool = self.pools[table]
        n = min(int(self.rng.choice(RAGGED)), len(pool))
        return table, self.rng.choice(pool, n, replace=False)

    def _some_bags(self, table: int) -> Part:
        lengths = self.rng.choice([0, 1, 2, 7, 31, 32, 33, 65, 100], 12)
        n_bags = int(self.rng.integers(0, 13))
        pool = self.pools[table]
        return [self.rng.choice(pool, n).tolist() for n in lengths[:n_bags]]
