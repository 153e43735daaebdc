"""What the commands print on standard output."""

from __future__ import annotations

import json
import math
from typing import Any

import typer

from hps_numba.tiers.model_files import FileSummary


def print_json(value: Any) -> None:
    """Print a value as standard JSON, which has no infinities."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_summary(summary: FileSummary) -> None:
    """Print what a model directory holds, a line each."""
    typer.echo(summary.path)
    lines = {
        "rows": f"{summary.n_rows:,}",
        "dim": f"{summary.dim:,}",
        "bytes": f"{summary.total_bytes:,}",
        "keys": _key_line(summary),
        "duplicates": f"{summary.n_duplicates:,}",
        "values": _value_line(summary),
        "non-finite": f"{summary.n_non_finite:,} values",
        "zero rows": f"{summary.n_zero_rows:,}",
    }
    for name, text in lines.items():
        typer.echo(f"  {name:<12}{text}")


def _key_line(summary: FileSummary) -> str:
    if summary.min_key is None:
        return f"none ({summary.key_dtype})"
    return f"{summary.min_key:,} to {summary.max_key:,} ({summary.key_dtype})"


def _value_line(summary: FileSummary) -> str:
    if summary.mean is None:
        return "none that are finite"
    return (
        f"{summary.min_value:g} to {summary.max_value:g},"
        f" mean {summary.mean:g}, std {summary.std:g}"
    )


def json_value(value: float) -> float | str:
    """Return a float as JSON has it; what it lacks becomes a string."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
