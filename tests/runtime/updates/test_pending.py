"""Messages cut into pieces: nothing lost, nothing twice, the newest of each key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps_numba.runtime.updates.frames import Records, decode, encode
from hps_numba.runtime.updates.pending import Arrived, Pending, Piece
from hps_numba.types import Position, TableSpec

SPEC = TableSpec("m", "t", 2)
State = dict[int, float]

kinds = st.sampled_from(["insert", "delete", "skipped"])
streams = st.lists(
    st.tuples(kinds, st.lists(st.integers(0, 5), max_size=6), st.integers(1, 3)),
    max_size=10,
)


def message(offset: int, kind: str, keys: list[int]) -> Arrived:
    """Rows name the record, so that a state tells which record came last."""
    if kind == "skipped":
        return Arrived(offset, None, None)
    array = np.array(keys, np.int64)
    rows = None
    if kind == "insert":
        values = offset * 100.0 + np.arange(array.size)
        rows = np.repeat(values[:, None], SPEC.dim, axis=1).astype(np.float32)
    frame = encode(array, rows)
    is_delete = kind == "delete"
    records = decode(frame, is_delete=is_delete, value_sizes=(SPEC.row_bytes,))
    return Arrived(offset, None, records)


def replay(state: State, messages: list[Arrived], begin: Position) -> State:
    """Apply the records one by one."""
    state = dict(state)
    for arrived in messages:
        records = arrived.records
        if records is None or arrived.offset < begin.offset:
            continue
        first = begin.record if arrived.offset == begin.offset else 0
        for i in range(first, len(records)):
            key = int(records.keys[i])
            if records.raw_rows is None:
                state.pop(key, None)
            else:
                state[key] = float(records.rows(2, np.dtype("f4"))[i, 0])
    return state


def apply(state: State, piece: Piece) -> None:
    assert np.unique(piece.keys).size == piece.keys.size
    if piece.rows is None:
        for key in piece.keys.tolist():
            state.pop(key, None)
        return
    assert piece.rows.dtype == np.float32
    assert piece.rows.flags.c_contiguous
    assert piece.rows.flags.writeable
    assert piece.keys.flags.writeable
    for key, row in zip(piece.keys.tolist(), piece.rows, strict=True):
        assert row[0] == row[1]
        state[key] = float(row[0])


@given(streams, st.integers(1, 4), st.integers(0, 8), st.data())
def test_pieces_are_the_stream_however_it_is_cut_and_broken_off(
    stream: list[tuple[str, list[int], int]],
    piece_rows: int,
    burst_rows: int,
    data: st.DataObject,
) -> None:
    offset, messages = 10, []
    for kind, keys, step in stream:
        messages.append(message(offset, kind, keys))
        offset += step  # offsets of a stream may have holes
    begin = Position(10)
    if messages and messages[0].records is not None:
        n = len(messages[0].records)
        begin = Position(10, data.draw(st.integers(0, max(n - 1, 0))))

    pending = Pending(SPEC, 3, begin)
    state: State = {1: -1.0, 4: -4.0}
    expected, at = replay(state, messages, begin), begin
    finished: list[int] = []
    for arrived in messages:
        pending.add(arrived)
        break_off = data.draw(st.integers(1, 5))
        for n, piece in enumerate(pending.pieces(piece_rows, burst_rows)):
            if n == break_off:  # this piece was not applied
                break
            assert piece.span.partition == 3
            assert piece.span.since == at
            at = piece.span.until
            assert at > piece.span.since
            assert piece.n_records >= piece.keys.size
            limit = max(piece_rows, burst_rows and 10**9)
            assert piece.n_records <= limit
            apply(state, piece)
            finished += [m.offset for m in piece.finished]
            # What is applied so far is what the stream says up to there.
            so_far = [m for m in messages if m.offset < at.offset]
            partly = [m for m in messages if m.offset == at.offset and at.record]
            heads = [head(m, at.record) for m in partly]
            base = replay({1: -1.0, 4: -4.0}, so_far + heads, begin)
            assert state == base
    for piece in pending.pieces(piece_rows, burst_rows):
        assert piece.span.since == at
        at = piece.span.until
        apply(state, piece)
        finished += [m.offset for m in piece.finished]
    assert state == expected
    assert not pending
    assert pending.n_records == pending.n_bytes == 0
    assert finished == [m.offset for m in messages]
    assert pending.position == (
        Position(messages[-1].offset + 1) if messages else begin
    )


def head(arrived: Arrived, n: int) -> Arrived:
    records = arrived.records
    assert records is not None
    rows = None if records.raw_rows is None else records.raw_rows[:n]
    return Arrived(arrived.offset, None, Records(records.keys[:n], rows))


@pytest.mark.parametrize(("burst_rows", "pieces"), [(0, 3), (5, 1), (6, 3)])
def test_many_records_are_one_piece(burst_rows: int, pieces: int) -> None:
    pending = Pending(SPEC, 0, Position(0))
    pending.add(message(0, "insert", [1, 2, 3]))
    pending.add(message(1, "insert", [1, 2]))
    assert len(list(pending.pieces(2, burst_rows))) == pieces


def test_what_waits_is_counted() -> None:
    pending = Pending(SPEC, 0, Position(0))
    pending.add(message(0, "insert", [1, 2, 3]))
    pending.add(message(1, "delete", [1, 2]))
    pending.add(message(2, "skipped", []))
    assert pending.n_records == 5
    assert pending.n_bytes == 3 * (8 + 8) + 2 * 8
    pending.restart(Position(7))
    assert (pending.n_records, pending.n_bytes, bool(pending)) == (0, 0, False)
    pending.add(message(6, "insert", [1]))  # before the position
    assert not pending
