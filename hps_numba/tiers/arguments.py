"""Checks of the arrays that a caller passes to a tier.

Compiled code works on addresses: an array of another shape or layout would make it read
or write outside. Every check raises ``ValueError``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import Keys, Mask, Rows, TableSpec


def for_kernel(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that compiled code exists for: read-only ones are copied."""
    return np.require(array, requirements=("W", "A"))


def check_keys(spec: TableSpec, keys: Keys) -> None:
    """Refuse keys that are not contiguous int64 (n,)."""
    if keys.dtype != np.int64 or keys.ndim != 1 or not keys.flags.c_contiguous:
        raise ValueError(
            f"table {spec.tag}: keys are int64, one-dimensional and contiguous; "
            f"got {_describe(keys)}"
        )


def check_rows(spec: TableSpec, keys: Keys, rows: Rows) -> None:
    """Refuse keys, and rows that are not contiguous (n, dim) of the table's dtype."""
    check_keys(spec, keys)
    if (
        rows.shape != (keys.shape[0], spec.dim)
        or rows.dtype != spec.numpy_dtype
        or not rows.flags.c_contiguous
    ):
        raise ValueError(
            f"table {spec.tag}: rows of {keys.shape[0]} keys are contiguous "
            f"{spec.dtype.value} of shape ({keys.shape[0]}, {spec.dim}); "
            f"got {_describe(rows)}"
        )


def check_output(spec: TableSpec, out: Rows, found: Mask) -> None:
    """Refuse arrays that a fetch cannot write."""
    if (
        found.shape != out.shape[:1]
        or found.dtype != np.bool_
        or not found.flags.c_contiguous
    ):
        raise ValueError(
            f"table {spec.tag}: found is contiguous bool of shape {out.shape[:1]}; "
            f"got {_describe(found)}"
        )
    if not (out.flags.writeable and found.flags.writeable):
        raise ValueError(
            f"table {spec.tag}: out and found are written, and one is "
            "read-only; pass writable arrays"
        )


def _describe(array: NDArray[Any]) -> str:
    layout = "contiguous" if array.flags.c_contiguous else "strided"
    return f"{layout} {array.dtype} of shape {array.shape}"
