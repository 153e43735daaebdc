"""Where a reply of any kind ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps_numba.kernels.host import resp_read as reading
from hps_numba.kernels.host.resp_read import INCOMPLETE, MALFORMED
from tests.kernels.resp_plain import as_bytes, bulk

LINES = [
    b"+OK\r\n",
    b"+\r\n",
    b"-ERR wrong\r\n",
    b":-12\r\n",
    b",1.5e-3\r\n",
    b"(3492890328409238509324850943850943825024385\r\n",
    b"#t\r\n",
    b"#f\r\n",
    b"_\r\n",
    b"$-1\r\n",
    b"*-1\r\n",
]
ODD = [
    b"x",
    b"\r\n",
    b"\0",
    b"+a\rb",
    b"+a\nb",
    b"#\r\n",
    b"#x\r\n",
    b"#tt\r\n",
    b"_0\r\n",
    b":\r\n",
    b",\r\n",
    b"(\r\n",
    b"$\r\n",
    b"$-2\r\n",
    b"$?\r\n",
    b"*?\r\n",
    b"$03\r\nabc\r\n",
    b"$3\r\nabcd\r\n",
    b"$3\r\nabc\rx",
    b"$4294967297\r\n",
    b"*4294967297\r\n",
    b"!-1\r\n",
    b"=-1\r\n",
    b"%-1\r\n",
    b"~-1\r\n",
    b">-1\r\n",
    b"|-1\r\n",
    b"*2\r\n+a\r\nx",
    b".\r\n",
]


def end_of(text: bytes, low: int = 0, high: int | None = None) -> int:
    buf = as_bytes(text)
    return int(reading.end_of_reply(buf, low, buf.size if high is None else high))


def blob(value: bytes) -> bytes:
    return b"!" + bulk(value)[1:]


def aggregate(kind: bytes, elements: list[bytes]) -> bytes:
    n = len(elements) // (2 if kind in b"%|" else 1)
    return kind + b"%d\r\n" % n + b"".join(elements)


def nested(replies: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    some = st.lists(replies, max_size=4)
    pairs = some.map(lambda elements: elements[: len(elements) // 2 * 2])
    return st.one_of(
        st.builds(aggregate, st.sampled_from([b"*", b"~", b">"]), some),
        st.builds(aggregate, st.just(b"%"), pairs),
        st.builds(lambda p, r: aggregate(b"|", p) + r, pairs, replies),
    )


VALUES = st.one_of(
    st.sampled_from(LINES),
    st.binary(max_size=30).map(bulk),
    st.binary(max_size=30).map(blob),
    st.binary(max_size=9).map(lambda text: b"=" + bulk(b"txt:" + text)[1:]),
)
REPLIES = st.recursive(VALUES, nested, max_leaves=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(reply=REPLIES, ahead=st.binary(max_size=9), behind=st.binary(max_size=9))
def test_a_reply_ends_where_its_last_element_ends(reply, ahead, behind):
    low, high = len(ahead), len(ahead) + len(reply)
    assert end_of(ahead + reply + behind, low) == high
    for cut in range(low, high):
        assert end_of(ahead + reply + behind, low, cut) == INCOMPLETE


class IncompleteError(Exception):
    pass


class MalformedError(Exception):
    pass


class Recursive:
    """A parser by the grammar: one rule for each kind, byte by byte."""

    def __init__(self, text: bytes) -> None:
        self.text, self.at = text, 0

    def end(self) -> int:
        try:
            self.reply()
        except IncompleteError:
            return INCOMPLETE
        except MalformedError:
            return MALFORMED
        return self.at

    def byte(self) -> bytes:
        if self.at == len(self.text):
            raise IncompleteError
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def expect(self, text: bytes) -> None:
        for i in range(len(text)):
            if self.byte() != text[i : i + 1]:
                raise MalformedError

    def line(self) -> bytes:
        line = b""
        while (byte := self.byte()) != b"\r":
            line += byte
            if byte == b"\n":
                raise MalformedError
        return line

    def length(self) -> int:
        digits = self.byte()
        if digits == b"-":
            self.expect(b"1\r\n")
            return -1
        if not digits.isdigit():
            raise MalformedError
        while (byte := self.byte()).isdigit():
            digits += byte
            if digits[:1] == b"0" or int(digits) > reading.MAX_BULK_BYTES:
                raise MalformedError
        if byte != b"\r":
            raise MalformedError
        self.expect(b"\n")
        return int(digits)

    def reply(self) -> None:
        kind = self.byte()
        if kind in b"+-:,#(_":
            line = self.line()
            allowed = {b"#": [b"t", b"f"], b"_": [b""]}.get(kind, [line])
            if line not in allowed or (kind in b":,(" and not line):
                raise MalformedError
            self.expect(b"\n")
            return
        if kind not in b"$=!*%~>|":
            raise MalformedError
        length = self.length()
        if length < 0:
            if kind not in b"$*":
                raise MalformedError
        elif kind in b"$=!":
            for _ in range(length):
                self.byte()
            self.expect(b"\r\n")
        else:
            n = length * (2 if kind in b"%|" else 1) + (kind == b"|")
            for _ in range(n):
                self.reply()


PIECES = [*LINES, *ODD, b"*2\r\n", b"%1\r\n", b"|1\r\n", b"$3\r\n", b"$1", b"12"]


@settings(max_examples=1_000, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
def test_any_pieces_end_where_a_recursive_parser_ends(text):
    assert end_of(text) == Recursive(text).end()


@settings(max_examples=1_000, deadline=None, derandomize=True)
@given(REPLIES, st.integers(0), st.sampled_from(b"\r\n$*%|_-019x"))
def test_damaged_replies_end_where_a_recursive_parser_ends(reply, place, byte):
    text = bytearray(reply)
    text[place % len(text)] = byte
    assert end_of(bytes(text)) == Recursive(bytes(text)).end()


@pytest.mark.parametrize("text", ODD)
def test_what_is_no_reply_is_malformed(text):
    assert end_of(text) == end_of(b"*1\r\n" + text) == MALFORMED
    for cut in range(len(text)):
        assert end_of(text[:cut]) in (INCOMPLETE, MALFORMED)


def test_replies_nest_to_any_depth():
    depth = 200_000
    for head in (b"*1\r\n", b"|0\r\n", b"%1\r\n_\r\n"):
        text = head * depth + b":1\r\n"
        assert end_of(text) == len(text)
        assert end_of(text[:-1]) == INCOMPLETE


def test_counts_of_any_size_ask_for_more():
    most = b"%d\r\n" % reading.MAX_BULK_BYTES
    for head in (b"*" + most, b"%" + most, b"|" + most, b"$" + most):
        assert end_of(head) == INCOMPLETE
        assert end_of(b"*1\r\n" * 9 + head) == INCOMPLETE
    assert end_of((b"%" + most) * 50_000) == INCOMPLETE


def test_a_line_has_an_end_somewhere():
    most = reading.MAX_LINE_BYTES
    longest = b"+" + b"a" * (most - 2)
    assert end_of(longest) == INCOMPLETE
    assert end_of(longest + b"\r") == INCOMPLETE
    assert end_of(longest + b"\r\n") == most + 1
    assert end_of(longest + b"a") == MALFORMED
    assert end_of(longest + b"a\r\n") == MALFORMED


def test_random_bytes_never_end_outside():
    rng = np.random.default_rng(7)
    alphabet = as_bytes(b"\r\n$*_->!%~|+:,#(=0123456789\r\n\r\n\r\n")
    for _ in range(20_000):
        buf = rng.choice(alphabet, 24)
        low, high = np.sort(rng.integers(0, 25, 2))
        end = reading.end_of_reply(buf, low, high)
        assert end == Recursive(buf[low:high].tobytes()).end() + (low if end > 0 else 0)
