"""What ``make gpu`` does, tiny; over the stand-in where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import records
from bench.gpu import compiling, parts, report, tables, timing, works
from bench.gpu.__main__ import main
from bench.gpu.baselines import Libraries
from bench.gpu.device import Device
from bench.gpu.kernels import BLOCK, fill_kernel, row_words
from bench.gpu.plan import SMOKE_PLAN
from bench.harness import Timing
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import Policy, RowLayout
from tests.bench.gpu_runs import run_of
from tests.bench.libraries import Torch, WrongCupy
from tests.gpu import stress
from tests.gpu.bigtable import BigTable
from tests.gpu.mirrored import MirroredMemory

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("cubins")]

ROWS = RowLayout(32)
LATEST = 2**63


@pytest.fixture
def table(device: Device) -> Iterator[tables.Table]:
    made = tables.Table(device, ROWS, n_slots=28 * 40, load=0.5, seed=1)
    yield made
    made.close()


# -- the whole -------------------------------------------------------------------------


def test_a_tiny_run_checks_and_measures_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--smoke", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "failed: none" in said
    found = {p.stem: records.read(p) for p in tmp_path.glob("*.jsonl")}
    assert set(found) == {
        *("checks", "copy", "sectors", "small", "query", "pooled", "update", "dump"),
        *("scatter", "insert", "tables", "served", "served_hits", "run"),
    }
    checked = {r.variant.partition(":")[0]: r.median for r in found["checks"]}
    assert set(checked) >= {
        *("graph replays", "random operations", "races", "large tables"),
    }
    assert all(n > 0 for n in checked.values())
    goals = {r.name for one in found.values() for r in one for x in r.ratios if x.floor}
    assert goals == {"small", "query", "insert"}
    assert "compute-sanitizer racecheck" in found["run"][0].absent
    assert "compute-sanitizer racecheck" in said
    served = {r.variant for r in found["served"]}
    assert served >= {"prepared", "prepared, launch only"}
    tables_of = report.all_tables(report.load(tmp_path, "smoke"))
    assert report.NOTHING not in tables_of
    assert "insert, evicting" in tables_of


def test_without_time_everything_is_named_as_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--smoke", "--minutes", "0", "--out", str(tmp_path)]) == 0
    (left,) = records.read(tmp_path / "run.jsonl")
    assert left.absent["races"] == left.absent["centre"] == "no time left"
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]
    assert "left out: shapes: no time left" in capsys.readouterr().out


def test_points_that_there_is_no_time_for_are_named(
    device: Device, tmp_path: Path
) -> None:
    run = run_of(device, tmp_path, seconds=0.0)
    assert list(run.within("query, keys", (32, 64))) == []
    assert run.not_run == {
        "query, keys, 32": "no time left",
        "query, keys, 64": "no time left",
    }


def test_a_part_that_fails_fails_the_run_and_not_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoilt(*args: Any) -> Any:
        raise AssertionError("rows are wrong")

    monkeypatch.setattr(works.Stage, "check_rows", spoilt)
    out = ["--out", str(tmp_path)]
    assert main(["--smoke", "--only", "loads", *out]) == 1
    assert main(["--smoke", "--only", "memory", *out]) == 0
    failure, end, *_ = records.read(tmp_path / "run.jsonl")
    assert failure.absent == {"loads": "failed: AssertionError: rows are wrong"}
    # Reports have the newest of two results that are called the same.
    assert end.absent["loads"] == failure.absent["loads"]


# -- baselines -------------------------------------------------------------------------


def test_baselines_are_compared_and_wrong_ones_left_out(
    device: Device,
    table: tables.Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = Torch(device)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", WrongCupy(device))
    run = run_of(device, tmp_path)
    assert not run.libraries.absent
    lines = list(parts.lookups(run, table, n=64, embedding=True))
    assert [line.variant for line in lines] == [
        *("query", "gather kernel", "torch.index_select", "torch embedding"),
    ]
    query = lines[0]
    assert [r.against for r in query.ratios] == [line.variant for line in lines[1:]]
    assert "AssertionError: 512 rows of 512 are wrong" in query.absent["cupy.take"]
    assert "index_select" in torch.calls
    (pooled,) = parts.pooled_lookups(run, table)
    assert pooled.absent == {"torch embedding_bag": "NotImplementedError: no sums here"}


def test_a_gather_of_ours_that_is_wrong_fails(
    device: Device, table: tables.Table, tmp_path: Path
) -> None:
    first = device.read(table.dense, table.n_rows * ROWS.row_bytes, np.uint8)
    device.write(table.dense, first ^ np.uint8(1))
    with pytest.raises(AssertionError, match="512 rows of 512 are wrong"):
        list(parts.lookups(run_of(device, tmp_path), table, n=64))


def test_gathers_that_cannot_change_the_type_of_rows_are_left_out_by_name(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", Torch(device))
    monkeypatch.setitem(sys.modules, "cupy", None)
    run = run_of(device, tmp_path)
    half = RowLayout(32, "float16")
    table = tables.Table(device, half, n_slots=28 * 40, load=0.5, seed=1)
    lines = list(parts.lookups(run, table, n=64))
    table.close()
    assert [line.variant for line in lines] == ["query", "gather kernel"]
    reason = "rows of float16 do not become float32 on the way"
    assert lines[0].absent == {
        "torch.index_select": reason,
        "cupy": run.libraries.absent["cupy"],
    }


def test_the_goal_is_the_fastest_gather(device: Device, tmp_path: Path) -> None:
    rounds = np.ones(3)
    found = timing.Timed(
        {
            name: Timing(name, 1, rounds * s, rounds * s, quiet=True)
            for name, s in (("query", 2.0), ("gather kernel", 3.0), ("cupy.take", 1.0))
        },
        {},
    )
    run = run_of(device, tmp_path)
    line, *_ = parts.lookup_lines(run, ROWS, found, {}, goals=True)
    floors = {r.against: r.floor for r in line.ratios}
    assert floors == {"gather kernel": None, "cupy.take": 0.9, "8 G/s": 1.0}
    medians = {r.against: r.median for r in line.ratios}
    assert medians == {"gather kernel": 1.5, "cupy.take": 0.5, "8 G/s": 0.5 / 8e9}


def test_other_libraries_are_left_out_where_asked(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", Torch(device))
    alone = Libraries(device, alone=True)
    assert (alone.torch, alone.cupy) == (None, None)
    assert alone.absent == dict.fromkeys(("torch", "cupy"), "left out, as was asked")
    assert alone.versions() == {}


def test_the_device_is_busy_while_the_host_queues_what_is_timed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    launch, seconds = device.gpu.launcher.launch, device.seconds

    def launched(spec: Any, *args: Any) -> None:
        done.append(spec.name)
        launch(spec, *args)

    def timed(replay: Any) -> float:
        done.append("clock")
        return seconds(replay)

    monkeypatch.setattr(device.gpu.launcher, "launch", launched)
    monkeypatch.setattr(device, "seconds", timed)
    work = timing.Work("nothing", lambda i: None, 2, 1, lambda: None)
    found = timing.measure(device, [work], SMOKE_PLAN).timings["nothing"]
    assert done == ["nap", "clock"] * (1 + len(found.calls))


def test_what_cannot_be_captured_is_launched(device: Device) -> None:
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        device.wait()  # which no capture allows

    work = timing.Work("waiting", call, 3, 1, lambda: None)
    found = timing.measure(device, [work], SMOKE_PLAN)
    assert set(found.timings) == {"waiting"}
    assert seen[:3] == seen[-3:] == [0, 1, 2]
    assert found.timings["waiting"].marks == ("launched",)
    captured = timing.Work("nothing", lambda i: None, 2, 1, lambda: None)
    both = timing.measure(device, [captured, work], SMOKE_PLAN).timings
    assert {name: one.marks for name, one in both.items()} == {
        "nothing": (),
        "waiting": ("launched",),
    }


# -- tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_rows_are_filled_by_their_numbers(device: Device, stored: str) -> None:
    rows = RowLayout(32, stored, stored)
    n, first = 90, 2**31 - 40
    block = device.block(n * rows.row_bytes)
    grid = -(-n * (rows.row_bytes // 4) // BLOCK), 1
    args = (block.address, first, n)
    device.gpu.launcher.launch(fill_kernel(rows), grid, args, device.stream)
    got = device.read(block.address, (n, rows.row_bytes // 4), np.uint32)
    wanted = row_words(rows, first + np.arange(n))
    assert (got == wanted).all()
    values = wanted.view(stored)
    assert ((values >= 1) & (values < 2)).all()
    assert len(np.unique(wanted, axis=0)) == n


def test_keys_name_their_rows(table: tables.Table) -> None:
    numbers = np.array([0, 1, 2**20, 2**40], np.uint64)
    keys = tables.keys_of(numbers)
    assert keys.dtype == np.int64
    assert (tables.numbers_of(keys) == numbers).all()
    assert table.size() == len(table.resident) == len(set(table.resident.tolist()))
    assert table.load == pytest.approx(0.5, abs=0.01)


def test_keys_of_a_lookup_are_unique_or_zipf_and_as_many_absent_as_asked(
    device: Device, table: tables.Table
) -> None:
    kept = []

    def keep(array: Any) -> int:
        kept.append(array)
        return 0

    unique = table.lookup(50, 4, block=keep)
    assert len(set(unique.numbers.tolist())) == 200
    assert not unique.absent.any()
    mixed = table.lookup(50, 4, block=keep, hit_rate=0.7)
    assert mixed.absent.sum() == 60
    assert (mixed.numbers[mixed.absent] >= table.n_rows).all()
    assert np.isin(mixed.numbers[~mixed.absent], table.resident).all()
    hot = table.lookup(50, 40, block=keep, zipf=1.5)
    assert np.unique(hot.numbers, return_counts=True)[1].max() > 400
    for keys, lookup in zip(kept[::2], (unique, mixed, hot), strict=True):
        assert (tables.numbers_of(keys) == lookup.numbers).all()


def test_wrong_rows_are_no_result(device: Device, table: tables.Table) -> None:
    with device.scratch() as scratch:
        stage = works.Stage.set_up(device, scratch, table, n=64, pool=128)
        start = table.cache.base + table.cache.layout.offset("rows", 0)
        end = table.cache.base + table.cache.layout.default_row(0)
        rows = device.read(start, end - start, np.uint8)
        device.write(start, rows ^ np.uint8(1))
        with pytest.raises(AssertionError, match="128 rows of 128 are wrong"):
            timing.measure(device, [works.query(stage)], SMOKE_PLAN)


# -- checks ----------------------------------------------------------------------------


def test_large_checks_notice_one_wrong_byte() -> None:
    memory = MirroredMemory(Gpu(0))
    table = BigTable(memory, ROWS, Policy.LRU, n_keys=400, seed=0)
    table.insert_new(np.arange(150), epoch=0)
    slot = table.slots[100]
    start = table.cpu.layout.offset("rows", 0) + slot * ROWS.stride_bytes
    table.cpu.block[start + 5] ^= 1
    with pytest.raises(AssertionError, match="1 rows are wrong"):
        table.query(np.arange(200))
    with pytest.raises(AssertionError, match="1 rows are wrong, that of slot"):
        table.update(np.arange(50), epoch=1)
    table.cpu.block[start + 5] ^= 1
    table.cpu.meta()[table.home[3], :4] += 1  # as if a writer had left it held
    with pytest.raises(AssertionError):
        table.evict(np.arange(50, 60), epoch=2)
    memory.close()


def test_large_checks_notice_a_key_that_is_gone() -> None:
    memory = MirroredMemory(Gpu(0))
    table = BigTable(memory, ROWS, Policy.LRU, n_keys=400, seed=0)
    table.insert_new(np.arange(150), epoch=0)
    way = table.slots[7] % 28
    table.cpu.digests()[table.home[7], way] = 0
    with pytest.raises(AssertionError):
        table.dump()
    memory.close()


def test_large_checks_notice_a_key_of_a_static_table_in_a_third_set() -> None:
    memory = MirroredMemory(Gpu(0))
    table = BigTable(memory, ROWS, Policy.STATIC, n_keys=400, seed=0)
    table.insert_new(np.arange(220), epoch=0)
    assert (table.home[:200] != table.slots[:200] // 28).any()
    table.update(np.arange(150), epoch=1)
    table.query(np.arange(300))
    own = np.flatnonzero(table.inside)
    table.second[own] = table.home[own] = (table.home[own] + 1) % table.table.n_sets
    with pytest.raises(AssertionError, match="another's set"):
        table.evict(np.arange(10), epoch=2)
    memory.close()


def run_rounds(arena: stress.Arena) -> None:
    for _ in range(10):
        arena.round()


@pytest.mark.parametrize("kind", [stress.Arena, stress.StaticArena])
def test_races_notice_rows_that_come_back(
    kind: type[stress.Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = stress.Arena._insert

    def ever_fresh(arena: Any, name: str, *rows: Any) -> Any:
        numbers, versions, _, stream = rows
        return insert(arena, name, numbers, versions, LATEST, stream)

    monkeypatch.setattr(stress.Arena, "_insert", ever_fresh)
    arena = kind(Gpu(0), stress.TINY, dim=32, seed=3)
    with pytest.raises(AssertionError, match=r"old row|before an update"):
        run_rounds(arena)


def test_sums_notice_torn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(numbers: Any, versions: Any, dim: int) -> Any:
        rows = stress.flat_rows(numbers, versions, dim)
        rows[:, dim // 2 :] += 1
        return rows

    monkeypatch.setattr(stress.PooledArena, "rows_of", staticmethod(torn))
    arena = stress.PooledArena(Gpu(0), stress.TINY, dim=32, seed=3)
    with pytest.raises(AssertionError, match="a sum over a torn row"):
        run_rounds(arena)


def test_kernels_are_compiled_ahead(cubins: Path) -> None:
    shape = (ROWS, Policy.LRU)
    specs = list(compiling.specs_of(shape))
    n = compiling.compile_ahead([shape, shape], (9, 0), n_workers=1)
    assert n == len(specs)
    names = {path.name.split(".")[0] for path in cubins.glob("*.sm_90.*")}
    assert names >= {spec.name for spec in specs}
