"""Write the figures of ``docs/benchmarks.md`` from the results.

The document has pairs of markers, ``<!-- bench: NAME -->`` and ``<!-- end -->``; what
is between them is written here and nowhere else. ``python -m bench.report``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from bench.plots import plot_curves, plot_rates
from bench.records import Param, Ratio, Result, read, shared_params

app = typer.Typer(add_completion=False)

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CURVES = ("_batches",)  # ends of the names that are drawn over the batch size


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Directory of results.")] = ROOT
    / "bench"
    / "results",
    document: Annotated[Path, typer.Option(help="Document with the markers.")] = ROOT
    / "docs"
    / "benchmarks.md",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if it is not current.")
    ] = False,
) -> None:
    """Write tables and plots between the document's markers."""
    newest = load(results)
    old = document.read_text()
    new = filled(old, newest)
    if check:
        raise typer.Exit(int(old != new))
    document.write_text(new)
    draw(newest, document.parent / "images")


def load(directory: Path) -> list[Result]:
    """Read the newest full result of every measurement, in the order of the files."""
    found = chain.from_iterable(
        read(path) for path in sorted(directory.glob("*.jsonl"))
    )
    newest: dict[tuple[str, str, str], Result] = {}
    for result in found:
        if result.profile == "full":
            newest[result.key] = result
    return list(newest.values())


def filled(document: str, results: Sequence[Result]) -> str:
    """Return the document with everything between its markers written anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{section(match[2], results)}\n{match[3]}"

    return MARKED.sub(block, document)


def section(name: str, results: Sequence[Result]) -> str:
    """Return the text between the markers called ``name``."""
    if name == "machine":
        return machine_table(results)
    if name == "floors":
        return floors_table(results)
    mine = [r for r in results if r.name == name]
    if not mine:
        return "Not measured."
    lines = [_shared(mine), "", results_table(mine)]
    if mine[0].unit == "s":
        lines += ["", f"![{name}](images/{name}.png)"]
    lines += [f"\nAbsent: {why}." for r in mine for why in r.absent.values()]
    lines += [_published(r) for r in mine if r.published]
    return "\n".join(lines)


def machine_table(results: Sequence[Result]) -> str:
    """Return where and when the results were measured."""
    rows = {
        (
            r.machine.cpu,
            f"{r.machine.cores}",
            f"{r.machine.l3_bytes >> 20} MiB" if r.machine.l3_bytes else "unknown",
            f"{r.machine.memory_bytes / 2**30:.0f} GiB",
            r.machine.kernel,
            ", ".join(f"{k} {v}" for k, v in r.versions.items() if k != "hps-numba"),
            r.commit,
            r.time[:10],
        )
        for r in results
    }
    head = ("CPU", "cores", "L3", "memory", "kernel", "versions", "commit", "date")
    return table(head, sorted(rows))


def floors_table(results: Sequence[Result]) -> str:
    """Return every promised ratio with what was measured."""
    rows = [
        (
            f"`{r.name}`",
            _params(r),
            f"{r.variant} against {x.against}",
            f"{x.median:.2f} ({x.p05:.2f} to {x.p95:.2f})",
            f"{_SIGN[x.sense]} {x.floor:g}",
            "yes" if x.met else "**no**",
            ", ".join(r.marks),
        )
        for r in results
        for x in r.ratios
        if x.floor is not None
    ]
    head = (
        "benchmark",
        "of",
        "ratio",
        "median (p05 to p95)",
        "promised",
        "kept",
        "marks",
    )
    return table(head, rows)


def results_table(results: Sequence[Result]) -> str:
    """Return the results of one benchmark."""
    if results[0].unit != "s":
        rows = [(_own(r, results), r.variant, f"{r.median:.1f}") for r in results]
        return table(("of", "variant", results[0].unit), rows)
    rows_s = [
        (
            _own(r, results),
            r.variant,
            *(f"{value * 1e3:.4g}" for value in (r.median, r.p05, r.p95, r.p99)),
            f"{r.items / r.median / 1e6:.3g}",
            "; ".join(map(_ratio, r.ratios)),
            f"{r.noise * 100:.1f} %",
            ", ".join(r.marks),
        )
        for r in results
    ]
    head = (
        *("of", "variant", "median ms", "p05", "p95", "p99", "M keys/s"),
        *("ratio", "noise", "marks"),
    )
    return table(head, rows_s)


def draw(results: Sequence[Result], directory: Path) -> None:
    """Draw a plot for every benchmark that was timed."""
    for name in dict.fromkeys(r.name for r in results if r.unit == "s"):
        mine = [r for r in results if r.name == name]
        plot = plot_curves if name.endswith(CURVES) else plot_rates
        plot(mine, directory / f"{name}.png")


_SIGN = {"at_least": "≥", "at_most": "≤"}


def _ratio(ratio: Ratio) -> str:
    how = "as fast as" if ratio.sense == "at_least" else "as long as"
    return f"{ratio.median:.2f} times {how} {ratio.against}"


def _published(result: Result) -> str:
    assert result.published is not None
    values = ", ".join(
        f"{name.removesuffix('_s')} {value * 1e3:g} ms"
        for name, value in result.published.values.items()
    )
    return f"\nPublished for the same call: {values} ({result.published.source})."


def _params(result: Result) -> str:
    return _listed(result.params)


def _shared(results: Sequence[Result]) -> str:
    """Return the parameters that all results have in common."""
    names = shared_params(results)
    return f"Of all: {_listed({k: results[0].params[k] for k in names})}."


def _own(result: Result, results: Sequence[Result]) -> str:
    names = shared_params(results)
    return _listed({k: v for k, v in result.params.items() if k not in names})


def _listed(params: Mapping[str, Param]) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    app()
