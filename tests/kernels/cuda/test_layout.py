"""Where things lie: sizes, alignment, nothing on top of anything else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hps_numba.kernels.cuda import layout
from hps_numba.kernels.cuda.layout import (
    WAYS,
    CacheLayout,
    RowLayout,
    TableLayout,
    WorkLayout,
)

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KINDS = [
    ("float32", "float32"),
    ("float16", "float32"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
]
DIMS = [1, 2, 3, 4, 5, 8, 10, 16, 33, 64, 100, 128, 1000, 32767, 32768]


@pytest.mark.parametrize(("stored", "out"), KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_units_cover_a_row_exactly(dim: int, stored: str, out: str) -> None:
    rows = RowLayout(dim, stored, out)
    assert rows.row_bytes == dim * ITEM_BYTES[stored]
    assert rows.out_bytes == dim * ITEM_BYTES[out]
    assert rows.units * rows.unit_values == dim
    assert rows.units * rows.load_bytes == rows.row_bytes
    assert rows.units * rows.store_bytes == rows.out_bytes
    assert rows.stride_bytes % 16 == 0
    assert 0 <= rows.stride_bytes - rows.row_bytes < 16


@pytest.mark.parametrize(("stored", "out"), KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_a_unit_is_as_wide_as_the_row_allows(dim: int, stored: str, out: str) -> None:
    rows = RowLayout(dim, stored, out)
    out_bytes = dim * ITEM_BYTES[out]
    assert rows.store_bytes == max(w for w in (2, 4, 8, 16) if out_bytes % w == 0)


@pytest.mark.parametrize("alignment", [4, 8, 16])
def test_a_unit_is_no_wider_than_the_output_is_aligned(alignment: int) -> None:
    rows = RowLayout(64, alignment=alignment)
    assert rows.store_bytes == alignment
    assert rows.units * rows.unit_values == 64


def test_rows_that_no_kernel_can_hold_are_refused() -> None:
    for dim in (0, -1, 32769):
        with pytest.raises(ValueError, match=f"dim={dim}"):
            RowLayout(dim)
    with pytest.raises(ValueError, match="stored='int8'"):
        RowLayout(4, "int8")
    with pytest.raises(ValueError, match="out='float16'"):
        RowLayout(4, "float32", "float16")
    with pytest.raises(ValueError, match="alignment=2"):
        RowLayout(4, alignment=2)
    with pytest.raises(ValueError, match="alignment=32"):
        RowLayout(4, alignment=32)


def test_names_tell_layouts_apart() -> None:
    layouts = [
        RowLayout(dim, stored, out, alignment)
        for dim in DIMS
        for stored, out in KINDS
        for alignment in (4, 8, 16)
    ]
    assert len({rows.name for rows in layouts}) == len(layouts)
    assert all(rows.name.isidentifier() for rows in layouts)


TABLES = (
    TableLayout(n_sets=1, n_stamps=1),
    TableLayout(n_sets=7, n_stamps=64, n_door=128),
    TableLayout(n_sets=100, tick_shift=3),
)


@pytest.mark.parametrize("rows", [RowLayout(1), RowLayout(33, "float16")])
def test_parts_of_a_cache_are_aligned_and_apart(rows: RowLayout) -> None:
    cache = CacheLayout(rows, TABLES)
    parts = [(0, len(TABLES) * layout.TABLE_BYTES)]
    for i, table in enumerate(TABLES):
        sizes = {
            "meta": 64 * table.n_sets,
            "stamps": 8 * table.n_stamps,
            "door": table.n_door,
            "keys": 8 * WAYS * table.n_sets,
            "rows": (WAYS * table.n_sets + 1) * rows.stride_bytes,
        }
        for part, n_bytes in sizes.items():
            assert cache.offset(part, i) % 256 == 0
            parts.append((cache.offset(part, i), n_bytes))
        default = cache.default_row(i)
        assert default == parts[-1][0] + WAYS * table.n_sets * rows.stride_bytes
    parts.sort()
    for (start, n_bytes), (following, _) in itertools.pairwise(parts):
        assert start + n_bytes <= following
    assert parts[-1][0] + parts[-1][1] <= cache.n_bytes
    assert cache.n_bytes % 256 == 0


def test_what_must_be_zero_ends_before_keys_and_rows() -> None:
    cache = CacheLayout(RowLayout(8), TABLES)
    first_key = min(cache.offset("keys", i) for i in range(len(TABLES)))
    assert cache.n_zero_bytes == first_key
    for i, table in enumerate(TABLES):
        assert cache.offset("meta", i) + 64 * table.n_sets <= first_key
        assert cache.offset("stamps", i) + 8 * table.n_stamps <= first_key
        assert cache.offset("door", i) + table.n_door <= first_key


def test_the_header_of_a_cache_says_where_everything_is() -> None:
    cache, base = CacheLayout(RowLayout(8), TABLES), 0x7F00_0000_0000
    words = cache.header(base).view(np.uint64).reshape(len(TABLES), -1)
    assert words.shape[1] * 8 == layout.TABLE_BYTES
    for i, table in enumerate(TABLES):
        for offset, part in (
            (layout.META, "meta"),
            (layout.KEYS, "keys"),
            (layout.ROWS, "rows"),
            (layout.STAMPS, "stamps"),
            (layout.DOOR, "door"),
        ):
            assert words[i, offset // 8] == base + cache.offset(part, i)
        assert words[i, layout.N_SETS // 8] == table.n_sets
        assert words[i, layout.STAMP_MASK // 8] == table.n_stamps - 1
        assert words[i, layout.DOOR_MASK // 8] == max(table.n_door, 1) - 1
        assert words[i, layout.TICK_SHIFT // 8] == table.tick_shift
        assert not words[i, layout.CLOCK // 8 :].any()


def test_words_of_a_descriptor_do_not_overlap() -> None:
    constants = (
        *(layout.META, layout.KEYS, layout.ROWS, layout.N_SETS, layout.STAMPS),
        *(layout.STAMP_MASK, layout.DOOR, layout.DOOR_MASK, layout.TICK_SHIFT),
    )
    changing = (
        *(layout.CLOCK, layout.FLOOR, layout.SIZE, layout.HITS, layout.MISSES),
        *(layout.INSERTED, layout.EVICTED, layout.REFUSED, layout.UPDATED),
    )
    words = (*constants, *changing)
    assert len(set(words)) == len(words)
    assert all(word % 8 == 0 and word < layout.TABLE_BYTES for word in words)
    # What kernels change is on another cache line than what they only read.
    assert max(constants) // 128 < min(changing) // 128


@pytest.mark.parametrize("n_rows", [1, 28, 29, 1000, 10_000_000])
def test_a_table_for_rows_has_a_way_for_each(n_rows: int) -> None:
    table = TableLayout.for_rows(n_rows, doorkeeper=True)
    assert n_rows <= table.n_slots < n_rows + WAYS
    # A tick is more than an eighth of the ways, and a quarter at most.
    assert 1 << table.tick_shift <= max(1, table.n_slots / 4)
    assert 8 << table.tick_shift > table.n_slots
    assert table.n_stamps >= max(table.n_sets, 1 << 14)
    assert 4 * table.n_slots <= table.n_door < 8 * table.n_slots
    assert TableLayout.for_rows(n_rows).n_door == 0


def test_tables_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="n_sets=0"):
        TableLayout(n_sets=0)
    with pytest.raises(ValueError, match="n_sets="):
        TableLayout(n_sets=2**32 // WAYS + 1)
    with pytest.raises(ValueError, match="n_stamps=3"):
        TableLayout(n_sets=1, n_stamps=3)
    with pytest.raises(ValueError, match="n_stamps=0"):
        TableLayout(n_sets=1, n_stamps=0)
    for shift in (-1, 48):
        with pytest.raises(ValueError, match=f"tick_shift={shift}"):
            TableLayout(n_sets=1, tick_shift=shift)
    with pytest.raises(ValueError, match="n_door=12"):
        TableLayout(n_sets=1, n_door=12)
    with pytest.raises(ValueError, match="at least one table"):
        CacheLayout(RowLayout(1), ())


@pytest.mark.parametrize("n_keys", [1, 2, 31, 1024, 1025, 1 << 20])
@pytest.mark.parametrize("n_tables", [1, 26])
def test_parts_of_a_workspace_are_aligned_and_apart(n_keys: int, n_tables: int) -> None:
    work, base = WorkLayout(n_keys, n_tables), 0x1000
    words = work.header(base).view(np.uint64)
    claims = int(words[layout.CLAIMS // 8]) - base
    parts = [
        (0, layout.WORK_HEADER),
        (layout.WORK_HEADER, 16 * n_tables),
        (work.results, 16 * n_tables),
        (claims, 8 * work.n_claims),
        (work.firsts, 4 * n_keys),
        (work.missing, 8 * n_keys),
        (work.unique, 8 * n_keys),
    ]
    for (start, n_bytes), (following, _) in itertools.pairwise(parts):
        assert start + n_bytes <= following
    assert parts[-1][0] + parts[-1][1] <= work.n_bytes
    assert all(start % 256 == 0 for start, _ in parts[3:])
    assert work.n_claims >= 2 * n_keys
    assert work.n_claims & (work.n_claims - 1) == 0
    assert words[layout.CLAIM_MASK // 8] == work.n_claims - 1
    assert words[layout.FIRSTS // 8] == base + work.firsts
    assert words[layout.MISSING // 8] == base + work.missing
    assert words[layout.UNIQUE // 8] == base + work.unique
    assert words[layout.RESULTS // 8] == base + work.results
    assert words[layout.GENERATION // 8] != 0


def test_workspaces_that_cannot_be_are_refused() -> None:
    for n_keys in (0, layout.MAX_KEYS + 1):
        with pytest.raises(ValueError, match=f"n_keys={n_keys}"):
            WorkLayout(n_keys)
    with pytest.raises(ValueError, match="n_tables=0"):
        WorkLayout(1, 0)
