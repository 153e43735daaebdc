"""The page of the GPU kernels shows the result files as they are."""

from __future__ import annotations

import json

from bench import kernels


def test_the_page_is_current() -> None:
    page = kernels.DOCUMENT.read_text()
    assert kernels.filled(page) == page


def test_the_gate_has_a_line_for_each_kernel() -> None:
    lines = (kernels.RESULTS / "gate.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    names = {result["kernel"] for result in results}
    rows = kernels.gate_table(results).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == sorted(names)
    assert all(row.count("|") == 8 for row in rows)
    assert not any(result["over"] for result in results)
