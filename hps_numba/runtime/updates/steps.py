"""Which rows a training step changed, and what they are now."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.types import RowBlock


def touched_rows(
    weights: Any, indices: Any = None, *, keys: ArrayLike | None = None
) -> RowBlock:
    """Return the rows of an embedding that a step touched, each once, as they are now.

    ::

        loss.backward()
        optimizer.step()
        step = touched_rows(embedding, batch)
        producer.send("wdl", "item", step.keys, step.rows)

    Parameters
    ----------
    weights
        A NumPy array or PyTorch tensor (n, dim), or a ``torch.nn.Embedding``.
    indices
        Row numbers that the step looked up, integers of any shape; or a gradient of
        ``weights``, sparse or dense, whose rows that are not zero count. By default the
        gradient that the weights have.
    keys
        Keys of all rows, integers (n,). By default a row's number is its key.

    Returns
    -------
    RowBlock
        Copies, in host memory. Of a tensor on a device only these rows are brought.

    Raises
    ------
    ValueError
        If there is no gradient, a number is out of range, or shapes do not fit.
    TypeError
        If row numbers are not integers.

    Notes
    -----
    An optimiser with momentum or weight decay changes rows that have no gradient, too,
    unless it is made for sparse gradients.

    PyTorch is not imported: tensors are told by what they can do.
    """
    matrix = getattr(weights, "weight", weights)
    if len(matrix.shape) != 2:
        raise ValueError(f"weights are (n, dim); got shape {tuple(matrix.shape)}")
    if indices is None:
        indices = getattr(matrix, "grad", None)
        if indices is None:
            raise ValueError(
                "weights have no gradient; give indices, or call before zero_grad()"
            )
    n_rows = int(matrix.shape[0])
    numbers = np.unique(_row_numbers(indices, tuple(matrix.shape)))
    if numbers.size and not 0 <= numbers[0] <= numbers[-1] < n_rows:
        raise ValueError(
            f"row numbers are 0 to {n_rows - 1}; got {numbers[0]} to {numbers[-1]}"
        )
    rows = _to_numpy(_detached(matrix)[numbers])
    if keys is None:
        return RowBlock(numbers, rows)
    of_rows = np.asarray(keys)
    if of_rows.shape != (n_rows,):
        raise ValueError(f"{n_rows} rows have keys ({n_rows},); got {of_rows.shape}")
    return RowBlock(of_rows[numbers], rows)


def _row_numbers(indices: Any, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return row numbers, which may repeat, of indices or of a gradient."""
    if getattr(indices, "is_sparse", False):
        return _to_numpy(_detached(indices).coalesce().indices()[0]).astype(np.int64)
    if len(getattr(indices, "shape", ())) == 2 and tuple(indices.shape) == shape:
        dense = _to_numpy(indices)
        if dense.dtype.kind == "f":
            return np.flatnonzero(dense.any(axis=1))
    numbers = np.asarray(_to_numpy(indices))
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"row numbers are integers; got dtype {numbers.dtype}")
    return numbers.ravel().astype(np.int64)


def _detached(array: Any) -> Any:
    """Return a tensor without its history, or an array as it is."""
    return array.detach() if hasattr(array, "detach") else array


def _to_numpy(array: Any) -> NDArray[Any]:
    """Return an array in host memory; types that NumPy lacks become float32."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:  # bfloat16
        return np.asarray(tensor.float().numpy())
