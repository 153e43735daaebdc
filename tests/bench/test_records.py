from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

from bench.harness import Timing
from bench.machine import this_machine, versions
from bench.records import Published, Ratio, Result, counted, ratio, read, timed, write
from tests.bench.results import WHERE, result


def timing(calls: list[float], *, quiet: bool = True) -> Timing:
    values = np.array(calls)
    return Timing("ours", 10, values, values / 10, quiet)


def test_quantiles_are_those_of_all_calls() -> None:
    made = timed("fetch", timing([i / 1e3 for i in range(101)]), params={}, where=WHERE)
    got = [made.p05, made.median, made.p95, made.p99, made.max]
    assert got == pytest.approx([0.005, 0.05, 0.095, 0.099, 0.1])
    assert made.samples == made.rounds == 101


@pytest.mark.parametrize(
    ("calls", "quiet", "marks"),
    [
        ([1.0] * 20, True, ()),
        ([1.0] * 19, True, ("few",)),
        ([1.0, 1.1] * 10, True, ("noisy",)),
        ([1.0] * 20, False, ("disturbed",)),
        ([1.0, 2.0], False, ("few", "noisy", "disturbed")),
    ],
)
def test_figures_not_to_lean_on_are_marked(
    calls: list[float], quiet: bool, marks: tuple[str, ...]
) -> None:
    made = timed("fetch", timing(calls, quiet=quiet), params={}, where=WHERE)
    assert made.marks == marks


def test_a_ratio_has_the_spread_of_its_rounds() -> None:
    made = ratio("theirs", [1.0, 2.0, 3.0], floor=2.0, sense="at_least")
    assert (made.p05, made.median, made.p95) == pytest.approx((1.1, 2.0, 2.9))


@pytest.mark.parametrize(
    ("median", "sense", "floor", "met"),
    [
        (2.0, "at_least", 2.0, True),
        (1.9, "at_least", 2.0, False),
        (1.2, "at_most", 1.2, True),
        (1.3, "at_most", 1.2, False),
        (0.1, "at_least", None, True),
    ],
)
def test_a_promise_is_kept_by_the_median(
    median: float, sense: str, floor: float | None, met: bool
) -> None:
    made = ratio("theirs", [median], floor=floor, sense=sense)
    assert made.met is met


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "fetch.jsonl"
    ratios = (ratio("theirs", [1.5, 2.5], floor=1.0, sense="at_least"),)
    given = [
        result(ratios=ratios, absent={"db_bench": "not installed"}),
        counted("memory", "float32", 4.5, unit="bytes", params={}, where=WHERE),
        result().model_copy(
            update={"published": Published(source="a page", values={"mean_s": 1e-3})}
        ),
    ]
    for one in given:
        write(path, one)
    assert len(path.read_text().splitlines()) == 3
    assert read(path) == given


def test_a_line_on_disk_fits_the_schema_and_has_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "fetch.jsonl"
    write(path, result(ratios=(ratio("theirs", [2.0], floor=None, sense="at_most"),)))
    line = json.loads(path.read_text())
    jsonschema.validate(line, Result.model_json_schema())
    assert line["commit"] == "0123456789ab"
    assert line["versions"]["numpy"] == "2.0.0"
    assert line["machine"]["cores"] == 2
    assert line["items"] == 1_000
    assert line["ratios"] == [
        {"against": "theirs", "sense": "at_most", "median": 2, "p05": 2, "p95": 2}
    ]


@pytest.mark.parametrize(
    "change",
    [{"median": math.nan}, {"items": 0}, {"unknown": 1}, {"profile": "quick"}],
)
def test_a_malformed_result_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "fetch.jsonl"
    line = result().model_dump() | change
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValidationError):
        read(path)


def test_repetitions_of_a_measurement_have_equal_keys() -> None:
    first = result(params={"dim": 32, "batch": 10})
    again = result(params={"batch": 10, "dim": 32}, ms=9.0)
    other = result(params={"dim": 128, "batch": 10})
    assert first.key == again.key
    assert first.key != other.key


def test_this_machine_and_the_versions_are_known() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28
    assert machine.kernel
    assert {"python", "numpy", "numba", "rocksdict"} <= versions().keys()


def test_ratios_are_positive() -> None:
    with pytest.raises(ValidationError):
        Ratio(against="theirs", sense="at_least", median=0.0, p05=0.0, p95=1.0)
