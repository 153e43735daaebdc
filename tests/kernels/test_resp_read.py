from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.host import resp_read as reading
from tests.kernels.resp_plain import Parser, bulk

NILS = [b"$-1\r\n", b"_\r\n"]
WIDTHS = [1, 2, 3, 4, 8, 12, 16, 31, 64, 100, 512, 516, 4_000, 99_999, 100_000]
BIG = 1_000_000

# In the place of the reply to a command with two keys.
NOT_THE_REPLY = [
    b"*-1\r\n",
    b"*0\r\n",
    b"*1\r\n",
    b"*3\r\n",
    b"*02\r\n",
    b"*+2\r\n",
    b"*\r\n",
    b"* 2\r\n",
    b"*2 \r\n",
    b"*2\n",
    b"*2\r\r",
    b"*2x",
    b"*-2\r\n",
    b"*99999999999",
    b"*18446744073709551618\r\n",
    b":2\r\n",
    b"+OK\r\n",
    b"$16\r\n",
    b"_\r\n",
    b"%1\r\n",
    b"~2\r\n",
    b"|1\r\n",
    b"\r\n",
    b"\0",
]

# In the place of a row of 16 bytes.
NOT_A_VALUE = [
    b"$-2\r\n",
    b"$-1x",
    b"$-1\rx",
    b"$-11\r\n",
    b"$--1\r\n",
    b"$+16\r\n",
    b"$016\r\n",
    b"$00\r\n",
    b"$\r\n",
    b"$16 \r\n",
    b"$16\n",
    b"$16\rx",
    b"$4294967297\r\n",
    b"$9999999999\r\n",
    b"$18446744073709551632\r\n",  # 16 beyond what a word holds
    b"$99999999999",
    b"$a\r\n",
    b"$" + b"9" * 3_000,
    b"$" + b"0" * 3_000,
    b"_x",
    b"_\rx",
    b"_1\r\n",
    b":16\r\n",
    b"+OK\r\n",
    b"-ERR\r\n",
    b"!3\r\nERR\r\n",
    b"*1\r\n",
    b">1\r\n",
    b"=16\r\n",
    b"#t\r\n",
    b"\r\n",
    b"$16\r\n0123456789abcdefxx",
    b"$16\r\n0123456789abcdef\rx",
    b"$16\r\n0123456789abcdef0\r\n",
    b"$3\r\nabcxx",
    b"$3\r\nabc\rx",
    b"$3\r\nab\r\n\r",
]


def rows_of(n: int, row_bytes: int) -> np.ndarray:
    rng = np.random.default_rng(n + row_bytes)
    return rng.integers(0, 256, (n, row_bytes), dtype=np.uint8)


def reply(*elements: bytes) -> bytes:
    return b"*%d\r\n" % len(elements) + b"".join(elements)


@pytest.mark.parametrize("row_bytes", WIDTHS)
def test_rows_go_to_the_targets_of_their_keys(row_bytes):
    rows = rows_of(5, row_bytes)
    targets = np.array([3, 7, 0, 5, 1])
    text = reply(*[bulk(row.tobytes()) for row in rows])
    parser = Parser(row_bytes, [5], targets=targets, capacity=len(text))
    assert parser.feed(text) == reading.DONE
    np.testing.assert_array_equal(parser.out[targets], rows)
    assert np.flatnonzero(parser.found).tolist() == sorted(targets)
    others = np.setdiff1d(np.arange(8), targets)
    assert (parser.out[others] == parser.out[2, 0]).all()
    assert (parser.left, parser.state[reading.P_KEY]) == (b"", 5)


@pytest.mark.parametrize("row_bytes", [1, 4, 16, 300])
@pytest.mark.parametrize("nil", NILS)
def test_a_key_without_a_value_leaves_its_row_and_its_flag(row_bytes, nil):
    rows = rows_of(4, row_bytes)
    values = [bulk(row.tobytes()) for row in rows]
    parser = Parser(row_bytes, [4, 2])
    before = parser.out.copy()
    parser.found[1] = True  # by another tier, before
    text = reply(values[0], nil, nil, values[3]) + reply(nil, nil)
    assert parser.feed(text) == reading.DONE
    np.testing.assert_array_equal(parser.out[[0, 3]], rows[[0, 3]])
    np.testing.assert_array_equal(parser.out[[1, 2, 4, 5]], before[[1, 2, 4, 5]])
    assert parser.found.tolist() == [True, True, False, True, False, False]
    assert parser.state[reading.P_NILS] == 4


