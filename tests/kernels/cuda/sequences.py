"""Keys, rows and random operations for the tests of kernels."""

from __future__ import annotations

import numpy as np

from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.oracle import Array


def rows_for(cache: CheckedCache, n: int, *, seed: int) -> Array:
    """Return finite rows of the stored type, bfloat16 as its bits."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, cache.rows.dim)).astype(np.float32)
    if cache.rows.stored == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(cache.cpu.stored)


def keys_of_set(cache: CheckedCache, n_set: int = 0, table: int = 0) -> set[int]:
    """Return the keys that a set holds in the cache's memory."""
    taken = cache.cpu.digests(table)[n_set] != 0
    return set(cache.cpu.stored_keys(table)[n_set][taken].tolist())
