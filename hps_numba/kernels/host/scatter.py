"""Copying rows of unique keys to every position that asked for them."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.memory import copy_row


@njit(nogil=True, cache=True)
def scatter_rows(rows, row_found, sources, targets, out, found):
    """Copy row ``sources[i]`` to ``targets[i]`` and mark it, if it was found.

    Reads    rows (m, row_bytes) uint8, row_found bool (m,), sources, targets int64 (n,)
    Writes   out (k, row_bytes) uint8, found bool (k,)
    Returns  how many were copied
    """
    row_bytes = rows.shape[1]
    base = np.int64(rows.ctypes.data)
    target = np.int64(out.ctypes.data)
    n = 0
    for i in range(sources.size):
        if row_found[sources[i]]:
            copy_row(
                target + targets[i] * row_bytes,
                base + sources[i] * row_bytes,
                row_bytes,
            )
            found[targets[i]] = True
            n += 1
    return n
