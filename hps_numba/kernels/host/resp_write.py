r"""Building Redis commands for many keys of eight bytes in one pass.

A command is ``*<arguments>\r\n``, a head that its caller encoded (the command's name
and, for hashes, the name of the hash), and for each key a lead (``$<length>\r\n`` and
the part of the key's name that its partition's keys share), the eight bytes of the key,
little-endian as all supported machines store them, and ``\r\n``.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit
from hps_numba.kernels.host.memory import copy_bytes, copy_row

NO_ROOM = -1  # a buffer is smaller than the size that the functions below give

_CR = 13
_LF = 10
_KEY_BYTES = 8
_MAX_COUNT_BYTES = 23  # "*", 20 digits, "\r\n"


def key_commands_size(
    n_keys: int, n_partitions: int, max_head: int, max_lead: int, per_command: int
) -> tuple[int, int]:
    """Return the most bytes and the most commands that ``build_key_commands`` writes.

    Parameters
    ----------
    n_keys
        Keys of all partitions together.
    n_partitions
        Partitions that are written.
    max_head, max_lead
        Bytes of the longest head and of the longest lead.
    per_command
        Most keys in a command.
    """
    n_commands = min(n_keys, n_keys // per_command + n_partitions)
    n_bytes = n_commands * (_MAX_COUNT_BYTES + max_head)
    return n_bytes + n_keys * (max_lead + _KEY_BYTES + 2), n_commands


def row_commands_size(
    n_rows: int, row_bytes: int, head: int, lead: int, per_command: int
) -> tuple[int, int]:
    """Return the most bytes and the most commands that ``build_row_commands`` writes.

    Parameters
    ----------
    n_rows
        Rows to write.
    row_bytes
        Bytes of a row.
    head, lead
        Bytes of the head and of the lead.
    per_command
        Most rows in a command.
    """
    n_commands = -(-n_rows // per_command)
    value_bytes = len(f"${row_bytes}\r\n") + row_bytes + 2
    n_bytes = n_commands * (_MAX_COUNT_BYTES + head)
    return n_bytes + n_rows * (lead + _KEY_BYTES + 2 + value_bytes), n_commands


@njit(nogil=True, cache=True, inline="always")
def _put_end(buf, at):
    buf[at] = _CR
    buf[at + 1] = _LF
    return at + 2


@njit(nogil=True, cache=True)
def _put_count(buf, at, count):
    r"""Write ``*<count>\r\n``; return what follows it."""
    buf[at] = ord("*")
    n_digits = 1
    rest = count // 10
    while rest > 0:
        n_digits += 1
        rest //= 10
    rest = count
    for i in range(n_digits):
        buf[at + n_digits - i] = ord("0") + rest % 10
        rest //= 10
    return _put_end(buf, at + 1 + n_digits)


@njit(nogil=True, cache=True)
def build_key_commands(
    buf,
    ends,
    key_ends,
    targets,
    keys,
    order,
    bounds,
    partitions,
    heads,
    head_at,
    leads,
    lead_at,
    n_fixed,
    per_command,
):
    """Write the commands that name the keys of some partitions: MGET, HMGET, UNLINK.

    Reads    keys int64 (n,); order int64 and bounds int64 (P + 1,), as
             ``group_by_partition`` gives them; partitions int64: which, in what order;
             heads, leads uint8 with those of partition p from head_at[p] to
             head_at[p + 1] and from lead_at[p] to lead_at[p + 1]; n_fixed arguments
             that a head holds; at most per_command keys a command
    Writes   buf uint8; ends int64: where each command ends; key_ends int64: keys up to
             the end of each command; targets int64: position in ``keys`` of each key
             that is sent
    Returns  the number of commands; NO_ROOM if a buffer is too small
    """
    base = np.int64(buf.ctypes.data)
    at = np.int64(0)
    n_sent = np.int64(0)
    n_commands = np.int64(0)
    most_commands = min(ends.size, key_ends.size)
    for p in partitions:
        head = np.int64(heads.ctypes.data) + head_at[p]
        head_bytes = head_at[p + 1] - head_at[p]
        lead = np.int64(leads.ctypes.data) + lead_at[p]
        lead_bytes = lead_at[p + 1] - lead_at[p]
        for first in range(bounds[p], bounds[p + 1], per_command):
            last = min(first + per_command, bounds[p + 1])
            need = _MAX_COUNT_BYTES + head_bytes
            need += (last - first) * (lead_bytes + _KEY_BYTES + 2)
            if at + need > buf.size or n_commands == most_commands:
                return np.int64(NO_ROOM)
            if n_sent + last - first > targets.size:
                return np.int64(NO_ROOM)
            at = _put_count(buf, at, last - first + n_fixed)
            copy_bytes(base + at, head, head_bytes)
            at += head_bytes
            for i in range(first, last):
                copy_row(base + at, lead, lead_bytes)
                at += lead_bytes
                source = np.int64(keys.ctypes.data) + order[i] * _KEY_BYTES
                copy_bytes(base + at, source, _KEY_BYTES)
                at = _put_end(buf, at + _KEY_BYTES)
                targets[n_sent] = order[i]
                n_sent += 1
            ends[n_commands] = at
            key_ends[n_commands] = n_sent
            n_commands += 1
    return n_commands


@njit(nogil=True, cache=True)
def build_row_commands(
    buf,
    ends,
    keys,
    rows,
    order,
    low,
    high,
    head,
    lead,
    value_head,
    n_fixed,
    per_command,
):
    r"""Write the commands that store rows of one partition: MSET, HSET.

    Reads    keys int64 (n,), rows (n, row_bytes) uint8, order int64: the rows
             order[low:high] are written; head, lead uint8; value_head uint8:
             ``$<row_bytes>\r\n``; n_fixed arguments that the head holds; at most
             per_command rows a command
    Writes   buf uint8; ends int64: where each command ends
    Returns  the number of commands; NO_ROOM if a buffer is too small
    """
    base = np.int64(buf.ctypes.data)
    row_bytes = rows.shape[1]
    each = lead.size + _KEY_BYTES + 2 + value_head.size + row_bytes + 2
    at = np.int64(0)
    n_commands = np.int64(0)
    for first in range(low, high, per_command):
        last = min(first + per_command, high)
        need = _MAX_COUNT_BYTES + head.size + (last - first) * each
        if at + need > buf.size or n_commands == ends.size:
            return np.int64(NO_ROOM)
        at = _put_count(buf, at, 2 * (last - first) + n_fixed)
        copy_bytes(base + at, np.int64(head.ctypes.data), head.size)
        at += head.size
        for i in range(first, last):
            copy_row(base + at, np.int64(lead.ctypes.data), lead.size)
            at += lead.size
            source = np.int64(keys.ctypes.data) + order[i] * _KEY_BYTES
            copy_bytes(base + at, source, _KEY_BYTES)
            at = _put_end(buf, at + _KEY_BYTES)
            copy_bytes(base + at, np.int64(value_head.ctypes.data), value_head.size)
            at += value_head.size
            source = np.int64(rows.ctypes.data) + order[i] * row_bytes
            copy_row(base + at, source, row_bytes)
            at = _put_end(buf, at + row_bytes)
        ends[n_commands] = at
        n_commands += 1
    return n_commands
