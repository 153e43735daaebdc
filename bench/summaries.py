"""What a number of samples comes to. Needs NumPy alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Mark = Literal["few", "noisy", "disturbed", "launched"]
# Timed as single launches, where others are replays of a graph.
LAUNCHED: Literal["launched"] = "launched"

FEW_ROUNDS = 20
NOISY = 0.03


def spread(samples: ArrayLike) -> dict[str, float]:
    """Return median, p05, p95, p99 and max."""
    values = np.asarray(samples, np.float64)
    p05, median, p95, p99 = np.quantile(values, [0.05, 0.5, 0.95, 0.99])
    return {
        "median": float(median),
        "p05": float(p05),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(values.max()),
    }


def middle(per_round: ArrayLike) -> dict[str, float]:
    """Return median, p05 and p95 of something that was found once per round."""
    p05, median, p95 = np.quantile(np.asarray(per_round, np.float64), [0.05, 0.5, 0.95])
    return {"median": float(median), "p05": float(p05), "p95": float(p95)}


def marks(rounds: int, noise: float, quiet: bool) -> tuple[Mark, ...]:
    """Return why a figure should not be leant on."""
    found: list[Mark] = []
    if rounds < FEW_ROUNDS:
        found.append("few")
    if noise > NOISY:
        found.append("noisy")
    if not quiet:
        found.append("disturbed")
    return tuple(found)