@pytest.mark.parametrize("row_bytes", [1, 3, 16, 513])
@pytest.mark.parametrize("wrong", [0, 1, 2, 15, 17, 160, 5_000])
def test_a_value_of_another_width_is_counted_and_dropped(row_bytes, wrong):
    if wrong == row_bytes:
        wrong += 1
    row = rows_of(1, row_bytes)[0]
    targets = np.array([4, 2, 0, 1])
    parser = Parser(row_bytes, [3, 1], targets=targets, capacity=600)
    others = [bulk(b"$-1\r\n"[:wrong].ljust(wrong, b"_")), bulk(b"*" * (wrong + 2))]
    if wrong + 2 == row_bytes:
        others[1] = bulk(b"")
    text = reply(bulk(row.tobytes()), *others) + reply(bulk(row.tobytes()))
    for at in range(0, len(text), 50):
        status = parser.feed(text[at : at + 50])
    assert (status, parser.left) == (reading.DONE, b"")
    assert np.flatnonzero(parser.found).tolist() == [1, 4]
    np.testing.assert_array_equal(parser.out[[1, 4]], [row, row])
    assert parser.state[reading.P_WRONG] == 2
    assert parser.state[reading.P_WRONG_TARGET] == 2
    assert parser.state[reading.P_WRONG_WIDTH] == wrong
    assert parser.state[reading.P_NILS] == 0


def test_widths_that_share_their_first_digits_differ():
    """Also where the digits are more than a word holds."""
    for row_bytes in (10, 1_000, BIG):
        row = rows_of(1, row_bytes)[0].tobytes()
        parser = Parser(row_bytes, [2], capacity=row_bytes + 20)
        head = b"$%d\r\n" % (row_bytes * 10 + 1)
        assert parser.feed(b"*2\r\n" + head + b"x" * (row_bytes - 6)) == reading.MORE
        dropped = row_bytes - 6
        while dropped < row_bytes * 10 + 1:
            n = min(row_bytes, row_bytes * 10 + 1 - dropped)
            assert parser.feed(b"x" * n) == reading.MORE
            assert parser.left == b""
            dropped += n
        assert parser.feed(b"\r\n") == reading.MORE
        assert parser.feed(bulk(row)) == reading.DONE
        assert parser.out[1].tobytes() == row
        assert parser.state[reading.P_WRONG_WIDTH] == row_bytes * 10 + 1


def test_the_longest_value_that_a_server_may_send_is_dropped():
    parser = Parser(16, [2])
    text = b"*2\r\n$%d\r\n" % reading.MAX_BULK_BYTES
    assert parser.feed(text + b"x" * 100) == reading.MORE
    assert parser.left == b""
    assert parser.state[reading.P_SKIP] == reading.MAX_BULK_BYTES + 2 - 100
    assert parser.feed(b"\r\n" * 50) == reading.MORE
    assert parser.state[reading.P_SKIP] == reading.MAX_BULK_BYTES + 2 - 200


