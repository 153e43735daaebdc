"""Where everything lies in device memory: rows, tables, and the workspace of a lookup.

A table is a number of *sets* of 28 *ways*. Of a set, three things lie apart:

- 64 bytes of metadata: ``seq`` (uint32) and 28 digests (uint8) in the first 32 bytes,
  all that a probe reads; 28 scores (uint8) in the second, written by hits;
- 28 keys (uint64);
- 28 rows, each at a multiple of 16 bytes.

Slot ``set * 28 + way`` numbers keys and rows; after the last slot's row lies the
table's default row. A digest of 0 marks an empty way, so every
int64 is a key. ``seq`` is odd while a writer works on the set.

Everything here is arithmetic on integers: no allocation, no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

WAYS = 28
SET_BYTES = 64
DIGESTS = 4  # offset of the digests in a set's metadata
SCORES = 32  # offset of the scores
KEY_BYTES = 8
ALIGNMENT = 256
MAX_DIM = 32768
MAX_KEYS = 1 << 24  # of one launch: positions take 24 bits of a claim

# Descriptor of a table: 64-bit words that kernels find at ``tables + index * 256``.
TABLE_BYTES = 256
META, KEYS, ROWS, N_SETS = 0, 8, 16, 24
STAMPS, STAMP_MASK, DOOR, DOOR_MASK = 32, 40, 48, 56
TICK_SHIFT = 64
# Words that kernels change, on lines of their own.
CLOCK, FLOOR = 128, 136
SIZE, HITS, MISSES, INSERTED = 160, 168, 176, 184
EVICTED, REFUSED, UPDATED = 192, 200, 208

# Header of a workspace, and after it 16 bytes of counters and of results a table.
GENERATION, TICKET, CLAIMS, CLAIM_MASK = 0, 8, 16, 24
FIRSTS, MISSING, UNIQUE, RESULTS = 32, 40, 48, 56
WORK_HEADER = 64
COUNTER_BYTES = 16
N_MISSING, N_UNIQUE_MISSING, N_HITS, N_UNIQUE_HITS = 0, 4, 8, 12

TABLE_TICKET = N_HITS  # of the counters: hits are what is left

# Counts of a dump, 64 bytes. The first two words are offsets for a query of its keys.
DUMPED = 8  # uint64: keys that the last dump wrote
DUMPED_BUSY = 16  # uint32: sets that it left out
DUMP_COUNT, DUMP_BUSY, DUMP_TICKET = 32, 36, 40
DUMP_BYTES = 64

N_BAGS = N_UNIQUE_HITS  # of a pooled query: bags with misses

NO_POSITION = 0xFFFFFFFF


class Policy(str, Enum):
    """Which way of a full set makes room for a new key."""

    LRU = "lru"
    LFU = "lfu"
    STATIC = "static"

    @property
    def two_sets(self) -> bool:
        """Whether a key may live in a second set beside its home set."""
        return self is Policy.STATIC


class Outcome(IntEnum):
    """What became of one key of an insert, an update or an eviction."""

    SKIPPED = 0  # not selected
    REPLACED = 1  # it was there; its row is new
    INSERTED = 2  # into an empty way
    EVICTED = 3  # inserted in place of another key; of an eviction, gone
    STALE = 4  # refused: the key was updated since its row was read
    TURNED_AWAY = 5  # by the doorkeeper
    FULL = 6  # no way is free, and nobody yields
    ABSENT = 7  # nothing to update or evict
    BUSY = 8  # its set was held for too long; to be tried again


_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def widest(n_bytes: int, limit: int = 16) -> int:
    """Return the widest access, 16 bytes at most, that divides ``n_bytes``."""
    return next(w for w in (16, 8, 4, 2) if w <= limit and n_bytes % w == 0)


def aligned(n_bytes: int, to: int = ALIGNMENT) -> int:
    """Return ``n_bytes`` rounded up to a multiple of ``to``."""
    return -(-n_bytes // to) * to


@dataclass(frozen=True)
class RowLayout:
    """How rows of one type are stored, and how they are handed out.

    A row moves in *units*: what one lane loads, converts and stores at once. A unit is
    16 bytes of output where the row allows, fewer where 16 do not divide it.

    Parameters
    ----------
    dim
        Values of a row, 1 to 32768.
    stored
        ``float32``, ``float16`` or ``bfloat16``.
    out
        ``float32`` or ``stored``; float32 unless given.
    alignment
        Bytes to which the output is aligned, at least the size of a value.
    """

    dim: int
    stored: str = "float32"
    out: str = "float32"
    alignment: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MAX_DIM:
            raise ValueError(f"dim={self.dim} is not between 1 and {MAX_DIM}")
        if self.stored not in _ITEM_BYTES:
            raise ValueError(
                f"stored={self.stored!r} is not {' or '.join(_ITEM_BYTES)}"
            )
        if self.out not in ("float32", self.stored):
            raise ValueError(f"out={self.out!r} is neither float32 nor {self.stored}")
        if self.alignment not in (2, 4, 8, 16) or self.alignment < self.out_item_bytes:
            raise ValueError(f"alignment={self.alignment} does not suit {self.out}")

    @property
    def item_bytes(self) -> int:
        """Bytes of a stored value."""
        return _ITEM_BYTES[self.stored]

    @property
    def out_item_bytes(self) -> int:
        """Bytes of a value in the output."""
        return _ITEM_BYTES[self.out]

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, and of a row that comes in."""
        return self.dim * self.item_bytes

    @property
    def stride_bytes(self) -> int:
        """Bytes from one stored row to the next."""
        return aligned(self.row_bytes, 16)

    @property
    def out_bytes(self) -> int:
        """Bytes of a row in the output."""
        return self.dim * self.out_item_bytes

    @property
    def store_bytes(self) -> int:
        """Bytes of a unit in the output."""
        return widest(self.out_bytes, self.alignment)

    @property
    def unit_values(self) -> int:
        """Values of a unit."""
        return self.store_bytes // self.out_item_bytes

    @property
    def load_bytes(self) -> int:
        """Bytes of a unit as stored."""
        return self.unit_values * self.item_bytes

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.dim // self.unit_values

    @property
    def name(self) -> str:
        """Name of this layout inside the names of kernels."""
        suffix = "" if self.alignment == 16 else f"_align{self.alignment}"
        return f"{self.stored}_{self.dim}_{self.out}{suffix}"


