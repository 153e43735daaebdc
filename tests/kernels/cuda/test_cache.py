"""What a cache checks before it launches, and what it launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.layout import (
    WAYS,
    CacheLayout,
    Policy,
    RowLayout,
    TableLayout,
    WorkLayout,
)
from hps_numba.kernels.cuda.operands import Bags, Batch, Workspace
from tests.kernels.cuda.harness import CpuCache

KEYS, VALUES, OUT, WORK = 0x1000, 0x2000, 0x3000, Workspace(WorkLayout(100, 2), 0x4000)


class Recorder:
    """Notes launches instead of running them."""

    def __init__(self) -> None:
        self.launches: list[tuple[KernelSpec, tuple[int, int], tuple[Any, ...]]] = []

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        assert len(args) == len(spec.argtypes)
        self.launches.append((spec, grid, tuple(args)))


def cache_of(
    rows: RowLayout, policy: Policy = Policy.LRU, n_tables: int = 2
) -> tuple[Cache, Recorder]:
    recorder = Recorder()
    layout = CacheLayout(rows, (TableLayout(n_sets=10),) * n_tables)
    return Cache(layout, policy, base=0x10000, launcher=recorder), recorder


@pytest.mark.parametrize("out", ["float32", "float16"])
@pytest.mark.parametrize("policy", list(Policy))
def test_all_that_is_launched_can_be_compiled_ahead(out: str, policy: Policy) -> None:
    cache, recorder = cache_of(RowLayout(16, "float16", out), policy)
    rows = {"keys": KEYS, "values": VALUES, "epoch": 1}
    cache.query(Batch(10, KEYS), OUT, WORK)
    cache.query(Batch(10, KEYS), OUT, WORK, touch=False)
    cache.scatter(Batch(10, KEYS), 0, VALUES, first=0, n_rows=1, out=OUT, work=WORK)
    cache.insert(0, 10, **rows)
    cache.update(0, 10, **rows, outcomes=OUT)
    cache.evict(0, 10, keys=KEYS, epoch=1, outcomes=OUT)
    cache.clear(0, epoch=1, busy=OUT)
    cache.dump(0, 0, 10, keys=KEYS, counts=OUT)
    if out == "float32":
        batch, bags = Batch(3, KEYS), Bags(VALUES, 10)
        cache.pooled_query(batch, bags, OUT, WORK)
        cache.pooled_scatter(
            batch, bags, 0, VALUES, first=0, n_rows=1, out=OUT, work=WORK
        )
    launched = {spec.name for spec, _, _ in recorder.launches}
    assert launched == {spec.name for spec in cache.kernels()}


def test_caches_that_give_rows_out_in_other_types_share_a_launcher() -> None:
    named: dict[str, KernelSpec] = {}
    for out in ("float32", "float16"):
        cache, _ = cache_of(RowLayout(16, "float16", out))
        for spec in cache.kernels():
            assert named.setdefault(spec.name, spec) is spec


def test_a_query_takes_blocks_of_the_longest_table_for_each() -> None:
    cache, recorder = cache_of(RowLayout(16))
    cache.query(Batch(90, KEYS), OUT, WORK)
    cache.query(Batch(100, KEYS, VALUES, 2, 60), OUT, WORK)
    (spec, one, _), (_, two, _) = recorder.launches
    assert one == (-(-90 // spec.block), 1)
    assert two == (-(-60 // spec.block), 2)


def test_an_empty_query_is_launched_and_reports() -> None:
    cache = CpuCache(RowLayout(4))
    answer = cache.query(np.zeros(0, np.int64))
    assert answer.results() == [0, 0, 0, 0]
    work = (answer.work, answer.block)
    assert cache.total("clock") == cache.total("hits") == cache.total("misses") == 0
    # The workspace is ready for another one.
    again = cache.query(np.array([5, 5], np.int64)[:1], work=work)
    assert again.results() == [1, 1, 0, 0]


def test_writes_of_nothing_launch_nothing() -> None:
    cache, recorder = cache_of(RowLayout(16))
    cache.insert(0, 0, keys=0, values=0, epoch=0)
    cache.update(0, 0, keys=0, values=0, epoch=0, outcomes=0)
    cache.evict(0, 0, keys=0, epoch=0, outcomes=0)
    batch = Batch(10, KEYS)
    cache.scatter(batch, 0, VALUES, first=0, n_rows=0, out=OUT, work=WORK)
    assert [grid[0] * grid[1] for _, grid, _ in recorder.launches] == [0, 0, 0, 0]


def test_more_keys_than_the_workspace_holds_are_refused() -> None:
    cache, recorder = cache_of(RowLayout(16))
    with pytest.raises(ValueError, match="101 keys exceed the workspace's 100"):
        cache.query(Batch(101, KEYS), OUT, WORK)
    with pytest.raises(ValueError, match="101 keys exceed the workspace's 100"):
        cache.pooled_query(Batch(1, KEYS), Bags(VALUES, 101), OUT, WORK)
    assert recorder.launches == []


def test_more_tables_than_there_are_are_refused() -> None:
    cache, recorder = cache_of(RowLayout(16), n_tables=1)
    with pytest.raises(ValueError, match="2 tables from table 0 on exceed"):
        cache.query(Batch(10, KEYS, VALUES, 2, 5), OUT, WORK)
    for table in (-1, 1):
        with pytest.raises(ValueError, match=f"table {table} is none"):
            cache.insert(table, 1, keys=KEYS, values=VALUES, epoch=0)
        with pytest.raises(ValueError, match=f"table {table} is none"):
            cache.update(table, 1, keys=KEYS, values=VALUES, epoch=0, outcomes=OUT)
        with pytest.raises(ValueError, match=f"table {table} is none"):
            cache.evict(table, 1, keys=KEYS, epoch=0, outcomes=OUT)
        with pytest.raises(ValueError, match=f"table {table} is none"):
            cache.clear(table, epoch=0, busy=OUT)
        with pytest.raises(ValueError, match=f"table {table} is none"):
            cache.dump(table, 0, 1, keys=KEYS, counts=OUT)
    assert recorder.launches == []


def test_rows_that_are_not_aligned_are_refused() -> None:
    cache, recorder = cache_of(RowLayout(16))
    with pytest.raises(ValueError, match="values=0x2004 are not aligned to 16 bytes"):
        cache.insert(0, 1, keys=KEYS, values=VALUES + 4, epoch=0)
    with pytest.raises(ValueError, match="values=0x2008 are not aligned to 16 bytes"):
        cache.update(0, 1, keys=KEYS, values=VALUES + 8, epoch=0, outcomes=OUT)
    batch = Batch(10, KEYS)
    with pytest.raises(ValueError, match="values=0x2004 are not aligned to 16 bytes"):
        cache.scatter(batch, 0, VALUES + 4, first=0, n_rows=1, out=OUT, work=WORK)
    with pytest.raises(ValueError, match="table 1 is none of the query's 1"):
        cache.scatter(batch, 1, VALUES, first=0, n_rows=1, out=OUT, work=WORK)
    assert recorder.launches == []


def test_a_launch_has_one_table_at_least_and_no_more_than_a_grid() -> None:
    for n_tables in (0, 65536):
        with pytest.raises(ValueError, match=f"n_tables={n_tables}"):
            Batch(1, KEYS, VALUES, n_tables)
    with pytest.raises(ValueError, match="first_table=-1 is negative"):
        Batch(1, KEYS, first_table=-1)
    cache, _ = cache_of(RowLayout(16))
    with pytest.raises(ValueError, match="2 tables from table 1 on exceed"):
        cache.query(Batch(10, KEYS, VALUES, 2, 5, first_table=1), OUT, WORK)


def test_a_table_without_doorkeeper_admits_nobody_on_probation() -> None:
    cache, recorder = cache_of(RowLayout(16))
    with pytest.raises(ValueError, match="table 0 has no doorkeeper"):
        cache.insert(0, 1, keys=KEYS, values=VALUES, epoch=0, admit=True)
    assert recorder.launches == []


@pytest.mark.parametrize(("first", "n"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_sets_that_a_table_lacks_are_not_dumped(first: int, n: int) -> None:
    cache, recorder = cache_of(RowLayout(16))
    with pytest.raises(ValueError, match="exceed the 10 of table 0"):
        cache.dump(0, first, n, keys=KEYS, counts=OUT)
    assert recorder.launches == []


def test_an_output_that_is_less_aligned_gets_a_kernel_of_its_own() -> None:
    cache, recorder = cache_of(RowLayout(16))
    for out in (OUT, OUT + 4, OUT + 8, OUT + 16):
        cache.query(Batch(10, KEYS), out, WORK)
    names = [spec.name for spec, _, _ in recorder.launches]
    assert names[0] == names[3]
    assert "align4" in names[1]
    assert "align8" in names[2]
    with pytest.raises(ValueError, match="is not aligned to float32"):
        cache.query(Batch(10, KEYS), OUT + 2, WORK)


def test_rows_are_pooled_as_float32_only() -> None:
    cache, _ = cache_of(RowLayout(16, "float16", "float16"))
    with pytest.raises(ValueError, match="pooled rows are float32, not float16"):
        cache.pooled_query(Batch(1, KEYS), Bags(VALUES, 10), OUT, WORK)


def test_blocks_that_a_launch_lacks_look_for_nothing() -> None:
    cache = CpuCache(RowLayout(4), [TableLayout(n_sets=8)])
    cache.insert(np.arange(100), np.ones((100, 4), np.float32))
    keys, address = cache.put(np.arange(1000))
    work, block = cache.workspace(1000)
    out = cache.memory.array((1000, 4), np.float32, fill=7)
    batch = Batch(1000, address, n_longest=200)
    cache.cache.query(batch, cache.memory.address(out), work)
    results = block[work.layout.results :][:16].view(np.uint32).tolist()
    assert results == [156, 156, 100, 0]  # of 256 keys: two blocks of 128
    assert (out[256:] == 7).all()
    assert keys.size == 1000


def test_one_table_is_asked_alone() -> None:
    cache = CpuCache(RowLayout(4), [TableLayout(n_sets=8)] * 3)
    n = 8 * WAYS
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    cache.insert(np.arange(10), rows, table=1)
    keys, counts = cache.dump(table=1)
    # The counts of a dump are the offsets of a query of its keys.
    work, block = cache.workspace(n)
    out = cache.memory.array((n, 4), np.float32)
    batch = Batch(
        n,
        cache.memory.address(keys),
        cache.memory.address(counts),
        first_table=1,
    )
    cache.cache.query(batch, cache.memory.address(out), work, touch=False)
    results = block[work.layout.results :][:16].view(np.uint32).tolist()
    assert results == [0, 0, 10, 0]
    assert (out[:10] == rows[keys[:10]]).all()
    assert [cache.total("hits", table) for table in range(3)] == [0, 0, 0]
