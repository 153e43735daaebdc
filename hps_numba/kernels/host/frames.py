"""Records of an update stream, gathered from where their keys and rows lie."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.memory import copy_bytes, copy_row, prefetch

_AHEAD = 16  # rows that are asked for before they are copied


@njit(nogil=True, cache=True)
def gather_records(keys, raw_rows, order, out):
    """Write key, row, key, row and so on of some positions, without gaps.

    Reads    keys int64 (n,), raw_rows uint8 (n, bytes of a row), order int64 (m,)
    Writes   out uint8 (m * (8 + bytes of a row),)
    Cost     reads rows in the order given, once, and writes ascending addresses
    Oracle   hps_numba.runtime.updates.frames.pack
    """
    row_bytes = raw_rows.shape[1]
    key_base = np.int64(keys.ctypes.data)
    row_base = np.int64(raw_rows.ctypes.data)
    at = np.int64(out.ctypes.data)
    for i in range(order.size):
        if i + _AHEAD < order.size:
            prefetch(row_base + order[i + _AHEAD] * row_bytes)
        copy_bytes(at, key_base + order[i] * 8, 8)
        copy_row(at + 8, row_base + order[i] * row_bytes, row_bytes)
        at += 8 + row_bytes
