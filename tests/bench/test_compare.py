from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS, describe
from bench.compare import Claim, compare
from bench.defaults import SMOKE, SMOKE_PLAN, Run
from bench.harness import Variant
from bench.records import Origin, Result
from tests.bench.results import WHERE


def taking(name: str, seconds: float) -> Variant:
    return Variant(name, lambda: lambda: seconds, 10)


def compared(claims: list[Claim], where: Origin = WHERE) -> dict[str, Result]:
    run = Run(SMOKE, SMOKE_PLAN, Path(), where)
    variants = [taking("fast", 1.0), taking("slow", 4.0)]
    results = compare(
        run, "race", variants, params={}, claims=claims, absent={"ghost": "is away"}
    )
    return {r.variant: r for r in results}


def test_a_claim_compares_seconds_per_item() -> None:
    results = compared(
        [Claim("fast", "slow", 3.0), Claim("slow", "fast", 3.0, "at_most")]
    )
    (faster,), (slower,) = results["fast"].ratios, results["slow"].ratios
    assert (faster.median, faster.floor, faster.met) == (4.0, 3.0, True)
    assert (slower.median, slower.floor, slower.met) == (4.0, 3.0, False)


def test_a_claim_against_an_absent_baseline_is_left_out() -> None:
    results = compared([Claim("fast", "ghost", 2.0)])
    assert results["fast"].ratios == ()
    assert results["fast"].absent == {"ghost": "is away"}


def test_tiny_sizes_promise_nothing() -> None:
    smoke = replace(WHERE, profile="smoke")
    results = compared([Claim("fast", "slow", 3.0)], smoke)
    assert results["fast"].ratios[0].floor is None


def test_a_missed_promise_is_seen_in_the_line_that_is_printed() -> None:
    results = compared([Claim("fast", "slow", 5.0)])
    assert "4x slow (floor 5: MISSED)" in describe(results["fast"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_names_of_benchmarks_are_sections_of_the_page(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert f"<!-- bench: {name}" in page.read_text()
