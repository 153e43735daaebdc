"""Frames: against bytes built with ``struct``, field by field, and against noise."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps_numba.runtime.updates.frames import (
    BadFrame,
    FrameError,
    KeyBytes,
    decode,
    encode,
    pack,
)

KEY_CODES = {4: "I", 8: "q"}


def plain_frame(
    keys: list[int], rows: list[list[float]] | None, value_code: str, key_bytes: int
) -> bytes:
    """The oracle: one record after the other."""
    size = struct.calcsize(value_code) * len(rows[0]) if rows else 0
    frame = b"HCTR" + struct.pack("<I", size)
    for i, key in enumerate(keys):
        frame += struct.pack("<" + KEY_CODES[key_bytes], key)
        for value in rows[i] if rows else []:
            frame += struct.pack("<" + value_code, value)
    return frame


def reason_of(
    payload: bytes | None,
    *,
    is_delete: bool = False,
    value_sizes: tuple[int, ...] = (8,),
    key_bytes: KeyBytes = 8,
) -> BadFrame:
    with pytest.raises(FrameError) as caught:
        decode(
            payload, is_delete=is_delete, value_sizes=value_sizes, key_bytes=key_bytes
        )
    assert str(caught.value).startswith(f"{caught.value.reason.value}: ")
    return caught.value.reason


@st.composite
def tables(draw: st.DrawFn) -> tuple[KeyBytes, np.dtype, list[int], list[list[float]]]:
    key_bytes = draw(st.sampled_from([4, 8]))
    dtype = np.dtype(draw(st.sampled_from(["f4", "f2"])))
    low, high = (0, 2**32 - 1) if key_bytes == 4 else (-(2**63), 2**63 - 1)
    keys = draw(st.lists(st.integers(low, high), min_size=1, max_size=6))
    dim = draw(st.integers(1, 5))
    value = st.floats(width=16 if dtype.itemsize == 2 else 32, allow_nan=False)
    row = st.lists(value, min_size=dim, max_size=dim)
    rows = draw(st.lists(row, min_size=len(keys), max_size=len(keys)))
    return key_bytes, dtype, keys, rows


@given(tables())
def test_frames_are_the_bytes_that_the_format_says_and_come_back_equal(table) -> None:
    key_bytes, dtype, keys, values = table
    rows = np.array(values, dtype)
    frame = encode(np.array(keys, np.int64), rows, key_bytes=key_bytes)
    code = "f" if dtype.itemsize == 4 else "e"
    assert frame == plain_frame(keys, values, code, key_bytes)
    size = rows.shape[1] * rows.itemsize
    records = decode(frame, is_delete=False, value_sizes=(size,), key_bytes=key_bytes)
    assert len(records) == len(keys)
    assert records.keys.dtype == np.int64
    assert records.keys.tolist() == keys
    back = records.rows(rows.shape[1], dtype)
    assert back.dtype == dtype
    assert back.tobytes() == rows.tobytes()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9))
def test_deletions_are_frames_of_keys_alone(keys: list[int]) -> None:
    frame = encode(np.array(keys, np.int64), None)
    assert frame == plain_frame(keys, None, "f", 8)
    records = decode(frame, is_delete=True, value_sizes=(8,))
    assert records.keys.tolist() == keys
    assert records.raw_rows is None


def test_rows_of_a_frame_are_views_of_its_payload() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    frame = encode(np.array([1, 2]), rows)
    records = decode(frame, is_delete=False, value_sizes=(12,))
    payload = np.frombuffer(frame, np.uint8)
    assert np.shares_memory(records.keys, payload)
    assert np.shares_memory(records.rows(3, np.dtype(np.float32)), payload)


def test_a_frame_may_be_put_together_from_packed_pieces_of_any_layout() -> None:
    keys = np.array([5, -6, 7, 8])
    rows = np.arange(16, dtype=np.float32).reshape(4, 4)
    pieces = [pack(keys[:3], rows[:3]), pack(keys[3:], rows[3:])]
    assert encode(keys, rows)[8:] == b"".join(piece.tobytes() for piece in pieces)
    columns = np.asfortranarray(rows).astype(">f4")
    assert pack(keys[::-1], columns[::-1]).tobytes() == b"".join(
        struct.pack("<q4f", key, *row)
        for key, row in zip(keys[::-1].tolist(), rows[::-1].tolist(), strict=True)
    )


def test_float32_frames_fill_float16_tables_and_the_reverse() -> None:
    rows = np.float32([[1.5, 70_000.0]])
    frame = encode(np.array([1]), rows)
    records = decode(frame, is_delete=False, value_sizes=(4, 8))
    assert records.rows(2, np.dtype(np.float16)).tolist() == [[1.5, np.inf]]
    halves = encode(np.array([1]), np.float16([[1.5, -2.0]]))
    records = decode(halves, is_delete=False, value_sizes=(4, 8))
    assert records.rows(2, np.dtype(np.float32)).tolist() == [[1.5, -2.0]]


@pytest.mark.parametrize("size", [0, 8, 77])
def test_a_header_alone_is_a_beacon_whatever_its_row_size(size: int) -> None:
    frame = b"HCTR" + struct.pack("<I", size)
    records = decode(frame, is_delete=False, value_sizes=(8,))
    assert len(records) == 0
    assert records.rows(2, np.dtype(np.float32)).shape == (0, 2)
    assert len(decode(frame, is_delete=True, value_sizes=(8,))) == 0


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (None, BadFrame.NULL_PAYLOAD),
        (b"", BadFrame.TRUNCATED),
        (b"HCT", BadFrame.TRUNCATED),
        (b"HCTR\x08\0\0", BadFrame.TRUNCATED),
        (b"HX", BadFrame.MAGIC),
        (b"RTCH\x08\0\0\0" + bytes(16), BadFrame.MAGIC),
        (b"HCTR\x0c\0\0\0" + bytes(20), BadFrame.VALUE_SIZE),
        (b"HCTR\0\0\0\0" + bytes(16), BadFrame.VALUE_SIZE),
        (b"HCTR\xff\xff\xff\xff" + bytes(16), BadFrame.VALUE_SIZE),
        (b"HCTR\x08\0\0\0" + bytes(17), BadFrame.TRUNCATED),
        (b"HCTR\x08\0\0\0" + bytes(8), BadFrame.TRUNCATED),
        (b"HCTR\x08\0\0\0" + bytes(36), BadFrame.KEY_WIDTH),
    ],
)
def test_a_bad_frame_is_refused_for_its_reason(
    payload: bytes | None, reason: BadFrame
) -> None:
    assert reason_of(payload) == reason


def test_frames_with_keys_of_the_other_width_are_told_by_their_length() -> None:
    keys, rows = np.array([1, 2, 3]), np.zeros((3, 2), np.float32)
    narrow, wide = encode(keys, rows, key_bytes=4), encode(keys, rows)
    assert reason_of(narrow) == BadFrame.KEY_WIDTH
    assert reason_of(wide + wide[8:24], key_bytes=4) == BadFrame.KEY_WIDTH
    assert reason_of(encode(keys, None, key_bytes=4), is_delete=True) == (
        BadFrame.KEY_WIDTH
    )


def test_rows_in_a_deletion_and_deletions_without_their_key_are_refused() -> None:
    rows = encode(np.array([1]), np.zeros((1, 2), np.float32))
    assert reason_of(rows, is_delete=True) == BadFrame.VALUE_SIZE
    assert reason_of(encode(np.array([1]), None)) == BadFrame.VALUE_SIZE


@pytest.mark.parametrize("key", [-1, 2**32])
def test_a_key_that_needs_8_bytes_is_not_cut_to_4(key: int) -> None:
    with pytest.raises(ValueError, match="8-byte keys"):
        encode(np.array([7, key]), None, key_bytes=4)


def is_whole(payload: bytes, key_bytes: int, sizes: tuple[int, ...]) -> bool:
    """The oracle: read one record after the other, and see whether it comes out."""
    if len(payload) < 8 or payload[:4] != b"HCTR":
        return False
    (size,) = struct.unpack("<I", payload[4:8])
    left = len(payload) - 8
    if left and size not in sizes:
        return False
    while left > 0:
        left -= key_bytes + size
    return left == 0


@given(
    st.one_of(
        st.binary(max_size=64),
        st.builds(
            lambda size, body: b"HCTR" + struct.pack("<I", size) + body,
            st.sampled_from([0, 4, 8, 2**31, 2**32 - 1]),
            st.binary(max_size=64),
        ),
    ),
    st.booleans(),
    st.sampled_from([4, 8]),
)
def test_noise_is_decoded_exactly_where_it_is_whole_records(
    payload: bytes, is_delete: bool, key_bytes: KeyBytes
) -> None:
    sizes = (0,) if is_delete else (4, 8)
    if is_whole(payload, key_bytes, sizes):
        records = decode(
            payload, is_delete=is_delete, value_sizes=(4, 8), key_bytes=key_bytes
        )
        width = key_bytes + int.from_bytes(payload[4:8], "little")
        assert len(records) == (len(payload) - 8) // width
    else:
        reason_of(payload, is_delete=is_delete, value_sizes=(4, 8), key_bytes=key_bytes)
