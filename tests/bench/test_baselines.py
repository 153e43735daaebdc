from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.baselines import DbBench, DenseTable, DictTable, RocksdictTable, ops_per_s
from bench.workloads import table_rows

KEYS = np.array([5, 0, 5, 99, 42])
ROWS = table_rows(np.arange(100), 8)


def test_a_dict_and_a_dense_table_give_the_rows_of_their_keys() -> None:
    for table in (DictTable(np.arange(100), ROWS), DenseTable(ROWS)):
        out = np.zeros((5, 8), np.float32)
        table.fetch(KEYS, out)
        np.testing.assert_array_equal(out, ROWS[KEYS])


def test_a_dict_table_refuses_a_key_that_it_does_not_hold() -> None:
    table = DictTable(np.arange(100), ROWS)
    with pytest.raises(KeyError):
        table.fetch(np.array([100]), np.zeros((1, 8), np.float32))


def test_rocksdict_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    table = RocksdictTable(tmp_path, cache_bytes=1 << 20)
    table.write(np.arange(100), ROWS, batch=7)
    table.compact()
    out = np.zeros((5, 8), np.float32)
    table.fetch(KEYS, out)
    table.close()
    np.testing.assert_array_equal(out, ROWS[KEYS])


def line(found: str) -> str:
    return f"multireadrandom : 2.9 micros/op 348000 ops/sec 1.4 seconds ({found} found)"


def test_the_rate_of_db_bench_is_read_from_its_output() -> None:
    output = f"DB path: [/x]\nreadtocache : 1 ops/sec\n{line('500 of 500')}\n"
    assert ops_per_s(output, "multireadrandom") == 348_000


@pytest.mark.parametrize("output", ["", line("499 of 500"), "multireadrandom : ?"])
def test_a_run_that_did_not_read_all_keys_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="db_bench did not read all keys"):
        ops_per_s(output, "multireadrandom")


def test_a_missing_db_bench_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert list(DbBench.absent()) == ["db_bench"]
    assert "rocksdb-tools" in DbBench.absent()["db_bench"]


@pytest.mark.skipif(bool(DbBench.absent()), reason="db_bench is not installed")
def test_db_bench_reads_every_key_of_the_table_that_it_filled(tmp_path: Path) -> None:
    program = DbBench(tmp_path, n_rows=2_000, row_bytes=32, cache_bytes=1 << 20)
    program.fill()
    assert program.multi_get_s(2_000, seed=1) > 0
