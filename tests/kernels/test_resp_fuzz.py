"""Random streams of replies, cut anywhere: rows go where they belong."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from hps_numba.kernels.host import resp_read as reading
from tests.kernels.resp_plain import CANARY, Parser, as_bytes, bulk

# Every byte that means something in a reply.
CONFUSING = as_bytes(b"\r\n$*_->!%~|+:,#(=0123456789")
ERRORS = [
    b"-MOVED 8999 127.0.0.1:17002\r\n",
    b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    b"!21\r\nSYNTAX invalid syntax\r\n",
    b"-\r\n",
]
PUSHES = [
    b">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\n$-1\r\n",
    b">3\r\n+message\r\n$2\r\n\r\n\r\n%1\r\n:1\r\n_\r\n",
    b">0\r\n",
]


class Stream:
    """Replies to random commands, and what a reader shall make of them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.row_bytes = int(rng.choice([1, 2, 4, 8, 13, 16, 64, 128, 520]))
        self.n_keys = rng.integers(1, 30, rng.integers(1, 12)).tolist()
        n = sum(self.n_keys)
        self.targets = rng.permutation(n + 5)[:n]
        self.nil_share, self.wrong_share = rng.choice([0, 0.1, 0.5, 1], 2) * [0.9, 0.4]
        self.rows: dict[int, bytes] = {}
        self.n_nils = self.n_errors = self.n_pushes = 0
        self.wrong: list[tuple[int, int]] = []
        self.text = b""
        first = 0
        for count in self.n_keys:
            self._answer(self.targets[first : first + count].tolist())
            first += count
        self.text += self._push()

    def _answer(self, targets: list[int]) -> None:
        self.text += self._push()
        if self.rng.random() < 0.15:
            self.n_errors += 1
            self.text += ERRORS[self.rng.integers(len(ERRORS))]
            return
        self.text += b"*%d\r\n" % len(targets)
        for target in targets:
            self.text += self._element(target)

    def _push(self) -> bytes:
        if self.rng.random() > 0.1:
            return b""
        self.n_pushes += 1
        return PUSHES[self.rng.integers(len(PUSHES))]

    def _element(self, target: int) -> bytes:
        if self.rng.random() < self.nil_share:
            self.n_nils += 1
            return b"$-1\r\n" if self.rng.random() < 0.5 else b"_\r\n"
        width = self.row_bytes
        if self.rng.random() < self.wrong_share:
            width = int(self.rng.choice([0, 1, 2, 3, width - 1, width + 1, 10 * width]))
        value = self.rng.choice(CONFUSING, width).tobytes()
        if width == self.row_bytes:
            self.rows[target] = value
        else:
            self.wrong.append((target, width))
        return bulk(value)

    def parser(self) -> Parser:
        room = max(self.row_bytes + 20, max(map(len, ERRORS + PUSHES)))
        room += int(self.rng.choice([0, 1, 300, 5_000]))
        n_keys, targets = self.n_keys, self.targets
        return Parser(self.row_bytes, n_keys, targets=targets, capacity=room)

    def read(self, parser: Parser, longest: int) -> None:
        """Give the stream to a parser in pieces; go around what it leaves."""
        at = n_errors = n_pushes = 0
        status = reading.MORE
        while at < len(self.text) or parser.high:
            n = min(
                parser.buf.size - parser.high, int(self.rng.integers(1, longest + 1))
            )
            status = parser.feed(self.text[at : at + n])
            at += n
            while status in (reading.ERROR, reading.PUSH, reading.DONE) and parser.high:
                end = reading.end_of_reply(parser.buf, 0, parser.high)
                if end == reading.INCOMPLETE:
                    break
                if status == reading.ERROR:
                    n_errors += 1
                    reading.skip_command(parser.state, parser.key_ends)
                else:
                    n_pushes += 1
                parser.drop(end)
                status = parser.parse()
            assert status != reading.BAD
        assert status == reading.DONE
        assert (n_errors, n_pushes) == (self.n_errors, self.n_pushes)

    def check(self, parser: Parser, before: np.ndarray) -> None:
        assert np.flatnonzero(parser.found).tolist() == sorted(self.rows)
        for target, row in self.rows.items():
            before[target] = as_bytes(row)
        np.testing.assert_array_equal(parser.out, before)
        assert parser.state[reading.P_NILS] == self.n_nils
        assert parser.state[reading.P_WRONG] == len(self.wrong)
        first = parser.state[[reading.P_WRONG_TARGET, reading.P_WRONG_WIDTH]]
        assert tuple(first) == (self.wrong[0] if self.wrong else (-1, 0))


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_streams_that_are_cut_anywhere_are_read_right(first_seed):
    for seed in range(first_seed, first_seed + 50):
        stream = Stream(seed)
        parser = stream.parser()
        before = parser.out.copy()
        stream.read(parser, longest=int(stream.rng.choice([3, 50, 500])))
        stream.check(parser, before)


