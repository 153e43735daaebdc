"""Reading replies of Redis, RESP2 and RESP3, rows straight into their places.

``parse_rows`` knows one reply, the array of values that MGET and HMGET give, and stops
in front of everything else. It consumes whole elements only; what is left of a cut one
is moved to the front of the buffer, more bytes are received behind it, and parsing goes
on. A server may send anything: no length in a reply is followed before it was checked,
and nothing outside the bytes that were received is read.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.memory import copy_row, load_pair, load_word, move_bytes

# Why ``parse_rows`` stopped.
MORE = 0  # in the middle of a reply: more bytes are needed
DONE = 1  # every command is answered
ERROR = 2  # the next reply is an error; it is not consumed
PUSH = 3  # the next reply is a push message; it is not consumed
BAD = 4  # not a reply to these commands; the connection is of no more use

# What ``end_of_reply`` returns in place of an index.
INCOMPLETE = -1
MALFORMED = -2

# The state of a parser, int64.
P_ELEMENT = 0  # elements of the current reply that are done
P_ELEMENTS = 1  # elements of the current reply; -1 between replies
P_KEY = 2  # keys that are answered, over all replies
P_REPLY = 3  # replies that are done
P_NILS = 4  # keys without a value
P_SKIP = 5  # bytes still to be dropped of a value of another width, and its end
P_WRONG = 6  # values of another width
P_WRONG_TARGET = 7  # target of the first of them, -1 if there is none
P_WRONG_WIDTH = 8  # its bytes
P_FIELDS = 9

MAX_BULK_BYTES = 1 << 32
MAX_LINE_BYTES = 1 << 16

_GO_ON = -1  # an element is done, the next one may follow
_NULL = -1
_CR = 13
_LF = 10
_CRLF = np.uint16(_CR | _LF << 8)
_MAX_DIGITS = 10  # of MAX_BULK_BYTES
_BYTE_BITS = np.uint64(8)
_WORD = 8

_NIL3 = np.uint64(int.from_bytes(b"_\r\n", "little"))
_NIL3_MASK = np.uint64((1 << 24) - 1)
_NIL2 = np.uint64(int.from_bytes(b"$-1\r\n", "little"))
_NIL2_MASK = np.uint64((1 << 40) - 1)

_AGGREGATES = tuple(b"*%~>|")
_BULKS = tuple(b"$=!")
_LINES = tuple(b"+-:,#(_")


def new_state() -> np.ndarray:
    """Return the state of a parser that has seen nothing."""
    state = np.zeros(P_FIELDS, np.int64)
    state[P_ELEMENTS] = -1
    state[P_WRONG_TARGET] = -1
    return state


@njit(nogil=True, cache=True)
def skip_command(state, key_ends):
    """Go on behind the current command, whose reply the caller has removed."""
    state[P_KEY] = key_ends[state[P_REPLY]]
    state[P_REPLY] += 1
    state[P_ELEMENT] = 0
    state[P_ELEMENTS] = -1


@njit(nogil=True, cache=True)
def move_tail(buf, low, high):
    """Move ``buf[low:high]`` to the front; return how many bytes it is."""
    base = np.int64(buf.ctypes.data)
    if low > 0 and high > low:
        move_bytes(base, base + low, high - low)
    return high - low


@njit(nogil=True, cache=True)
def _read_length(buf, low, high):
    """Return the number of a header line at ``low`` and where the line ends.

    The number is _NULL for ``-1``. In place of the end stands INCOMPLETE or MALFORMED;
    more digits than any length has, leading zeros and signs are malformed.
    """
    at = low + 1
    if at < high and buf[at] == ord("-"):
        if (at + 1 < high and buf[at + 1] != ord("1")) or (
            at + 2 < high and buf[at + 2] != _CR
        ):
            return np.int64(0), np.int64(MALFORMED)
        return np.int64(_NULL), _end_of_line(buf, at + 2, high)
    length = np.int64(0)
    while at < high and ord("0") <= buf[at] <= ord("9"):
        if at - low > _MAX_DIGITS or (at > low + 1 and length == 0):
            return np.int64(0), np.int64(MALFORMED)
        length = length * 10 + np.int64(buf[at]) - ord("0")
        at += 1
    if at == low + 1 and at < high:
        return np.int64(0), np.int64(MALFORMED)
    if length > MAX_BULK_BYTES:
        return np.int64(0), np.int64(MALFORMED)
    return length, _end_of_line(buf, at, high)


@njit(nogil=True, cache=True)
def _end_of_line(buf, at, high):
    """Return what follows the line end at ``at``, INCOMPLETE or MALFORMED."""
    if at < high and buf[at] != _CR:
        return np.int64(MALFORMED)
    if at + 1 < high and buf[at + 1] != _LF:
        return np.int64(MALFORMED)
    return np.int64(at + 2 if at + 2 <= high else INCOMPLETE)


@njit(nogil=True, cache=True)
def _begin_reply(buf, low, high, state, key_ends):
    """Consume the header of a command's reply; return why not, and what follows."""
    if low >= high:
        return MORE, low
    kind = buf[low]
    if kind == ord("-") or kind == ord("!"):
        return ERROR, low
    if kind == ord(">"):
        return PUSH, low
    if kind != ord("*"):
        return BAD, low
    length, end = _read_length(buf, low, high)
    if end < 0:
        return MORE if end == INCOMPLETE else BAD, low
    if length != key_ends[state[P_REPLY]] - state[P_KEY]:
        return BAD, low
    state[P_ELEMENT] = 0
    state[P_ELEMENTS] = length
    return _GO_ON, end


