from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.cuda.layout import WAYS, RowLayout, TableLayout
from hps_numba.kernels.cuda.operands import Batch
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.harness import dumped
from tests.kernels.cuda.sequences import EXTREME, fill, rows_for

TABLE = TableLayout(n_sets=40, n_stamps=64)


def _filled(n: int = 600, **options: object) -> CheckedCache:
    cache = CheckedCache(RowLayout(4), [TABLE, TABLE], **options)
    fill(cache, np.arange(n), rows_for(cache, n, seed=1))
    fill(cache, np.array(EXTREME), rows_for(cache, len(EXTREME), seed=1), table=1)
    return cache


@pytest.mark.parametrize(
    ("first", "n"), [(0, 40), (0, 0), (40, 0), (0, 1), (39, 1), (7, 8), (3, 33)]
)
def test_the_keys_of_a_range_of_sets_are_dumped(first: int, n: int) -> None:
    cache = _filled(preempt=0.02)
    cache.evict(np.arange(0, 600, 7))
    cache.dump(first, n)


def test_ranges_add_up_to_the_table() -> None:
    cache = _filled()
    parts = [cache.dump(first, 5) for first in range(0, 40, 5)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))


def test_every_int64_is_dumped() -> None:
    assert set(_filled().dump(table=1).tolist()) == set(EXTREME)


def test_full_and_empty_tables_are_dumped() -> None:
    cache = CheckedCache(RowLayout(4), [TABLE])
    assert cache.dump().size == 0
    fill(cache, np.arange(4000), rows_for(cache, 4000, seed=1))
    assert cache.dump().size == 40 * WAYS


def test_counts_are_ready_for_the_next_dump() -> None:
    cache = _filled()
    cpu = cache.cpu
    keys = cache.memory.array(40 * WAYS, np.int64)
    counts = cache.memory.array(64, np.uint8)
    for first, n in [(0, 40), (5, 10), (0, 0), (20, 20)]:
        addresses = [cache.memory.address(array) for array in (keys, counts)]
        cpu.cache.dump(0, first, n, keys=addresses[0], counts=addresses[1])
        found, busy = dumped((keys, counts))
        assert busy == 0
        assert set(found.tolist()) == cache.oracle.tables[0].dump(first, n)


def test_sets_under_a_writer_are_left_out_and_counted() -> None:
    cache = _filled()
    held = [0, 13]
    for n_set in held:
        cache.cpu.meta()[n_set, :4].view(np.uint32)[0] |= 1
    keys, busy = dumped(cache.cpu.dump(0, 20))
    assert busy == 2
    table = cache.oracle.tables[0]
    wanted = table.dump(0, 20) - table.dump(0, 1) - table.dump(13, 1)
    assert set(keys.tolist()) == wanted


def test_a_query_takes_the_number_of_keys_from_a_dump() -> None:
    cache = _filled()
    cpu = cache.cpu
    keys, counts = cpu.dump(10, 20)
    n = int(dumped((keys, counts))[0].size)
    out = cache.memory.array((keys.size, 4), np.float32)
    work, block = cpu.workspace(keys.size)
    batch = Batch(keys.size, *(cache.memory.address(a) for a in (keys, counts)))
    cpu.cache.query(batch, cache.memory.address(out), work, touch=False)
    results = block[work.layout.results :][:16].view(np.uint32)
    assert results.tolist() == [0, 0, n, 0]
    rows = cpu.contents()
    assert [row.tobytes() for row in out[:n]] == [rows[k] for k in keys[:n].tolist()]
    assert not out[n:].any()
