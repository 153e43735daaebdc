"""The commands that put or delete the rows of one partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.host import resp_write as write
from hps_numba.tiers.redis.channel import KEYS_PER_COMMAND
from hps_numba.tiers.redis.exchange import Unit
from hps_numba.tiers.redis.layout import (
    Bytes,
    CommandText,
    Numbers,
    pack,
    pack_arguments,
)
from hps_numba.tiers.redis.overflow_scripts import ADOPT
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.types import Keys, OverflowPolicy

_ROWS_PER_COMMAND = 256
_ROWS_PER_PIECE = 1024  # a server does nothing else while it works on one
_BYTES_PER_PIECE = 4 << 20
_FIRST = np.zeros(1, np.int64)  # the one partition that is written

Piece = tuple[int, int, int]  # partition, and bounds in the order by partition


@dataclass(frozen=True)
class Work:
    """Keys to write, partition by partition; without rows they are deleted."""

    table: RedisTable
    keys: Keys
    rows: Bytes | None  # (n, row_bytes)
    order: Numbers
    bounds: Numbers
    whole: bool = False  # a partition is one piece, though it be empty

    def pieces(self) -> list[Piece]:
        """Return the work in pieces, in turn from each partition."""
        if self.whole:
            bounds = self.bounds.tolist()
            return list(zip(range(len(bounds)), bounds, bounds[1:], strict=False))
        most = _ROWS_PER_PIECE
        if self.rows is not None:
            most = min(max(_BYTES_PER_PIECE // self.rows.shape[1], 1), most)
        found = []
        for p in range(self.bounds.size - 1):
            low, high = int(self.bounds[p]), int(self.bounds[p + 1])
            starts = range(low, high, most)
            found += [
                (n, p, start, min(start + most, high)) for n, start in enumerate(starts)
            ]
        return [(p, low, high) for _, p, low, high in sorted(found)]


@dataclass(frozen=True)
class Form:
    """A command of one partition as text: its head, and what precedes each key."""

    head: Bytes
    lead: Bytes
    n_fixed: int  # arguments in the head
    per_command: int  # keys of a command at most

    @classmethod
    def of(cls, text: CommandText, partition: int, per_command: int) -> Form:
        """Return one partition's form of a command."""
        head, lead = text.head(partition), text.lead(partition)
        return cls(head, lead, text.n_fixed, per_command)


class Bodies:
    """Makes the commands of pieces, each valid until the next one is made.

    Parameters
    ----------
    work
        The rows.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._for_rows, self._for_uses = _Buffer(), _Buffer()
        self._use = work.table.use()
        self._uses: Bytes | None = None
        policy = work.table.overflow.policy
        # A row that is written again keeps the number of its uses.
        least_used = policy is OverflowPolicy.EVICT_LEAST_USED
        self._adopts = work.table.limited and least_used
        if self._use is not None and work.rows is not None:
            use = np.frombuffer(self._use, np.uint8)
            self._uses = np.tile(use, (work.keys.size, 1))

    def unit(self, piece: Piece) -> Unit:
        """Return the commands that put or delete the rows of a piece.

        If partitions have a margin, the last reply to rows is how many there are now.
        """
        p, low, high = piece
        work, layout = self._work, self._work.table.layout
        parts: list[tuple[bytes | Bytes, int]] = []
        if work.rows is None:
            form = Form.of(layout.deleting, p, KEYS_PER_COMMAND)
            parts.append(self._for_rows.keys(form, work, piece))
            if self._use is not None:
                form = Form.of(layout.forgetting, p, KEYS_PER_COMMAND)
                parts.append(self._for_uses.keys(form, work, piece))
        else:
            form = Form.of(layout.writing, p, _ROWS_PER_COMMAND)
            parts.append(self._for_rows.rows(form, work, piece, work.rows))
            if self._adopts:
                new = work.keys[work.order[low:high]].tobytes()
                parts.append((pack(b"EVAL", ADOPT, 1, layout.uses_key(p), new), 1))
            elif self._uses is not None:
                form = Form.of(layout.noting, p, _ROWS_PER_COMMAND)
                parts.append(self._for_uses.rows(form, work, piece, self._uses))
            if work.table.limited:
                parts.append((pack(b"HLEN", work.table.counted_key(p)), 1))
        n_replies = sum(n for _, n in parts)
        return Unit(p, [text for text, _ in parts], n_replies, low, high)

    def command(self, piece: Piece, *arguments: bytes | str | int) -> bytes | Bytes:
        """Return a command of these arguments and a piece's keys, each with its row."""
        p, low, high = piece
        if low == high:
            return pack(*arguments)
        work = self._work
        head = np.frombuffer(pack_arguments(*arguments), np.uint8).copy()
        lead = work.table.layout.writing.lead(p)
        form = Form(head, lead, len(arguments), high - low)
        if work.rows is None:
            return self._for_rows.keys(form, work, piece)[0]
        return self._for_rows.rows(form, work, piece, work.rows)[0]


class _Buffer:
    """Memory for the commands of one piece after the other."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def keys(self, form: Form, work: Work, piece: Piece) -> tuple[Bytes, int]:
        """Return commands that name the keys of a piece, and how many they are."""
        _, low, high = piece
        head, lead = form.head, form.lead
        n_bytes, n_commands = write.key_commands_size(
            high - low, 1, head.size, lead.size, form.per_command
        )
        ends = self._reserve(n_bytes, n_commands)
        n_commands = write.build_key_commands(
            self._bytes,
            ends,
            np.empty(n_commands, np.int64),
            np.empty(high - low, np.int64),
            work.keys,
            work.order,
            np.array([low, high], np.int64),
            _FIRST,
            head,
            np.array([0, head.size], np.int64),
            lead,
            np.array([0, lead.size], np.int64),
            form.n_fixed,
            form.per_command,
        )
        return self._bytes[: ends[n_commands - 1]], n_commands

    def rows(
        self, form: Form, work: Work, piece: Piece, rows: Bytes
    ) -> tuple[Bytes, int]:
        """Return commands that name keys and rows, and how many they are."""
        _, low, high = piece
        head, lead = form.head, form.lead
        n_bytes, n_commands = write.row_commands_size(
            high - low, rows.shape[1], head.size, lead.size, form.per_command
        )
        ends = self._reserve(n_bytes, n_commands)
        n_commands = write.build_row_commands(
            self._bytes,
            ends,
            work.keys,
            rows,
            work.order,
            low,
            high,
            head,
            lead,
            np.frombuffer(b"$%d\r\n" % rows.shape[1], np.uint8).copy(),
            form.n_fixed,
            form.per_command,
        )
        return self._bytes[: ends[n_commands - 1]], n_commands

    def _reserve(self, n_bytes: int, n_commands: int) -> Numbers:
        if self._bytes.size < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        return np.empty(n_commands, np.int64)
