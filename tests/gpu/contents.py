"""What a block of device memory holds, read as its layout says."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cuda.layout import (
    DIGESTS,
    KEY_BYTES,
    SET_BYTES,
    WAYS,
    CacheLayout,
)
from tests.kernels.cuda.oracle import Array


def contents_of(
    layout: CacheLayout, block: Array, table: int = 0
) -> tuple[Array, Array]:
    """Return the keys of a table, and the bytes of their rows.

    Fails if a set was left held.
    """
    n_sets = layout.tables[table].n_sets
    n_slots, stride = layout.tables[table].n_slots, layout.rows.stride_bytes

    def part(name: str, n_bytes: int) -> Array:
        start = layout.offset(name, table)
        return block[start : start + n_bytes]

    meta = part("meta", n_sets * SET_BYTES).reshape(n_sets, SET_BYTES)
    seqs = meta[:, :DIGESTS].copy().view(np.uint32)
    assert (seqs % 2 == 0).all(), "a set was left held"
    slots = np.flatnonzero(meta[:, DIGESTS : DIGESTS + WAYS].reshape(-1))
    keys = part("keys", n_slots * KEY_BYTES).view(np.int64)[slots]
    rows = part("rows", n_slots * stride).reshape(n_slots, stride)[slots]
    return keys, np.ascontiguousarray(rows[:, : layout.rows.row_bytes])
