"""The payload of an update: a header, then records of one table.

::

    u32 magic "HCTR" | u32 bytes of a row | key, row | key, row | ...

All numbers are little-endian and a key has 8 or 4 bytes, as HugeCTR HPS writes them.
A header alone carries nothing: HPS sends such beacons. A deletion has rows of 0 bytes,
and its message has the Kafka key ``DELETE``: HPS discards messages with a key, so that
servers of HPS can read a topic with deletions.

Frames do not tell the width of their keys or the dtype of their rows. Keys of another
width are found out by the frame's length, except where it fits both widths.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import UpdateError
from hps_numba.types import Keys, Rows

MAGIC = b"HCTR"
HEADER_BYTES = 8
DELETE = b"delete"
"""The Kafka key of a message whose frame holds keys to delete."""

KeyBytes = Literal[4, 8]
RawRows = NDArray[np.uint8]

_KEY_DTYPES = {4: "<u4", 8: "<i8"}


class BadFrame(str, Enum):
    """Why a message of an update stream cannot be applied."""

    KEYED = "keyed"  # with another Kafka key than DELETE
    NULL_PAYLOAD = "null_payload"
    MAGIC = "magic"
    TRUNCATED = "truncated"
    VALUE_SIZE = "value_size"
    KEY_WIDTH = "key_width"


class FrameError(UpdateError):
    """A message holds no frame of its table.

    Parameters
    ----------
    reason
        The kind of fault, by which it is counted.
    text
        What was found, and what was expected.
    """

    def __init__(self, reason: BadFrame, text: str) -> None:
        super().__init__(f"{reason.value}: {text}")
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Records:
    """What one frame holds, in the order in which it was written.

    Parameters
    ----------
    keys
        int64 (n,), a key may repeat.
    raw_rows
        Bytes of the rows, uint8 (n, bytes of a row), or None for keys to delete.

    Notes
    -----
    Both may be read-only, strided views of the payload.
    """

    keys: Keys
    raw_rows: RawRows | None

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, dim: int, dtype: np.dtype[Any]) -> Rows:
        """Return the rows as (n, dim) in ``dtype``; a view if they are stored so.

        Rows of 4 bytes a value are float32 and those of 2 float16. Values too large for
        float16 become infinite.
        """
        assert self.raw_rows is not None
        if not len(self):  # a beacon may have rows of any size
            return np.empty((0, dim), dtype)
        itemsize = self.raw_rows.shape[1] // dim
        rows = self.raw_rows.view("<f4" if itemsize == 4 else "<f2")
        with np.errstate(over="ignore"):
            return rows.astype(dtype, copy=False)


def header(row_bytes: int) -> bytes:
    """Return what a frame of rows of ``row_bytes`` begins with; 0 for deletions."""
    return MAGIC + row_bytes.to_bytes(4, "little")


def encode(keys: Keys, rows: Rows | None, *, key_bytes: KeyBytes = 8) -> bytes:
    """Return the frame of rows, or of keys to delete.

    Parameters
    ----------
    keys
        int64 (n,).
    rows
        float32 or float16 (n, dim), or None to delete.
    key_bytes
        Width of a key in the frame.

    Raises
    ------
    ValueError
        If a key does not fit into 4 bytes, which hold 0 to 2**32 - 1.
    """
    row_bytes = 0 if rows is None else rows.shape[1] * rows.itemsize
    return header(row_bytes) + pack(keys, rows, key_bytes=key_bytes).tobytes()


def pack(keys: Keys, rows: Rows | None, *, key_bytes: KeyBytes = 8) -> NDArray[Any]:
    """Return the records of a frame as a contiguous structured array (n,).

    Parameters and errors are those of ``encode``. The bytes of records that follow one
    another are a frame's body, so a frame may be put together from several arrays.
    """
    if key_bytes == 4 and keys.size and (keys.min() < 0 or keys.max() >= 1 << 32):
        raise ValueError("keys of 4 bytes are 0 to 2**32 - 1; write 8-byte keys")
    row_bytes = 0 if rows is None else rows.shape[1] * rows.itemsize
    records = np.empty(len(keys), _record(key_bytes, row_bytes))
    records["key"] = keys
    if rows is not None:
        little = rows.astype(rows.dtype.newbyteorder("<"), order="C", copy=False)
        records["row"] = little.view(np.uint8)
    return records


def decode(
    payload: bytes | None,
    *,
    is_delete: bool,
    value_sizes: Collection[int],
    key_bytes: KeyBytes = 8,
) -> Records:
    """Return the records of a frame.

    Parameters
    ----------
    payload
        The value of a message; the records are views of it.
    is_delete
        Whether the message has the key ``DELETE``.
    value_sizes
        Bytes that a row of the table may have.
    key_bytes
        Width of the deployment's keys; those of 4 bytes are unsigned.

    Raises
    ------
    FrameError
        If the payload is no such frame. Nothing of it is applied then: where records
        end is not known.
    """
    if payload is None:
        raise FrameError(BadFrame.NULL_PAYLOAD, "the message has no payload")
    if not payload.startswith(MAGIC[: len(payload)]):
        found = payload[: len(MAGIC)]
        raise FrameError(BadFrame.MAGIC, f"begins with {found!r}, not {MAGIC!r}")
    if len(payload) < HEADER_BYTES:
        raise FrameError(BadFrame.TRUNCATED, f"{len(payload)} bytes hold no header")
    row_bytes = int.from_bytes(payload[4:HEADER_BYTES], "little")
    body_bytes = len(payload) - HEADER_BYTES
    if not body_bytes:
        return Records(np.empty(0, np.int64), None if is_delete else _NO_ROWS)
    _check_body(body_bytes, row_bytes, (0,) if is_delete else value_sizes, key_bytes)
    records = np.frombuffer(payload, _record(key_bytes, row_bytes), offset=HEADER_BYTES)
    keys = records["key"].astype(np.int64, copy=False)
    return Records(keys, None if is_delete else records["row"])


_NO_ROWS: RawRows = np.empty((0, 0), np.uint8)


def _check_body(
    body_bytes: int, row_bytes: int, value_sizes: Collection[int], key_bytes: KeyBytes
) -> None:
    """Refuse a body that is not made of whole records of the table."""
    if row_bytes not in value_sizes:
        expected = " or ".join(map(str, sorted(value_sizes)))
        raise FrameError(
            BadFrame.VALUE_SIZE, f"rows of {row_bytes} bytes, not of {expected}"
        )
    if body_bytes % (key_bytes + row_bytes) == 0:
        return
    other = 12 - key_bytes
    if body_bytes % (other + row_bytes) == 0:
        raise FrameError(
            BadFrame.KEY_WIDTH,
            f"{body_bytes} bytes are records with keys of {other} bytes, not of "
            f"{key_bytes} (supportlonglong)",
        )
    raise FrameError(
        BadFrame.TRUNCATED,
        f"{body_bytes} bytes are not whole records of {key_bytes + row_bytes}",
    )


def _record(key_bytes: KeyBytes, row_bytes: int) -> np.dtype[Any]:
    """Return the dtype of one record."""
    key: tuple[Any, ...] = ("key", _KEY_DTYPES[key_bytes])
    return np.dtype([key, ("row", np.uint8, (row_bytes,))] if row_bytes else [key])
