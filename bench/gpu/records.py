"""Results as JSON lines that ``bench.records`` reads back, written without pydantic."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bench import machine
from bench.harness import Timing
from bench.summaries import marks, middle, spread

Param = bool | int | float | str


@dataclass(frozen=True)
class Ratio:
    """A comparison inside one run; see ``bench.records.Ratio``."""

    against: str
    sense: str
    median: float
    p05: float
    p95: float
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the median keeps the bound; true if there is none."""
        if self.floor is None:
            return True
        if self.sense == "at_least":
            return self.median >= self.floor
        return self.median <= self.floor


@dataclass(frozen=True)
class Line:
    """One result; the fields are those of ``bench.records.Result``."""

    name: str
    variant: str
    params: dict[str, Param]
    unit: str
    median: float
    p05: float
    p95: float
    p99: float
    max: float
    items: int = 1
    rounds: int = 1
    samples: int = 1
    noise: float = 0.0
    marks: tuple[str, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    published: dict[str, Any] | None = None

    @property
    def rate(self) -> float:
        """Items a second, of a result in seconds."""
        return self.items / self.median


def ratio(
    against: str,
    per_round: ArrayLike,
    *,
    floor: float | None = None,
    sense: str = "at_least",
) -> Ratio:
    """Summarise a comparison that was made once per round."""
    return Ratio(against, sense, floor=floor, **middle(per_round))


def timed(
    name: str,
    timing: Timing,
    params: Mapping[str, Param],
    *,
    ratios: Sequence[Ratio] = (),
    absent: Mapping[str, str] | None = None,
    published: dict[str, Any] | None = None,
) -> Line:
    """Return the result of something that was timed."""
    rounds = len(timing.per_item)
    return Line(
        name,
        timing.name,
        dict(params),
        "s",
        **spread(timing.calls),
        items=timing.items,
        rounds=rounds,
        samples=len(timing.calls),
        noise=timing.noise,
        marks=(*marks(rounds, timing.noise, timing.quiet), *timing.marks),
        ratios=tuple(ratios),
        absent=dict(absent or {}),
        published=published,
    )


def counted(
    name: str,
    variant: str,
    value: float,
    unit: str,
    params: Mapping[str, Param] | None = None,
) -> Line:
    """Return the result of something that has no spread."""
    same = (float(value),) * 5
    return Line(name, variant, dict(params or {}), unit, *same)


def left_out(name: str, reasons: Mapping[str, str]) -> Line:
    """Return the record of what did not run, and why."""
    line = counted(name, "left out", 0, "left out")
    return dataclasses.replace(line, absent=dict(reasons))


class Sink:
    """Where results go: a file of JSON lines for each name.

    Parameters
    ----------
    directory
        Of the files, which are appended to.
    profile
        ``full`` or ``smoke``.
    gpu, versions
        What else a result is to tell of where it comes from.
    """

    def __init__(
        self, directory: Path, profile: str, *, gpu: str, versions: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self.lines: list[Line] = []
        here = dataclasses.replace(machine.this_machine(), gpu=gpu)
        self._origin = {
            "profile": profile,
            "machine": dataclasses.asdict(here),
            "versions": {**machine.versions(), **versions},
            "commit": machine.commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def write(self, line: Line) -> None:
        """Append a result.

        Raises
        ------
        ValueError
            If it holds NaN or infinity.
        """
        values = dataclasses.asdict(line)
        for name in ("marks", "ratios", "absent", "published"):
            if not values[name]:
                del values[name]
        text = json.dumps(
            {**values, **self._origin}, allow_nan=False, default=_plain_number
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / f"{line.name}.jsonl").open("a") as file:
            file.write(text + "\n")
        self.lines.append(line)


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is no number")
