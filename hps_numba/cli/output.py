"""What the commands print on standard output."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hps_numba.cli.deploy import DeployedTable
    from hps_numba.cli.lookup import LocatedRow
    from hps_numba.cli.produce import Published
    from hps_numba.runtime.estimate import Estimate
    from hps_numba.tiers.model_files import FileSummary

_SHOWN_VALUES = 8  # of a row; JSON has all of them


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


def print_estimate(expected: Estimate) -> None:
    """Print the bytes that each table will take, and their sums."""
    header = (
        *("table", "rows", "host bytes", "rows in host", "disk bytes"),
        *("bytes a GPU", "rows in GPU"),
    )
    names = [f"{each.model}/{each.table}" for each in expected.tables]
    numbers = [
        (
            *(each.rows, each.host_bytes, each.host_rows, each.disk_bytes),
            *(each.gpu_bytes, each.gpu_rows),
        )
        for each in expected.tables
    ]
    sums = tuple(sum(column) for column in zip(*numbers, strict=True))
    lines = [
        (name, *(f"{number:,}" for number in row))
        for name, row in zip([*names, "all"], [*numbers, sums], strict=True)
    ]
    _print_columns(header, lines, right=set(header[1:]))
    if expected.redis_bytes:
        typer.echo(f"Redis: about {expected.redis_bytes:,} bytes on all masters")
    for device, n_bytes in expected.gpu_bytes.items():
        buffers = expected.gpu_buffer_bytes[device]
        typer.echo(
            f"GPU {device}: {n_bytes:,} bytes for caches, {buffers:,} for buffers"
        )
    if expected.pinned_bytes:
        typer.echo(f"pinned host memory: {expected.pinned_bytes:,} bytes for buffers")


def print_deployment(tables: Sequence[DeployedTable]) -> None:
    """Print a line per table and tier: rows, bytes, seconds, loaded or resumed."""
    header = ("table", "state", "seconds", "tier", "rows", "bytes")
    lines = [
        (
            f"{each.model}/{each.table}",
            _state(each),
            f"{each.seconds:.2f}",
            use.tier,
            f"{use.rows:,}",
            f"{use.bytes:,}",
        )
        for each in tables
        for use in each.tiers
    ]
    _print_columns(header, lines, right={"seconds", "rows", "bytes"})


def deployment_json(tables: Sequence[DeployedTable]) -> list[dict[str, Any]]:
    """Return what ``print_deployment`` prints, for a script."""
    return [
        {
            "model": each.model,
            "table": each.table,
            "state": _state(each),
            "seconds": each.seconds,
            "tiers": [
                {"tier": use.tier, "rows": use.rows, "bytes": use.bytes}
                for use in each.tiers
            ],
        }
        for each in tables
    ]


def print_published(done: Published) -> None:
    """Print what was delivered, as a line."""
    what = "deletions" if done.deleted else "rows"
    typer.echo(
        f"{done.topic}: {done.rows:,} {what}, {done.messages:,} messages, "
        f"{done.bytes:,} bytes, {done.seconds:.2f} s"
    )


def print_rows(rows: Sequence[LocatedRow]) -> None:
    """Print a line per key: the tier that it came from, and its first values."""
    lines = [(str(each.key), each.tier, _values(each)) for each in rows]
    _print_columns(("key", "tier", "row"), lines, right={"key"})


def rows_json(model: str, table: str, rows: Sequence[LocatedRow]) -> dict[str, Any]:
    """Return looked-up rows for a script, with all their values."""
    return {
        "model": model,
        "table": table,
        "rows": [
            {
                "key": each.key,
                "tier": each.tier,
                "row": [_json_value(value) for value in each.row.tolist()],
            }
            for each in rows
        ],
    }


def _print_columns(
    header: Sequence[str], lines: Iterable[Sequence[str]], *, right: set[str]
) -> None:
    """Print columns as wide as their longest entry, whatever the terminal's width."""
    columns = list(zip(header, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        cells = [
            text.rjust(width) if name in right else text.ljust(width)
            for name, text, width in zip(header, line, widths, strict=True)
        ]
        typer.echo("  ".join(cells).rstrip())


def _state(table: DeployedTable) -> str:
    return "loaded" if table.loaded else "resumed"


def _values(each: LocatedRow) -> str:
    shown = " ".join(f"{value:g}" for value in each.row[:_SHOWN_VALUES].tolist())
    hidden = len(each.row) - _SHOWN_VALUES
    return f"{shown} ... {hidden} more" if hidden > 0 else shown


def _json_value(value: float) -> float | str:
    """Return a float as JSON has it; what it lacks becomes a string."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


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
