"""What the sizes of two files without a header say about their contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

VALUE_BYTES = 4
_SUSPECT_WORDS = 8192  # of the key file, read to tell int64 keys from uint32 ones

KeyBytes = Literal[4, 8]
FileBytes = NDArray[np.uint8]


class SizeError(Exception):
    """The sizes of the two files do not fit; the message says in what way."""


@dataclass(frozen=True)
class Layout:
    """Rows, values per row and bytes per key of a model directory."""

    n_rows: int
    dim: int
    key_bytes: int


def fit_sizes(
    key_file: FileBytes,
    row_file_bytes: int,
    dim: int | None,
    key_bytes: KeyBytes | None,
) -> Layout:
    """Return the one layout that fits both files, or raise ``SizeError``."""
    if dim is None:
        dim = _derived_dim(key_file.nbytes, row_file_bytes, key_bytes or 8)
    n_rows = _count_rows(row_file_bytes, dim)
    return Layout(n_rows, dim, _key_width(key_file, n_rows, dim, key_bytes))


def _derived_dim(key_file_bytes: int, row_file_bytes: int, key_bytes: int) -> int:
    """Return the dim that makes both files the same number of rows."""
    n_rows, rest = divmod(key_file_bytes, key_bytes)
    if rest:
        raise SizeError(f"no whole number of {key_bytes}-byte keys; is it truncated?")
    if n_rows == 0:
        raise SizeError("no keys, so the dim cannot be derived; give the dim")
    dim, rest = divmod(row_file_bytes, n_rows * VALUE_BYTES)
    if rest or dim == 0:
        raise SizeError(
            f"{n_rows} keys of {key_bytes} bytes, but no whole number of float32 values"
            " a key; write both files again, or give the dim"
        )
    return dim


def _count_rows(row_file_bytes: int, dim: int) -> int:
    """Return how many rows of float32 the row file holds."""
    n_rows, rest = divmod(row_file_bytes, dim * VALUE_BYTES)
    if rest:
        raise SizeError(
            f"dim {dim} needs {dim * VALUE_BYTES} bytes a row, which leaves {n_rows}"
            f" rows and {rest} bytes; the file is truncated or the dim is wrong"
        )
    return n_rows


def _key_width(
    key_file: FileBytes, n_rows: int, dim: int, expected: KeyBytes | None
) -> int:
    """Return the bytes per key that give as many keys as there are rows."""
    width, rest = divmod(key_file.nbytes, n_rows) if n_rows else (0, key_file.nbytes)
    if n_rows == 0 and rest == 0:
        return expected or 8
    if rest or width not in (4, 8):
        raise SizeError(
            f"{n_rows} rows of dim {dim} need {8 * n_rows} bytes of int64 keys or"
            f" {4 * n_rows} of uint32 keys; write both files again, or correct the dim"
        )
    if expected not in (None, width):
        raise SizeError(
            f"{n_rows} rows of dim {dim} have {width} bytes a key, {expected} are"
            " expected; correct the dim or supportlonglong"
        )
    if expected is None and width == 4 and _looks_like_int64(key_file):
        raise SizeError(
            f"read as {n_rows} uint32 keys for dim {dim}, every second key repeats; it"
            f" looks like {n_rows // 2} int64 keys: correct the dim, maybe to {2 * dim}"
        )
    return width


def _looks_like_int64(key_file: FileBytes) -> bool:
    """Return whether 4-byte keys would repeat as the upper halves of int64 keys do."""
    upper = key_file.view("<u4")[1:_SUSPECT_WORDS:2]
    sign_only = ((upper == 0) | (upper == 0xFFFFFFFF)).all()
    return key_file.nbytes % 8 == 0 and sign_only and len(upper) > len(np.unique(upper))
