"""The tables of ``docs/gpu.md`` from result files: ``python -m bench.gpu --report``.

The document has pairs of markers, ``<!-- bench: NAME -->`` and ``<!-- end -->``; what
is between them is written here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "Not measured yet."

Result = dict[str, Any]


def load(directory: Path, profile: str = "full") -> list[Result]:
    """Read the newest result of every measurement, in the order of the files.

    Those of the newest commit: what others measured does not compare.
    """
    found = [
        result
        for path in sorted(directory.glob("*.jsonl"))
        for result in map(json.loads, path.read_text().splitlines())
        if result["profile"] == profile
    ]
    commit = max(found, key=lambda r: str(r["time"]))["commit"] if found else ""
    return list(
        {
            (result["name"], result["variant"], _params(result)): result
            for result in found
            if result["commit"] == commit
        }.values()
    )


def filled(document: str, results: Sequence[Result]) -> str:
    """Return the document with everything between its markers written anew."""

    def block(match: re.Match[str]) -> str:
        section = SECTIONS.get(match[2])
        if section is None:
            raise KeyError(f"{match[2]} is none of {', '.join(SECTIONS)}")
        return f"{match[1]}{section(results)}\n{match[3]}"

    return MARKED.sub(block, document)


def all_tables(results: Sequence[Result]) -> str:
    """Return every table under its name, for a document that has no markers."""
    return "\n\n".join(f"### {name}\n\n{SECTIONS[name](results)}" for name in SECTIONS)


def machine_table(results: Sequence[Result]) -> str:
    """Return where and when the results were measured."""
    rows = {
        (
            r["machine"].get("gpu", ""),
            r["machine"]["cpu"],
            ", ".join(f"{k} {v}" for k, v in r["versions"].items()),
            r["commit"],
            r["time"][:10],
        )
        for r in results
    }
    return table(("GPU", "CPU", "versions", "commit", "date"), sorted(rows))


def goals_table(results: Sequence[Result]) -> str:
    """Return every goal with what was measured."""
    rows = [
        (
            f"{r['name']}: {r['variant']}",
            _params(r),
            f"{x['median']:.2f} ({x['p05']:.2f} to {x['p95']:.2f}) x {x['against']}",
            f"{'≥' if x['sense'] == 'at_least' else '≤'} {x['floor']:g}",
            "yes" if _met(x) else "**no**",
            ", ".join(r.get("marks", ())),
        )
        for r in results
        for x in r.get("ratios", ())
        if x.get("floor") is not None
    ]
    return table(("what", "of", "measured", "goal", "met", "marks"), rows)


def times_table(*names: str) -> Callable[[Sequence[Result]], str]:
    """Return a function that tabulates the results with these names."""

    def section(results: Sequence[Result]) -> str:
        mine = [r for r in results if r["name"] in names and r["unit"] == "s"]
        shared = _shared(mine)
        rows = [
            (
                ", ".join(
                    f"{k} {v}" for k, v in r["params"].items() if k not in shared
                ),
                r["variant"],
                *(f"{r[part] * 1e6:.4g}" for part in ("median", "p05", "p95", "p99")),
                f"{r.get('items', 1) / r['median'] / 1e9:.3g}",
                "; ".join(
                    f"{x['median']:.2f} x {x['against']}" for x in r.get("ratios", ())
                ),
                ", ".join(r.get("marks", ())),
            )
            for r in mine
        ]
        head = ("of", "variant", "median µs", "p05", "p95", "p99", "10⁹/s")
        told = ", ".join(f"{k} {mine[0]['params'][k]}" for k in shared)
        lines = [f"Of all: {told}.\n"] if told else []
        return "\n".join([*lines, table((*head, "ratios", "marks"), rows)])

    return section


def checks_table(results: Sequence[Result]) -> str:
    """Return what was compared with the oracle, and how much of it."""
    rows = [
        (r["variant"], _params(r), f"{r['median']:,.0f}", r["unit"])
        for r in results
        if r["name"] == "checks"
    ]
    return table(("check", "of", "compared", "unit"), rows)


def left_out_table(results: Sequence[Result]) -> str:
    """Return what did not run, and why."""
    found: dict[str, str] = {}
    for r in results:
        found.update(r.get("absent", {}))
    return table(("left out", "why"), sorted(found.items()))


SECTIONS: dict[str, Callable[[Sequence[Result]], str]] = {
    "machine": machine_table,
    "goals": goals_table,
    "checks": checks_table,
    "query": times_table("query"),
    "pooled": times_table("pooled"),
    "writes": times_table("insert", "update", "dump", "scatter"),
    "calls": times_table("small", "tables"),
    "served": times_table("served"),
    "memory": times_table("copy", "sectors"),
    "left_out": left_out_table,
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or that there is nothing to show."""
    lines = [head, ["---"] * len(head), *rows]
    if len(lines) == 2:
        return NOTHING
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(directory: Path, document: Path = DOCUMENT) -> str:
    """Write the tables into the document, or return them if it has no markers."""
    results = load(directory)
    old = document.read_text() if document.exists() else ""
    if not MARKED.search(old):
        return all_tables(results)
    document.write_text(filled(old, results))
    return f"tables of {len(results)} results are in {document}"


def _met(ratio: Result) -> bool:
    median, floor = ratio["median"], ratio["floor"]
    met: bool = median >= floor if ratio["sense"] == "at_least" else median <= floor
    return met


def _params(result: Result) -> str:
    return ", ".join(f"{k} {v}" for k, v in result["params"].items())


def _shared(results: Sequence[Result]) -> list[str]:
    """Return the parameters that all results have in common."""
    if not results:
        return []
    first = results[0]["params"]
    return [
        k for k, v in first.items() if all(r["params"].get(k) == v for r in results)
    ]
