"""Redis commands and replies in plain Python, and a parser driven by hand."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host import resp_read as reading

GUARD = 64
CANARY = 0xA5


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).copy()


def command(*arguments: bytes) -> bytes:
    parts = [b"$%d\r\n%s\r\n" % (len(argument), argument) for argument in arguments]
    return b"*%d\r\n" % len(arguments) + b"".join(parts)


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def guarded(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an array with a guard on either side, and the part between them."""
    whole = np.full(size + 2 * GUARD, CANARY, np.uint8)
    return whole, whole[GUARD : GUARD + size]


def guards_hold(whole: np.ndarray) -> bool:
    return bool((whole[:GUARD] == CANARY).all() and (whole[-GUARD:] == CANARY).all())


class Parser:
    """The replies to some commands, parsed out of a buffer of a given size.

    What lies in the buffer beyond the received bytes looks like replies, so that a
    parser that reads it goes wrong.
    """

    def __init__(
        self,
        row_bytes: int,
        n_keys: list[int],
        *,
        targets: np.ndarray | None = None,
        capacity: int = 1 << 12,
    ) -> None:
        n = sum(n_keys)
        self.key_ends = np.cumsum(n_keys, dtype=np.int64)
        self.targets = np.arange(n) if targets is None else targets
        self.header = as_bytes(b"$%d\r\n" % row_bytes)
        self.n_rows = int(self.targets.max(initial=-1)) + 1
        self._out, flat = guarded(self.n_rows * row_bytes)
        self.out = flat.reshape(self.n_rows, row_bytes)
        self._found, found = guarded(self.n_rows)
        found[:] = 0
        self.found = found.view(bool)
        self._buf, self.buf = guarded(capacity)
        lure = b"\r\n$-1\r\n_\r\n0" + bytes(self.header)
        self._lure = np.resize(as_bytes(lure), capacity)
        self.state = reading.new_state()
        self.high = 0
        self.n_consumed = 0

    def parse(self) -> int:
        """Parse what is in the buffer and keep what is not consumed."""
        rest = self.buf[self.high :]
        rest[:] = self._lure[: rest.size]
        status, low = reading.parse_rows(
            self.buf,
            0,
            self.high,
            self.state,
            self.key_ends,
            self.out,
            self.targets,
            self.found,
            self.header,
        )
        assert 0 <= low <= self.high
        self.drop(low)
        assert all(map(guards_hold, (self._out, self._found, self._buf)))
        return int(status)

    def drop(self, n: int) -> None:
        self.n_consumed += n
        self.high = reading.move_tail(self.buf, n, self.high)

    def feed(self, piece: bytes) -> int:
        assert self.high + len(piece) <= self.buf.size
        self.buf[self.high : self.high + len(piece)] = as_bytes(piece)
        self.high += len(piece)
        return self.parse()

    @property
    def left(self) -> bytes:
        return bytes(self.buf[: self.high])
