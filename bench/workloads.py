"""Key sequences: which rows of a table a batch asks for.

Tables hold the keys 0 .. n_rows - 1. A sampler is made once for a table and gives a
fresh batch at every call: a batch used twice would find its rows in the CPU's caches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import Keys, Rows

Sampler = Callable[[int], Keys]
"""Takes a number of keys and returns that many, int64, drawn anew."""

ZIPF_EXPONENT = 1.05
POWER_LAW_ALPHA = 1.2  # the default of hps_profiler


def uniform(n_rows: int, *, seed: int) -> Sampler:
    """Draw every key with the same probability."""
    rng = np.random.default_rng(seed)

    def sample(n: int) -> Keys:
        return rng.integers(0, n_rows, n, dtype=np.int64)

    return sample


def zipf(n_rows: int, *, seed: int, exponent: float = ZIPF_EXPONENT) -> Sampler:
    """Draw the r-th hottest key with probability proportional to ``r ** -exponent``.

    Hot keys lie scattered over the table.
    """
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n_rows + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights)
    key_of_rank = rng.permutation(n_rows).astype(np.int64, copy=False)

    def sample(n: int) -> Keys:
        drawn = rng.random(n) * cumulative[-1]
        ranks = np.searchsorted(cumulative, drawn, side="right")
        keys: Keys = key_of_rank[np.minimum(ranks, n_rows - 1)]
        return keys

    return sample


def power_law(n_rows: int, *, seed: int, alpha: float = POWER_LAW_ALPHA) -> Sampler:
    """Draw keys as hps_profiler does: a rounded power law over 1 .. n_rows.

    The density of ``y`` is proportional to ``y ** -alpha`` on ``[1, n_rows]``; the key
    is ``round(y) - 1``, so that small keys are hot and lie side by side.

    Source: the inverse of the distribution function, as in HugeCTR's data generators.
    """
    if alpha <= 0 or alpha == 1:
        raise ValueError(f"alpha is {alpha}; it must be positive and not 1")
    rng = np.random.default_rng(seed)
    power = 1.0 - alpha
    span = float(n_rows) ** power - 1.0

    def sample(n: int) -> Keys:
        values: NDArray[np.float64] = (rng.random(n) * span + 1.0) ** (1.0 / power)
        return np.rint(values).astype(np.int64) - 1

    return sample


SAMPLERS: dict[str, Callable[[int, int], Sampler]] = {
    "uniform": lambda n_rows, seed: uniform(n_rows, seed=seed),
    "zipf": lambda n_rows, seed: zipf(n_rows, seed=seed),
    "power_law": lambda n_rows, seed: power_law(n_rows, seed=seed),
}


def unique(sampler: Sampler, n: int) -> Keys:
    """Return ``n`` different keys in no particular order.

    The sampler must be able to give that many.
    """
    keys = np.empty(0, np.int64)
    while len(keys) < n:
        keys = np.union1d(keys, sampler(2 * n))
    keep = np.linspace(0, len(keys) - 1, n).astype(np.int64)
    chosen: Keys = keys[keep]
    np.random.default_rng(len(keys)).shuffle(chosen)
    return chosen


def table_rows(keys: Keys, dim: int, dtype: str = "float32") -> Rows:
    """Return the rows of keys: column d of key k holds ``k * dim + d``, wrapped.

    Values depend on the key alone, so any answer can be checked without a copy of the
    table. They stay below 2048, where float16 is exact.
    """
    rows = np.empty((len(keys), dim), dtype)
    columns = np.arange(dim, dtype=np.int64)
    for start in range(0, len(keys), 65_536):
        part = keys[start : start + 65_536]
        rows[start : start + 65_536] = (part[:, None] * dim + columns) % 2039
    return rows
