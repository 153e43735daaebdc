"""What callers give, checked and brought into the form that tiers take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.types import Keys, Mask, Rows, TableSpec


def as_keys(keys: ArrayLike, spec: TableSpec) -> Keys:
    """Return keys as int64, of the shape given, contiguous; copies only if needed.

    Any integer dtype is taken. uint64 keys above the largest int64 wrap around, as they
    do in HugeCTR, which is one to one.

    Raises
    ------
    TypeError
        If the keys are not integers.
    """
    if type(keys) is np.ndarray and keys.dtype == np.int64 and keys.flags.carray:
        return keys
    if np.ma.is_masked(keys):
        raise TypeError(f"table {spec.tag}: masked keys are not supported")
    array = np.asarray(keys)
    if array.size == 0 and not isinstance(keys, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"table {spec.tag}: keys are integers; got an array of dtype {array.dtype} "
            f"and shape {array.shape}"
        )
    array = array.astype(np.int64, copy=False)
    # Compiled code is specialised for writable arrays, so read-only ones are copied.
    return np.require(array, requirements=("C", "W", "A"))


def check_length(n_keys: int, spec: TableSpec) -> None:
    """Refuse a lookup of more keys than the table's buffers are meant for."""
    if n_keys > spec.max_keys:
        raise ValueError(
            f"table {spec.tag}: a lookup of {n_keys} keys exceeds the limit of "
            f"{spec.max_keys} (max_batch_size * maxnum_catfeature_query_per_table_per_"
            f"sample); send smaller batches or raise the limit in the configuration"
        )


def as_rows(rows: ArrayLike, n_keys: int, spec: TableSpec) -> Rows:
    """Return rows as (n_keys, dim) in the table's dtype, contiguous.

    Raises
    ------
    TypeError
        If the values are not real numbers.
    ValueError
        If the shape does not fit.
    """
    try:
        array = np.asarray(rows)
    except ValueError as exc:
        raise ValueError(f"table {spec.tag}: rows are no matrix: {exc}") from exc
    if array.dtype.kind not in "fiu":
        raise TypeError(f"table {spec.tag}: rows are numbers; got dtype {array.dtype}")
    if array.shape != (n_keys, spec.dim):
        raise ValueError(
            f"table {spec.tag}: rows of {n_keys} keys have shape "
            f"({n_keys}, {spec.dim}); got {array.shape}"
        )
    with np.errstate(over="ignore"):  # float16 tables: too large becomes infinity
        array = array.astype(spec.numpy_dtype, copy=False)
    return np.require(array, requirements=("C", "W", "A"))


def as_output(
    out: NDArray[Any] | None, shape: tuple[int, ...], spec: TableSpec
) -> NDArray[Any]:
    """Return ``out`` if it can take the rows of keys of a shape, or a new array.

    Raises
    ------
    TypeError, ValueError
        If ``out`` has another dtype or shape, or cannot be written.
    """
    full = (*shape, spec.dim)
    if out is None:
        return np.empty(full, np.float32)
    if not isinstance(out, np.ndarray) or out.dtype not in (
        np.float32,
        spec.numpy_dtype,
    ):
        what = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(
            f"table {spec.tag}: out is a NumPy array of float32"
            f"{'' if spec.dtype.value == 'float32' else ' or ' + spec.dtype.value}; "
            f"got {what}"
        )
    _check_writable("out", out, full, spec)
    return out


def as_flags(found: Mask | None, shape: tuple[int, ...], spec: TableSpec) -> Mask:
    """Return ``found`` if it can mark keys of a shape, or a new array; not cleared.

    Raises
    ------
    TypeError, ValueError
        If ``found`` has another dtype or shape, or cannot be written.
    """
    if found is None:
        return np.empty(shape, np.bool_)
    if not isinstance(found, np.ndarray) or found.dtype != np.bool_:
        what = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
        raise TypeError(f"table {spec.tag}: found is a NumPy array of bool; got {what}")
    _check_writable("found", found, shape, spec)
    return found


def newest_of_each(keys: Keys, rows: Rows) -> tuple[Keys, Rows]:
    """Return each key once, with the last of its rows."""
    unique, last = np.unique(keys[::-1], return_index=True)
    if unique.size == keys.size:
        return keys, rows
    return unique, rows[keys.size - 1 - last]


def _check_writable(
    name: str, array: NDArray[Any], shape: tuple[int, ...], spec: TableSpec
) -> None:
    if array.shape != shape:
        raise ValueError(
            f"table {spec.tag}: {name} has shape {array.shape}; these keys need {shape}"
        )
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"table {spec.tag}: {name} must be contiguous and writable")
