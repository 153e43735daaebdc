"""Command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bench import (
    bench_host,
    bench_lookup,
    bench_pipeline,
    bench_produce,
    bench_redis,
    bench_rocksdb,
    bench_streams,
    bench_three_tiers,
)
from bench.defaults import FULL, FULL_PLAN, SMOKE, SMOKE_PLAN, Run
from bench.records import Result, origin, read, write

RESULTS = Path(__file__).parent / "results"

MODULES = (
    bench_host,
    bench_redis,
    bench_rocksdb,
    bench_pipeline,
    bench_three_tiers,
    bench_lookup,
    bench_produce,
    bench_streams,
)
BENCHMARKS = {b.__name__: b for module in MODULES for b in module.BENCHMARKS}


def main(
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run everything once, tiny, and check it.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Run the benchmarks that have this in their name.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the results [bench/results].")
    ] = None,
) -> None:
    """Run benchmarks and write their results as JSON lines, a file for each."""
    names = [name for name in BENCHMARKS if only in name]
    if not names:
        raise typer.BadParameter(
            f"no benchmark has {only!r} in its name; there are {', '.join(BENCHMARKS)}"
        )
    with tempfile.TemporaryDirectory(prefix="hps-numba-bench-") as scratch:
        run = Run(
            sizes=SMOKE if smoke else FULL,
            plan=SMOKE_PLAN if smoke else FULL_PLAN,
            scratch=Path(scratch),
            where=origin("smoke" if smoke else "full"),
        )
        directory = out or (run.scratch / "results" if smoke else RESULTS)
        for name in track(names, "benchmarks", console=Console(stderr=True)):
            _run_one(name, run, directory / f"{name}.jsonl")


def _run_one(name: str, run: Run, path: Path) -> None:
    """Run a benchmark, and read its results back to check that they are well formed."""
    results = []
    for result in BENCHMARKS[name](run):
        write(path, result)
        print(describe(result), flush=True)
        results.append(result)
    if not results or read(path)[-len(results) :] != results:
        raise SystemExit(f"benchmark {name}: {path} does not hold what was measured")


def describe(result: Result) -> str:
    """Return a result as one line: what, how long, how fast, against what."""
    params = " ".join(f"{k}={v}" for k, v in result.params.items())
    if result.unit == "s":
        rate = result.items / result.median / 1e6
        value = f"{result.median * 1e3:.4g} ms  {rate:.4g} M/s"
    else:
        value = f"{result.median:.4g} {result.unit}"
    ratios = [
        f"{r.median:.3g}x {r.against}"
        + ("" if r.floor is None else f" (floor {r.floor:g}: {_verdict(r.met)})")
        for r in result.ratios
    ]
    missing = [f"absent: {name}" for name in result.absent]
    marks = [f"[{', '.join(result.marks)}]"] if result.marks else []
    head = f"{result.name} {params} | {result.variant} | {value}"
    return " | ".join([head, *ratios, *missing, *marks])


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    typer.run(main)
