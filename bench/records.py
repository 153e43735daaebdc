"""Results of benchmarks: one JSON object a line, well formed or refused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from bench import machine
from bench.harness import Timing
from bench.summaries import Mark, marks, middle, spread

Param = bool | int | float | str
Sense = Literal["at_least", "at_most"]


class Record(BaseModel):
    """Base of what is written: frozen, without unknown fields, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Ratio(Record):
    """A comparison inside one run: median, p05 and p95 over its rounds.

    With ``at_least`` it says how many times faster per item than ``against`` the
    variant is; with ``at_most`` how many times slower. ``floor`` is the promised bound.
    """

    against: str
    sense: Sense
    median: float = Field(gt=0)
    p05: float = Field(gt=0)
    p95: float = Field(gt=0)
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the median keeps the bound; true if there is none."""
        if self.floor is None:
            return True
        if self.sense == "at_least":
            return self.median >= self.floor
        return self.median <= self.floor


class Published(Record):
    """What others published for the same work, measured on their machine."""

    source: str
    values: dict[str, float]


class Result(Record):
    """One variant of one benchmark.

    Times (unit ``s``) are per call, and the quantiles are over all counted calls;
    ``items`` is the keys or rows of one call. ``noise`` is the relative spread of the
    rounds' medians. ``marks`` tells why a figure should not be leant on: fewer than 20
    rounds, more than 3 % noise, or a machine that was not quiet. ``absent`` names the
    baselines that could not run, and why.
    """

    name: str
    variant: str
    params: dict[str, Param]
    unit: str
    median: float
    p05: float
    p95: float
    p99: float
    max: float
    items: int = Field(ge=1)
    rounds: int = Field(ge=1)
    samples: int = Field(ge=1)
    noise: float = Field(ge=0)
    marks: tuple[Mark, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    absent: dict[str, str] = {}
    published: Published | None = None
    profile: Literal["full", "smoke"]
    machine: machine.Machine
    versions: dict[str, str]
    commit: str
    time: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What the result is about: equal keys are repetitions of one measurement."""
        params = " ".join(f"{k}={v}" for k, v in sorted(self.params.items()))
        return self.name, params, self.variant


@dataclass(frozen=True)
class Origin:
    """Where results come from: profile, machine, versions, commit, time."""

    profile: Literal["full", "smoke"]
    machine: machine.Machine
    versions: Mapping[str, str]
    commit: str
    time: str


@cache
def origin(profile: Literal["full", "smoke"]) -> Origin:
    """Return the origin of this process's results."""
    return Origin(
        profile,
        machine.this_machine(),
        machine.versions(),
        machine.commit(),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def ratio(
    against: str,
    per_round: ArrayLike,
    *,
    floor: float | None = None,
    sense: Sense = "at_least",
) -> Ratio:
    """Summarise a comparison that was made once per round."""
    return Ratio(against=against, sense=sense, floor=floor, **middle(per_round))


def timed(
    name: str,
    timing: Timing,
    *,
    params: Mapping[str, Param],
    where: Origin,
    ratios: Sequence[Ratio] = (),
    absent: Mapping[str, str] | None = None,
    published: Published | None = None,
) -> Result:
    """Return the result of a timed variant."""
    return Result(
        name=name,
        variant=timing.name,
        params=dict(params),
        unit="s",
        **spread(timing.calls),
        items=timing.items,
        rounds=len(timing.per_item),
        samples=len(timing.calls),
        noise=timing.noise,
        marks=(
            *marks(len(timing.per_item), timing.noise, timing.quiet),
            *timing.marks,
        ),
        ratios=tuple(ratios),
        absent=dict(absent or {}),
        published=published,
        **_origin_fields(where),
    )


def counted(
    name: str,
    variant: str,
    value: float,
    *,
    unit: str,
    params: Mapping[str, Param],
    where: Origin,
) -> Result:
    """Return the result of something that is counted, and has no spread."""
    return Result(
        name=name,
        variant=variant,
        params=dict(params),
        unit=unit,
        **spread([value]),
        items=1,
        rounds=1,
        samples=1,
        noise=0.0,
        **_origin_fields(where),
    )


def write(path: Path, result: Result) -> None:
    """Append a result to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(result.model_dump_json(exclude_defaults=True) + "\n")


def read(path: Path) -> list[Result]:
    """Read a file of JSON lines.

    Raises
    ------
    pydantic.ValidationError
        If a line is not a well-formed result.
    """
    lines = path.read_text().splitlines()
    return [Result.model_validate_json(line) for line in lines if line.strip()]


def shared_params(results: Sequence[Result]) -> list[str]:
    """Return the names of the parameters that are the same in all results."""
    first = results[0].params
    return [k for k in first if all(r.params.get(k) == first[k] for r in results)]


def _origin_fields(where: Origin) -> dict[str, object]:
    return {
        "profile": where.profile,
        "machine": where.machine,
        "versions": dict(where.versions),
        "commit": where.commit,
        "time": where.time,
    }
