"""The small call that HPS published, through the server."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.plan import Run
from bench.gpu.records import Line


def small_calls(run: Run) -> Iterator[Line]:
    run.not_run["served"] = "not yet"
    yield from ()
