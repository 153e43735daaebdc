from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import report
from bench.records import Published, counted, ratio, read, write
from tests.bench.results import WHERE, result

ROOT = Path(__file__).parents[2]


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_times_are_in_ms_and_rates_in_millions_of_keys() -> None:
    head, _, row = rows_of(report.results_table([result(ms=2.0)]))
    cells = dict(zip(head, row, strict=True))
    assert cells["variant"] == "ours"
    assert cells["median ms"] == "2"
    assert cells["M keys/s"] == "0.5"
    assert cells["noise"] == "0.0 %"


def test_ratios_say_what_they_compare() -> None:
    ratios = (
        ratio("a dict", [8.0, 9.0, 10.0], floor=8, sense="at_least"),
        ratio("its slowest stage", [1.1], floor=None, sense="at_most"),
    )
    _, _, row = rows_of(report.results_table([result(ratios=ratios)]))
    assert row[7] == (
        "9.00 times as fast as a dict; 1.10 times as long as its slowest stage"
    )


def test_shared_parameters_are_told_once() -> None:
    results = [result(params={"dim": dim, "batch": 10}) for dim in (32, 128)]
    text = report.section("fetch", results)
    assert text.startswith("Of all: batch 10.")
    assert [row[0] for row in rows_of(text)[2:]] == ["dim 32", "dim 128"]


def test_promises_are_listed_with_the_ones_that_were_not_kept() -> None:
    kept = ratio("a dict", [12.0], floor=8, sense="at_least")
    missed = ratio("one stage", [1.5], floor=1.2, sense="at_most")
    of_interest = ratio("nothing", [1.0], floor=None, sense="at_least")
    table = report.floors_table(
        [result(ratios=(kept, of_interest)), result("pipeline", ratios=(missed,))]
    )
    rows = rows_of(table)[2:]
    assert [row[3:6] for row in rows] == [
        ["12.00 (12.00 to 12.00)", "≥ 8", "yes"],
        ["1.50 (1.50 to 1.50)", "≤ 1.2", "**no**"],
    ]


def test_counted_things_are_a_table_without_a_plot() -> None:
    memory = counted(
        "memory", "float32", 139.26, unit="bytes/row", params={}, where=WHERE
    )
    text = report.section("memory", [memory])
    assert rows_of(text)[2] == ["", "float32", "139.3"]
    assert ".png" not in text


def test_absent_baselines_and_published_figures_are_named() -> None:
    published = Published(source="their page", values={"mean_s": 0.127e-3})
    one = result(absent={"db_bench": "db_bench is not installed"})
    text = report.section("fetch", [one.model_copy(update={"published": published})])
    assert "Absent: db_bench is not installed." in text
    assert "mean 0.127 ms (their page)" in text


def test_the_newest_full_result_of_a_measurement_counts(tmp_path: Path) -> None:
    smoke = replace(WHERE, profile="smoke")
    for one in (result(ms=2.0), result(ms=3.0), result(ms=9.0, where=smoke)):
        write(tmp_path / "fetch.jsonl", one)
    assert [r.median for r in report.load(tmp_path)] == pytest.approx([0.003])


def document_and_results(tmp_path: Path) -> tuple[Path, list[str]]:
    results = tmp_path / "results"
    write(results / "fetch.jsonl", result())
    write(results / "fetch_batches.jsonl", result("fetch_batches", params={"dim": 1}))
    document = tmp_path / "benchmarks.md"
    document.write_text(
        "# Words\n<!-- bench: fetch -->\nstale\n<!-- end -->\nMore words.\n"
        "<!-- bench: unheard_of -->\n<!-- end -->\n"
    )
    return document, ["--results", str(results), "--document", str(document)]


def run(arguments: list[str]) -> int:
    return CliRunner().invoke(report.app, arguments).exit_code


def test_only_what_is_between_markers_is_written(tmp_path: Path) -> None:
    document, arguments = document_and_results(tmp_path)
    assert run(arguments) == 0
    text = document.read_text()
    assert text.startswith("# Words\n<!-- bench: fetch -->\nOf all: dim 32.\n")
    assert "stale" not in text
    assert "<!-- end -->\nMore words.\n" in text
    assert "<!-- bench: unheard_of -->\nNot measured.\n<!-- end -->" in text
    for name in ("fetch", "fetch_batches"):
        image = tmp_path / "images" / f"{name}.png"
        assert image.read_bytes().startswith(b"\x89PNG")


def test_checking_fails_on_a_stale_document_and_writes_nothing(tmp_path: Path) -> None:
    document, arguments = document_and_results(tmp_path)
    stale = document.read_text()
    assert run([*arguments, "--check"]) == 1
    assert document.read_text() == stale
    assert not (tmp_path / "images").exists()
    run(arguments)
    assert run([*arguments, "--check"]) == 0


def test_the_page_of_results_is_current() -> None:
    assert run(["--check"]) == 0


def test_results_in_the_repository_are_well_formed() -> None:
    for path in (ROOT / "bench" / "results").glob("*.jsonl"):
        assert all(r.profile == "full" for r in read(path)), path
