"""A comparison: variants timed in one run, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.defaults import Run
from bench.harness import Meter, Timing, Variant, interleave, speedup
from bench.records import Param, Published, Ratio, Result, Sense, ratio, timed


@dataclass(frozen=True)
class Claim:
    """Variant ``variant`` is faster (slower, with ``at_most``) than ``against``.

    ``floor`` is the factor that is promised, or None if it is only of interest.
    """

    variant: str
    against: str
    floor: float | None = None
    sense: Sense = "at_least"


def compare(
    run: Run,
    name: str,
    variants: Sequence[Variant],
    *,
    params: Mapping[str, Param],
    claims: Sequence[Claim] = (),
    absent: Mapping[str, str] | None = None,
    published: Published | None = None,
    meter: Meter | None = None,
) -> list[Result]:
    """Time the variants interleaved and return a result for each.

    ``meter`` knows of servers that work for this process. ``absent`` and
    ``published`` are noted with the first variant, and claims against an absent
    baseline are left out.
    """
    timings = interleave(variants, run.plan, meter)
    return [
        timed(
            name,
            timing,
            params=params,
            where=run.where,
            ratios=[
                _judged(claim, timings, promised=run.where.profile == "full")
                for claim in claims
                if claim.variant == timing.name and claim.against in timings
            ],
            absent=absent if i == 0 else None,
            published=published if i == 0 else None,
        )
        for i, timing in enumerate(timings.values())
    ]


def _judged(claim: Claim, timings: Mapping[str, Timing], *, promised: bool) -> Ratio:
    factors = speedup(timings[claim.variant], timings[claim.against])
    if claim.sense == "at_most":
        factors = 1 / factors
    floor = claim.floor if promised else None  # tiny sizes promise nothing
    return ratio(claim.against, factors, floor=floor, sense=claim.sense)