@dataclass(frozen=True)
class TableLayout:
    """One table of a cache.

    Parameters
    ----------
    n_sets
        Sets of 28 ways; the table holds ``28 * n_sets`` rows at most.
    n_stamps
        Update stamps, a power of two. Keys share them: more stamps, fewer backfills
        refused without need.
    tick_shift
        The clock of scores ticks every ``2 ** tick_shift`` keys.
    n_door
        Bytes of the doorkeeper, a power of two, or 0 for none.
    """

    n_sets: int
    n_stamps: int = 1 << 14
    tick_shift: int = 16
    n_door: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n_sets * WAYS < 1 << 32:
            raise ValueError(
                f"n_sets={self.n_sets} is not between 1 and {2**32 // WAYS}"
            )
        if not 0 <= self.tick_shift < 48:
            raise ValueError(f"tick_shift={self.tick_shift} is not between 0 and 47")
        for name, n in (("n_stamps", self.n_stamps), ("n_door", self.n_door or 1)):
            if n < 1 or n & (n - 1):
                raise ValueError(f"{name}={n} is not a power of two")

    @classmethod
    def for_rows(cls, n_rows: int, *, doorkeeper: bool = False) -> TableLayout:
        """Return a table with as many ways as there are rows, or up to 27 more.

        Of ``n_rows`` random keys about 92 % have a place in it at once. Ticks and the
        doorkeeper are sized as ``docs/decisions/0005-cache-policies.md`` found best.
        """
        n_sets = -(-n_rows // WAYS)
        n_slots = n_sets * WAYS
        return cls(
            n_sets,
            n_stamps=max(1 << 14, 1 << (n_sets - 1).bit_length()),
            tick_shift=max(0, n_slots.bit_length() - 3),
            n_door=4 << (n_slots - 1).bit_length() if doorkeeper else 0,
        )

    @property
    def n_slots(self) -> int:
        """Rows that the table holds at most."""
        return self.n_sets * WAYS


@dataclass(frozen=True)
class CacheLayout:
    """One block of device memory that holds the tables of a cache, rows of one type.

    From the front: descriptors, metadata, stamps, doorkeepers, keys, rows. The part
    before the keys must be zero before ``header`` is written to its front; default rows
    are written at ``default_row(table)``. Keys and other rows may hold anything.
    """

    rows: RowLayout
    tables: tuple[TableLayout, ...]
    _offsets: dict[str, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("a cache needs at least one table")
        sizes = {
            "meta": [t.n_sets * SET_BYTES for t in self.tables],
            "stamps": [t.n_stamps * 8 for t in self.tables],
            "door": [t.n_door for t in self.tables],
            "keys": [t.n_slots * KEY_BYTES for t in self.tables],
            "rows": [(t.n_slots + 1) * self.rows.stride_bytes for t in self.tables],
        }
        end = len(self.tables) * TABLE_BYTES
        offsets: dict[str, list[int]] = {}
        for part, parts in sizes.items():
            offsets[part] = []
            for n_bytes in parts:
                end = aligned(end)
                offsets[part].append(end)
                end += n_bytes
        object.__setattr__(self, "_offsets", offsets)
        object.__setattr__(self, "_n_bytes", aligned(end))

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole block."""
        n_bytes: int = self._n_bytes  # type: ignore[attr-defined]
        return n_bytes

    @property
    def n_zero_bytes(self) -> int:
        """Bytes at the front that must be zero at first."""
        return self._offsets["keys"][0]

    def offset(self, part: str, table: int) -> int:
        """Return where a part of a table begins: ``meta``, ``keys``, ``rows``, ..."""
        return self._offsets[part][table]

    def default_row(self, table: int) -> int:
        """Return the offset of a table's default row, in the stored type."""
        slots = self.tables[table].n_slots
        return self.offset("rows", table) + slots * self.rows.stride_bytes

    def header(self, base: int) -> npt.NDArray[np.uint8]:
        """Return the first bytes of a block at address ``base``, a multiple of 256."""
        block = np.zeros(len(self.tables) * TABLE_BYTES, np.uint8)
        for i, table in enumerate(self.tables):
            words = block[i * TABLE_BYTES :][:TABLE_BYTES].view(np.uint64)
            for word, part in (
                (META, "meta"),
                (KEYS, "keys"),
                (ROWS, "rows"),
                (STAMPS, "stamps"),
                (DOOR, "door"),
            ):
                words[word // 8] = base + self.offset(part, i)
            words[N_SETS // 8] = table.n_sets
            words[STAMP_MASK // 8] = table.n_stamps - 1
            words[DOOR_MASK // 8] = max(table.n_door, 1) - 1
            words[TICK_SHIFT // 8] = table.tick_shift
        return block


@dataclass(frozen=True)
class WorkLayout:
    """One block of device memory for the misses of a lookup, used by one stream.

    It must be zero before ``header`` is written to its front. Nothing has to be cleared
    between launches: each query leaves it as the next one needs it.

    Parameters
    ----------
    n_keys
        Keys of one query at most.
    n_tables
        Tables of one query at most.
    """

    n_keys: int
    n_tables: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n_keys <= MAX_KEYS:
            raise ValueError(f"n_keys={self.n_keys} is not between 1 and {MAX_KEYS}")
        if self.n_tables < 1:
            raise ValueError(f"n_tables={self.n_tables} is less than 1")

    @property
    def n_claims(self) -> int:
        """Entries of the table that finds duplicates: at least twice the keys."""
        return 1 << (2 * self.n_keys - 1).bit_length()

    @cached_property
    def _ends(self) -> list[int]:
        counters = aligned(WORK_HEADER + 2 * self.n_tables * COUNTER_BYTES)
        ends = [counters]
        for n_bytes in (8 * self.n_claims, 4 * self.n_keys, 8 * self.n_keys):
            ends.append(aligned(ends[-1] + n_bytes))
        return [*ends, aligned(ends[-1] + 8 * self.n_keys)]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole block."""
        return self._ends[-1]

    @property
    def results(self) -> int:
        """Offset of the results: uint32 (n_tables, 4), of which N_MISSING is first."""
        return WORK_HEADER + self.n_tables * COUNTER_BYTES

    @property
    def firsts(self) -> int:
        """Offset of uint32 (n_keys,): the unique number of a first occurrence."""
        return self._ends[1]

    @property
    def missing(self) -> int:
        """Offset of uint32 (n_keys, 2): position, and position of the first such key.

        Of a pooled query, apart from each other: [p, 1] for position p the first such
        key's, NO_POSITION for a hit; [i, 0] the table's i-th bag with misses, from the
        table's first key on.
        """
        return self._ends[2]

    @property
    def unique(self) -> int:
        """Offset of int64 (n_keys,): unique missing keys, a table's at its offset."""
        return self._ends[3]

    def header(self, base: int) -> npt.NDArray[np.uint8]:
        """Return the first bytes of the block at address ``base``."""
        words = np.zeros(WORK_HEADER // 8, np.uint64)
        words[CLAIMS // 8] = base + self._ends[0]
        words[CLAIM_MASK // 8] = self.n_claims - 1
        words[FIRSTS // 8] = base + self.firsts
        words[MISSING // 8] = base + self.missing
        words[UNIQUE // 8] = base + self.unique
        words[RESULTS // 8] = base + self.results
        # Generation 0 is what a cleared claim says; the first launch is another.
        words[GENERATION // 8] = 1
        return words.view(np.uint8)