def test_streams_that_arrive_byte_by_byte_are_read_right():
    for seed in range(1_000, 1_025):
        stream = Stream(seed)
        parser = stream.parser()
        before = parser.out.copy()
        stream.read(parser, longest=1)
        stream.check(parser, before)


def test_the_streams_hold_everything_that_may_arrive():
    streams = [Stream(seed) for seed in range(300)]
    for kind in ("rows", "n_nils", "wrong", "n_errors", "n_pushes"):
        assert sum(bool(getattr(stream, kind)) for stream in streams) > 50, kind


def test_damaged_streams_do_no_harm():
    """Rows may be wrong where a payload was hit; nothing else is written."""
    for seed in range(2_000, 2_300):
        stream = Stream(seed)
        rng = stream.rng
        text = as_bytes(stream.text)
        hit = rng.integers(0, text.size, rng.integers(1, 6))
        text[hit] = rng.choice(CONFUSING, hit.size)
        parser = stream.parser()
        at, status = 0, reading.MORE
        while status == reading.MORE and at < text.size:
            n = min(parser.buf.size - parser.high, int(rng.integers(1, 200)))
            if n == 0:
                break
            status = parser.feed(text[at : at + n].tobytes())
            at += n
        there = set(np.flatnonzero(parser.found).tolist())
        assert there <= set(stream.targets.tolist())
        others = sorted(set(range(parser.n_rows)) - there)
        assert (parser.out[others] == CANARY).all()


@pytest.fixture
def last_page():
    """Return a page of memory behind which nothing may be read or written."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    memory = np.frombuffer(pages, np.uint8)
    protect = ctypes.CDLL(None).mprotect
    address = ctypes.c_void_p(memory.ctypes.data + page)
    assert protect(address, ctypes.c_size_t(page), ctypes.c_int(0)) == 0
    yield memory[:page]
    assert protect(address, ctypes.c_size_t(page), ctypes.c_int(3)) == 0
    del memory


@pytest.mark.parametrize("row_bytes", [1, 2, 4, 8, 13, 32, 100, 600])
def test_nothing_behind_the_received_bytes_is_touched(last_page, row_bytes):
    """The bytes end where memory ends, as do the rows."""
    row = np.arange(row_bytes, dtype=np.uint8)
    elements = [bulk(row.tobytes()), b"$-1\r\n", b"_\r\n", bulk(b"12345"), bulk(b"")]
    targets = np.arange(1)
    found = np.zeros(1, bool)
    header = as_bytes(b"$%d\r\n" % row_bytes)
    for element in elements:
        text = as_bytes(b"*1\r\n" + element)
        for size in range(text.size + 1):
            buf = last_page[last_page.size - size :]
            buf[:] = text[:size]
            reading.end_of_reply(buf, 0, size)
            state = reading.new_state()
            key_ends = np.ones(1, np.int64)
            out = np.zeros((1, row_bytes), np.uint8)
            status, _low = reading.parse_rows(
                buf, 0, size, state, key_ends, out, targets, found, header
            )
            assert status == (reading.DONE if size == text.size else reading.MORE)
    text = as_bytes(b"*1\r\n" + elements[0])
    out = last_page[last_page.size - row_bytes :].reshape(1, row_bytes)
    state = reading.new_state()
    reading.parse_rows(text, 0, text.size, state, key_ends, out, targets, found, header)
    assert out[0].tolist() == row.tolist()
