"""Plots of results, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from bench.records import Result, shared_params

SIZE_INCHES = (7.0, 3.5)
DPI = 120

matplotlib.use("Agg")


def plot_rates(results: Sequence[Result], path: Path) -> None:
    """Draw a bar for each result: items a second, with the span from p05 to p95."""
    names = [f"{r.variant}\n{_params(r, results)}" for r in results]
    rates = [r.items / r.median / 1e6 for r in results]
    below = [
        rate - r.items / r.p95 / 1e6 for r, rate in zip(results, rates, strict=True)
    ]
    above = [
        r.items / r.p05 / 1e6 - rate for r, rate in zip(results, rates, strict=True)
    ]
    height = max(SIZE_INCHES[1], 0.42 * len(results) + 0.8)
    figure, axes = plt.subplots(figsize=(SIZE_INCHES[0], height))
    axes.barh(names, rates, xerr=[below, above], color="#4c78a8", ecolor="#333333")
    axes.invert_yaxis()
    axes.set_xlabel("million keys per second")
    axes.tick_params(axis="y", labelsize=7)
    _save(figure, path)


def plot_curves(results: Sequence[Result], path: Path) -> None:
    """Draw latency by batch size, a line for each set of parameters."""
    figure, axes = plt.subplots(figsize=SIZE_INCHES)
    for params in dict.fromkeys(_params(r, results) for r in results):
        line = [r for r in results if _params(r, results) == params]
        sizes = [r.items for r in line]
        axes.plot(sizes, [r.median * 1e3 for r in line], marker="o", label=params)
        axes.fill_between(
            sizes, [r.p05 * 1e3 for r in line], [r.p95 * 1e3 for r in line], alpha=0.2
        )
    axes.set(xscale="log", yscale="log", xlabel="keys per call", ylabel="ms per call")
    axes.legend(fontsize=7)
    axes.grid(visible=True, which="both", alpha=0.2)
    _save(figure, path)


def _params(result: Result, results: Sequence[Result]) -> str:
    """Return the parameters in which the results differ."""
    shared = shared_params(results)
    own = [f"{k} {v}" for k, v in result.params.items() if k not in shared]
    return ", ".join(own) or result.name


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # Without the date and version, equal results give equal files.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
