"""Write the tables of ``docs/gpu-kernels.md`` from what was shown of the GPU kernels.

``python -m bench.kernels`` writes what is between the document's markers. The results
come from ``python -m tests.support.gate --json bench/results/kernels/gate.jsonl`` and
``python -m tests.kernels.cuda.figures --json bench/results/kernels/cpu.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bench.report import MARKED, ROOT, table

app = typer.Typer(add_completion=False)
RESULTS = ROOT / "bench" / "results" / "kernels"
DOCUMENT = ROOT / "docs" / "gpu-kernels.md"


@app.command()
def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if it is not current.")
    ] = False,
) -> None:
    """Write the tables between the document's markers."""
    old = DOCUMENT.read_text()
    new = filled(old)
    if check:
        raise typer.Exit(int(old != new))
    DOCUMENT.write_text(new)


def filled(document: str) -> str:
    """Return the document with everything between its markers written anew."""
    sections = {"gate": gate_table, "cpu": cpu_table}

    def block(match: Any) -> str:
        lines = (RESULTS / f"{match[2]}.jsonl").read_text().splitlines()
        text = sections[match[2]]([json.loads(line) for line in lines])
        return f"{match[1]}{text}\n{match[3]}"

    return MARKED.sub(block, document)


def gate_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a line per kernel: what it takes on each compute capability."""
    capabilities = sorted({tuple(r["cc"]) for r in results})
    kernels: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for result in results:
        kernels.setdefault(result["kernel"], {})[tuple(result["cc"])] = result
    head = (
        "kernel",
        *(f"{major}.{minor}" for major, minor in capabilities),
        "128-bit loads / stores",
        "stack, spills",
    )
    rows = []
    for name, by_capability in sorted(kernels.items()):
        found = [by_capability[cc] for cc in capabilities]
        rows.append(
            (
                f"`{name}`",
                *(f"{one['registers']} / {one['instructions']}" for one in found),
                _range(found, "loads") + " / " + _range(found, "stores"),
                str(max(one["stack_bytes"] + one["spill_bytes"] for one in found)),
            )
        )
    return table(head, rows)


def cpu_table(results: Sequence[dict[str, Any]]) -> str:
    """Return what was run on the CPU, and what came of it."""
    return table(("what", "figure"), [(r["what"], f"{r['value']:,}") for r in results])


def _range(results: Sequence[dict[str, Any]], what: str) -> str:
    counts = [one[what].get("128", 0) for one in results]
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    app()
