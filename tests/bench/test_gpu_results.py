"""Results of the GPU benchmarks: written without pydantic, read with it, tabulated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench import records
from bench.gpu import report
from bench.gpu.__main__ import RESULTS
from bench.gpu.records import Line, Sink, counted, left_out, ratio, timed
from bench.gpu.text import describe, goals_table
from bench.harness import Timing


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    sink = Sink(tmp_path, "smoke", gpu="A GPU", versions={"driver": "13.0"})
    seconds = np.linspace(1, 2, 30)
    timing = Timing("query", 4, seconds, seconds / 4, quiet=True)
    both = [ratio("copy", seconds, floor=1.2), ratio("10 us", seconds, sense="at_most")]
    lines = [
        timed("query", timing, {"dim": 8}, ratios=both, absent={"torch": "no torch"}),
        counted("query", "keys", np.int64(7), "keys"),
        left_out("query", {"cupy": "no cupy"}),
    ]
    for line in lines:
        sink.write(line)
    for got, line in zip(records.read(tmp_path / "query.jsonl"), lines, strict=True):
        values = dataclasses.asdict(line)
        values["ratios"] = list(values["ratios"])
        assert values == {
            **got.model_dump(include=set(values)),
            "ratios": [r.model_dump() for r in got.ratios],
        }
        assert (got.machine.gpu, got.versions["driver"]) == ("A GPU", "13.0")
    read = records.read(tmp_path / "query.jsonl")[0]
    expected = records.timed(
        "query", timing, params={"dim": 8}, where=records.origin("smoke")
    )
    same = {"median", "p05", "p95", "p99", "max", "noise", "marks", "rounds"}
    assert read.model_dump(include=same) == expected.model_dump(include=same)


def test_what_was_launched_rather_than_replayed_says_so(tmp_path: Path) -> None:
    seconds = np.ones(30)
    timing = Timing("query", 1, seconds, seconds, quiet=True, marks=("launched",))
    Sink(tmp_path, "full", gpu="", versions={}).write(timed("query", timing, {}))
    (read,) = records.read(tmp_path / "query.jsonl")
    expected = records.timed("query", timing, params={}, where=records.origin("full"))
    assert read.marks == expected.marks == ("launched",)
    assert "| launched |" in report.all_tables(report.load(tmp_path))


def test_a_result_that_is_no_number_is_refused(tmp_path: Path) -> None:
    sink = Sink(tmp_path, "smoke", gpu="", versions={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write(counted("query", "keys", float("nan"), "keys"))


def test_goals_are_met_by_medians() -> None:
    def line(name: str, sense: str, median: float) -> Line:
        one = ratio("it", [median], floor=1.0, sense=sense)
        return dataclasses.replace(counted(name, "a", 1, "s"), ratios=(one,))

    table = goals_table(
        [
            line("fast", "at_least", 1.5),
            line("slow", "at_least", 0.5),
            line("short", "at_most", 0.5),
            line("long", "at_most", 1.5),
        ]
    )
    verdicts = {
        row.split()[1].strip(","): row.split()[0] for row in table.split("\n")[1:]
    }
    assert verdicts == {
        "fast": "met",
        "slow": "MISSED",
        "short": "met",
        "long": "MISSED",
    }
    assert "0.5 x it" in describe(line("short", "at_most", 0.5))


def test_without_results_every_table_says_so(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    assert report.all_tables([]).count(report.NOTHING) == len(report.SECTIONS)
    assert report.write_report(tmp_path, document) == report.all_tables([])
    document.write_text("a\n<!-- bench: goals -->\nold\n<!-- end -->\nb\n")
    report.write_report(tmp_path, document)
    assert document.read_text() == (
        f"a\n<!-- bench: goals -->\n{report.NOTHING}\n<!-- end -->\nb\n"
    )
    with pytest.raises(KeyError, match="nothing is none of machine"):
        report.filled("<!-- bench: nothing -->\n<!-- end -->", [])


def test_the_page_is_current() -> None:
    page = report.DOCUMENT.read_text()
    assert report.filled(page, report.load(RESULTS)) == page


def test_the_report_shows_the_newest_full_results(tmp_path: Path) -> None:
    for profile, median in (("full", 1), ("full", 2), ("smoke", 3)):
        sink = Sink(tmp_path, profile, gpu="A GPU", versions={})
        sink.write(counted("checks", "graph replays", median, "keys"))
    results = report.load(tmp_path)
    assert [r["median"] for r in results] == [2]
    assert "| graph replays |  | 2 | keys |" in report.all_tables(results)


def test_the_report_has_the_results_of_one_commit(tmp_path: Path) -> None:
    def write(commit: str, when: str, name: str) -> None:
        sink = Sink(tmp_path, "full", gpu="A GPU", versions={})
        sink._origin.update(commit=commit, time=when)
        sink.write(counted(name, "all", 1, "keys"))

    write("old", "2024-06-01T00:00:00Z", "checks")
    write("new", "2024-06-02T00:00:00Z", "checks")
    write("old", "2024-06-01T00:00:00Z", "zipped")
    results = report.load(tmp_path)
    assert [(r["name"], r["commit"]) for r in results] == [("checks", "new")]