@njit(nogil=True, cache=True)
def _copy_rows(buf, low, high, state, out, targets, found, header):
    """Consume rows and nils as long as they lie whole and plain in the buffer."""
    base = np.int64(buf.ctypes.data)
    target = np.int64(out.ctypes.data)
    row_bytes = out.shape[1]
    head_bytes = header.size
    stride = head_bytes + row_bytes + 2
    # A whole word is read where an element begins.
    room = max(stride, _WORD)
    word = np.uint64(0)
    mask = np.uint64(0)
    for i in range(min(head_bytes, _WORD)):
        shift = np.uint64(i) * _BYTE_BITS
        word |= np.uint64(header[i]) << shift
        mask |= np.uint64(255) << shift
    key = state[P_KEY]
    left = state[P_ELEMENTS] - state[P_ELEMENT]
    n_nils = np.int64(0)
    status = _GO_ON
    while left > 0 and low + room <= high:
        first = load_word(base + low)
        if (first & mask) == word:
            if head_bytes > _WORD and not _same(buf, low, header):
                break
            if load_pair(base + low + stride - 2) != _CRLF:
                status = BAD
                break
            position = targets[key]
            copy_row(target + position * row_bytes, base + low + head_bytes, row_bytes)
            found[position] = True
            low += stride
        elif (first & _NIL3_MASK) == _NIL3:
            n_nils += 1
            low += 3
        elif (first & _NIL2_MASK) == _NIL2:
            n_nils += 1
            low += 5
        else:
            break
        key += 1
        left -= 1
    state[P_KEY] = key
    state[P_ELEMENT] = state[P_ELEMENTS] - left
    state[P_NILS] += n_nils
    return status, low


@njit(nogil=True, cache=True)
def _same(buf, low, header):
    """Tell whether the rest of the header, behind its first word, stands there too."""
    same = True
    for i in range(_WORD, header.size):
        same &= buf[low + i] == header[i]
    return same


@njit(nogil=True, cache=True)
def _take_element(buf, low, high, state, out, targets, found):
    """Consume one element of whatever form; return why not, and what follows."""
    if low >= high:
        return MORE, low
    null = buf[low] == ord("_")
    if null:
        end = _end_of_line(buf, low + 1, high)
        length = np.int64(_NULL)
    elif buf[low] == ord("$"):
        length, end = _read_length(buf, low, high)
    else:
        return BAD, low
    if end < 0:
        return MORE if end == INCOMPLETE else BAD, low
    if length == _NULL:
        state[P_NILS] += 1
    elif length != out.shape[1]:
        if state[P_WRONG] == 0:
            state[P_WRONG_TARGET] = targets[state[P_KEY]]
            state[P_WRONG_WIDTH] = length
        state[P_WRONG] += 1
        state[P_SKIP] = length + 2
    else:
        after = _end_of_line(buf, end + length, high)
        if after < 0:
            return MORE if after == INCOMPLETE else BAD, low
        position = targets[state[P_KEY]]
        copy_row(
            np.int64(out.ctypes.data) + position * length,
            np.int64(buf.ctypes.data) + end,
            length,
        )
        found[position] = True
        end = after
    state[P_KEY] += 1
    state[P_ELEMENT] += 1
    return _GO_ON, end


