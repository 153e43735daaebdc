"""Command line: ``python -m bench.gpu --help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
MINUTES = 7.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return 1 if a check failed."""
    options = _parser().parse_args(arguments)
    if options.report:
        from bench.gpu.report import write_report

        print(write_report(options.out or RESULTS))
        return 0
    from bench.gpu.runs import run_all

    with tempfile.TemporaryDirectory(prefix="hps-numba-bench-gpu-") as scratch:
        return run_all(
            out=options.out or (Path(scratch) if options.smoke else RESULTS),
            smoke=options.smoke,
            only=options.only,
            seconds=60 * options.minutes,
            ordinal=options.device,
            alone=options.alone,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Checks and benchmarks on a GPU."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the results [bench/results/gpu; of a smoke run, none]",
    )
    parser.add_argument(
        "--only", default="", help="run the parts that have this in their name"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for everything"
    )
    parser.add_argument("--device", type=int, default=0, help="number of the device")
    parser.add_argument(
        "--smoke", action="store_true", help="run everything once, tiny"
    )
    parser.add_argument(
        "--alone", action="store_true", help="do without PyTorch and CuPy"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print tables of results, measure nothing",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