@pytest.mark.parametrize("row_bytes", [1, 16, 600])
def test_a_buffer_of_one_element_is_large_enough(row_bytes):
    rows = rows_of(6, row_bytes)
    values = [bulk(row.tobytes()) for row in rows]
    text = reply(values[0], b"_\r\n", values[2]) + reply(*values[3:])
    parser = Parser(row_bytes, [3, 3], capacity=len(values[0]))
    at = 0
    while at < len(text):
        n = parser.buf.size - parser.high
        assert n > 0
        status = parser.feed(text[at : at + n])
        at += n
        assert status == (reading.DONE if at >= len(text) else reading.MORE)
    there = [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(parser.out[there], rows[there])


@pytest.mark.parametrize("hostile", NOT_THE_REPLY)
def test_another_reply_is_bad_wherever_it_is_cut(hostile):
    for first in ([], [2]):
        ahead = reply(b"_\r\n", b"_\r\n") if first else b""
        for cut in range(len(hostile)):
            parser = Parser(16, [*first, 2])
            assert parser.feed(ahead + hostile[:cut]) in (reading.MORE, reading.BAD)
            assert parser.feed(hostile[cut:]) == reading.BAD
            assert parser.n_consumed == len(ahead)
            assert not parser.found.any()


@pytest.mark.parametrize("hostile", NOT_A_VALUE)
@pytest.mark.parametrize("behind", [b"", b"\r\n_\r\n" * 9, bulk(b"x" * 16) * 2])
def test_another_value_is_bad_wherever_it_is_cut(hostile, behind):
    row = bulk(b"0123456789abcdef")
    cuts = range(len(hostile)) if len(hostile) < 100 else (0, 1, 11, 12, 2_000)
    for cut in cuts:
        parser = Parser(16, [3])
        first = parser.feed(b"*3\r\n" + row + hostile[:cut])
        assert first in (reading.MORE, reading.BAD)
        assert parser.feed(hostile[cut:] + behind) == reading.BAD
        assert parser.found.tolist() == [True, False, False]
        assert bytes(parser.out[0]) == b"0123456789abcdef"


@pytest.mark.parametrize("row_bytes", [16, 99_999, 100_000, BIG])
def test_a_header_line_that_ends_wrong_is_bad_before_a_row_too(row_bytes):
    for end in (b"\rx", b"x\n", b"\r\r"):
        text = b"*2\r\n$%d%s" % (row_bytes, end) + bytes(row_bytes) + b"\r\n"
        parser = Parser(row_bytes, [2], capacity=2 * row_bytes + 100)
        assert parser.feed(text + b"$%d\r\n" % row_bytes) == reading.BAD
        assert not parser.found.any()


def test_a_number_that_never_ends_is_bad_at_once():
    for text in (b"*", b"*2\r\n$"):
        parser = Parser(16, [2])
        assert parser.feed(text + b"1" * 10) == reading.MORE
        assert parser.feed(b"1") == reading.BAD


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"-MOVED 8999 127.0.0.1:17002\r\n", reading.ERROR),
        (b"!9\r\nERR wrong\r\n", reading.ERROR),
        (b">2\r\n$10\r\ninvalidate\r\n_\r\n", reading.PUSH),
    ],
)
def test_an_error_and_a_push_are_left_for_the_caller(text, status):
    rows = rows_of(5, 16)
    values = [bulk(row.tobytes()) for row in rows]
    parser = Parser(16, [2, 1, 2])
    assert parser.feed(reply(*values[:2]) + text) == status
    assert parser.left == text
    assert parser.parse() == status
    assert parser.left == text
    for cut in range(len(text)):
        assert reading.end_of_reply(parser.buf, 0, cut) == reading.INCOMPLETE
    parser.drop(reading.end_of_reply(parser.buf, 0, parser.high))
    there = [0, 1, 3, 4]
    if status == reading.ERROR:
        reading.skip_command(parser.state, parser.key_ends)
    else:
        assert parser.feed(reply(values[2])) == reading.MORE
        there.append(2)
    assert parser.feed(reply(*values[3:])) == reading.DONE
    np.testing.assert_array_equal(parser.out[there], rows[there])
    assert parser.found.sum() == len(there)


def test_every_command_may_fail():
    parser = Parser(16, [2, 1, 4])
    for _ in range(3):
        assert parser.feed(b"-LOADING\r\n") == reading.ERROR
        parser.drop(len(b"-LOADING\r\n"))
        reading.skip_command(parser.state, parser.key_ends)
    assert parser.parse() == reading.DONE
    assert not parser.found.any()


def test_what_follows_the_last_reply_is_left():
    parser = Parser(16, [1])
    assert parser.feed(reply(b"_\r\n") + reply(b"_\r\n")) == reading.DONE
    assert parser.left == reply(b"_\r\n")
    assert parser.parse() == reading.DONE
    assert parser.left == reply(b"_\r\n")


def test_no_commands_have_no_replies():
    parser = Parser(16, [])
    assert parser.parse() == reading.DONE
    assert parser.feed(b"*1\r\n") == reading.DONE
    assert parser.left == b"*1\r\n"


@pytest.mark.parametrize(("low", "high"), [(0, 0), (7, 7), (0, 50), (1, 50), (30, 50)])
def test_the_tail_is_moved_to_the_front(low, high):
    buf = np.arange(60, dtype=np.uint8)
    assert reading.move_tail(buf, low, high) == high - low
    assert buf[: high - low].tolist() == list(range(low, high))
    first = max(high - low, 0)
    assert buf[first:].tolist() == list(range(first, 60))