@njit(nogil=True, cache=True)
def _drop(buf, low, high, state):
    """Drop what has arrived of a value of another width, up to its line end."""
    n = min(high - low, state[P_SKIP] - 2)
    low += n
    state[P_SKIP] -= n
    if state[P_SKIP] > 2:
        return MORE, low
    end = _end_of_line(buf, low, high)
    if end < 0:
        return MORE if end == INCOMPLETE else BAD, low
    state[P_SKIP] = 0
    return _GO_ON, end


@njit(nogil=True, cache=True)
def parse_rows(buf, low, high, state, key_ends, out, targets, found, header):
    r"""Consume the replies to consecutive commands, as far as they have arrived.

    Reads    buf uint8: the bytes low to high are received and not consumed;
             key_ends int64: keys up to the end of each command; targets int64: the
             position of each key; header uint8: ``$<row_bytes>\r\n``
    Writes   out uint8 (m, row_bytes) and found bool (m,) at the positions of keys that
             have a row of this width; state int64 (P_FIELDS,)
    Returns  MORE, DONE, ERROR, PUSH or BAD, and where the unconsumed bytes begin

    A key without a value, or with one of another width, leaves ``out`` and ``found`` as
    they are and is counted. A buffer that holds an element of the right width with its
    header and line end is large enough.
    """
    while True:
        if state[P_SKIP] > 0:
            status, low = _drop(buf, low, high, state)
            if status != _GO_ON:
                return status, low
        if state[P_ELEMENT] == state[P_ELEMENTS]:
            state[P_REPLY] += 1
            state[P_ELEMENT] = 0
            state[P_ELEMENTS] = -1
        if state[P_ELEMENTS] < 0:
            if state[P_REPLY] == key_ends.size:
                return DONE, low
            status, low = _begin_reply(buf, low, high, state, key_ends)
            if status != _GO_ON:
                return status, low
        status, low = _copy_rows(buf, low, high, state, out, targets, found, header)
        if status == _GO_ON and state[P_ELEMENT] < state[P_ELEMENTS]:
            status, low = _take_element(buf, low, high, state, out, targets, found)
        if status != _GO_ON:
            return status, low


@njit(nogil=True, cache=True)
def _end_of_text(buf, low, high):
    """Return what follows a line of text at ``low``, INCOMPLETE or MALFORMED."""
    kind = buf[low]
    for at in range(low + 1, min(high, low + MAX_LINE_BYTES)):
        if buf[at] == _LF:
            return np.int64(MALFORMED)
        if buf[at] == _CR:
            n = at - low - 1
            if kind == ord("_") and n > 0:
                return np.int64(MALFORMED)
            if kind == ord("#") and (
                n != 1 or (buf[low + 1] != ord("t") and buf[low + 1] != ord("f"))
            ):
                return np.int64(MALFORMED)
            if n == 0 and (kind == ord(":") or kind == ord(",") or kind == ord("(")):
                return np.int64(MALFORMED)
            return _end_of_line(buf, at, high)
    too_long = high - low >= MAX_LINE_BYTES
    return np.int64(MALFORMED if too_long else INCOMPLETE)


@njit(nogil=True, cache=True)
def end_of_reply(buf, low, high):
    """Return what follows one whole reply at ``low``, of any kind and nesting.

    Reads    buf uint8: the bytes low to high are received
    Returns  the index behind the reply; INCOMPLETE, or MALFORMED

    An attribute belongs to the reply that follows it.
    """
    left = np.int64(1)
    while left > 0:
        if low >= high:
            return np.int64(INCOMPLETE)
        kind = buf[low]
        left -= 1
        if kind in _LINES:
            low = _end_of_text(buf, low, high)
        elif kind in _BULKS or kind in _AGGREGATES:
            length, end = _read_length(buf, low, high)
            if end < 0:
                return end
            low = end
            if length == _NULL:
                if kind != ord("$") and kind != ord("*"):
                    return np.int64(MALFORMED)
            elif kind in _BULKS:
                low = _end_of_line(buf, low + length, high)
            else:
                twice = kind == ord("%") or kind == ord("|")
                left += 2 * length if twice else length
                left += 1 if kind == ord("|") else 0
        else:
            return np.int64(MALFORMED)
        if low < 0:
            return low
    return low
