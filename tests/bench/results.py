"""Results that tests make up."""

from __future__ import annotations

import numpy as np

from bench.harness import Timing
from bench.machine import Machine
from bench.records import Origin, Param, Ratio, Result, timed

WHERE = Origin(
    profile="full",
    machine=Machine(
        cpu="A CPU",
        cores=2,
        memory_bytes=24 << 30,
        l3_bytes=0,
        kernel="6.1",
        huge_pages="madvise",
    ),
    versions={"python": "3.11.7", "numpy": "2.0.0"},
    commit="0123456789ab",
    time="2024-06-01T12:00:00Z",
)


def result(
    name: str = "fetch",
    variant: str = "ours",
    *,
    ms: float = 2.0,
    params: dict[str, Param] | None = None,
    ratios: tuple[Ratio, ...] = (),
    where: Origin = WHERE,
    absent: dict[str, str] | None = None,
) -> Result:
    """Return a result of 20 quiet rounds that all took ``ms`` for 1000 keys."""
    seconds = np.full(20, ms / 1e3)
    return timed(
        name,
        Timing(variant, 1_000, seconds, seconds / 1_000, quiet=True),
        params={"dim": 32} if params is None else params,
        where=where,
        ratios=ratios,
        absent=absent,
    )
