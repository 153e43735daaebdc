"""The commands that put or delete the rows of one partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.host import resp_write as write
from hps_numba.tiers.redis.channel import KEYS_PER_COMMAND
from hps_numba.tiers.redis.exchange import Unit
from hps_numba.tiers.redis.layout import Bytes, CommandText, Numbers, pack
from hps_numba.tiers.redis.overflow_scripts import ADOPT
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.types import Keys, OverflowPolicy

_ROWS_PER_COMMAND = 256
_ROWS_PER_PIECE = 1024  # a server does nothing else while it works on one
_BYTES_PER_PIECE = 4 << 20

Piece = tuple[int, int, int]  # partition, and bounds in the order by partition


@dataclass(frozen=True)
class Work:
    """Keys to write, partition by partition; without rows they are deleted."""

    table: RedisTable
    keys: Keys
    rows: Bytes | None  # (n, row_bytes)
    order: Numbers
    bounds: Numbers

    def pieces(self) -> list[Piece]:
        """Return the work in pieces, in turn from each partition."""
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
            parts.append(self._for_rows.keys(layout.deleting, work, piece))
            if self._use is not None:
                parts.append(self._for_uses.keys(layout.forgetting, work, piece))
        else:
            parts.append(self._for_rows.rows(layout.writing, work, piece, work.rows))
            if self._adopts:
                new = work.keys[work.order[low:high]].tobytes()
                parts.append((pack(b"EVAL", ADOPT, 1, layout.uses_key(p), new), 1))
            elif self._uses is not None:
                parts.append(
                    self._for_uses.rows(layout.noting, work, piece, self._uses)
                )
            if work.table.limited:
                parts.append((pack(b"HLEN", work.table.counted_key(p)), 1))
        n_replies = sum(n for _, n in parts)
        return Unit(p, [text for text, _ in parts], n_replies, low, high)


class _Buffer:
    """Memory for the commands of one piece after the other."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def keys(self, text: CommandText, work: Work, piece: Piece) -> tuple[Bytes, int]:
        """Return commands that name the keys of a piece, and how many they are."""
        p, low, high = piece
        n_bytes, n_commands = write.key_commands_size(
            high - low, 1, text.max_head, text.max_lead, KEYS_PER_COMMAND
        )
        ends = self._reserve(n_bytes, n_commands)
        bounds = np.zeros(work.bounds.size, np.int64)
        bounds[p], bounds[p + 1] = low, high
        n_commands = write.build_key_commands(
            self._bytes,
            ends,
            np.empty(n_commands, np.int64),
            np.empty(high - low, np.int64),
            work.keys,
            work.order,
            bounds,
            np.array([p], np.int64),
            text.heads,
            text.head_at,
            text.leads,
            text.lead_at,
            text.n_fixed,
            KEYS_PER_COMMAND,
        )
        return self._bytes[: ends[n_commands - 1]], n_commands

    def rows(
        self, text: CommandText, work: Work, piece: Piece, rows: Bytes
    ) -> tuple[Bytes, int]:
        """Return commands that name keys and rows, and how many they are."""
        p, low, high = piece
        head, lead = text.head(p), text.lead(p)
        n_bytes, n_commands = write.row_commands_size(
            high - low, rows.shape[1], head.size, lead.size, _ROWS_PER_COMMAND
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
            text.n_fixed,
            _ROWS_PER_COMMAND,
        )
        return self._bytes[: ends[n_commands - 1]], n_commands

    def _reserve(self, n_bytes: int, n_commands: int) -> Numbers:
        if self._bytes.size < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        return np.empty(n_commands, np.int64)
