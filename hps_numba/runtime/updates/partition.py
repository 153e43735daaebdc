"""One partition of a table's update stream: what was read, and applying it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic, time

from hps_numba.errors import CacheError, DeviceError, StreamGapError, TierError
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.updates.frames import (
    DELETE,
    BadFrame,
    FrameError,
    KeyBytes,
    Records,
    decode,
)
from hps_numba.runtime.updates.pending import Arrived, Pending
from hps_numba.runtime.updates.source import Message
from hps_numba.runtime.updates.stats import (
    PartitionStats,
    StreamCounters,
    StreamState,
)
from hps_numba.tiers.base import LastingTier, Tier
from hps_numba.types import Position, Rows

logger = logging.getLogger(__name__)

PIECE_ROWS = 1024  # that become visible together; compiled code takes about 2 ms
MAX_BACKOFF_S = 5.0


@dataclass(frozen=True)
class Following:
    """A served table that follows its stream.

    Parameters
    ----------
    table, gate
        The table, and the gate of its model.
    into
        The tiers that the stream is written to.
    key_bytes
        Width of the deployment's keys.
    counters
        Of all partitions.
    reached
        How far partitions came that are not read now, for tiers that store nothing.
    """

    table: Hierarchy
    gate: Gate
    into: tuple[Tier, ...]
    key_bytes: KeyBytes
    counters: StreamCounters = field(default_factory=StreamCounters)
    reached: dict[int, Position] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """The table's topic, which is its tag."""
        return self.table.spec.tag

    @property
    def lasting(self) -> tuple[LastingTier, ...]:
        """The tiers that store how far they are, the lowest first."""
        return tuple(t for t in reversed(self.into) if isinstance(t, LastingTier))

    @property
    def value_sizes(self) -> tuple[int, ...]:
        """Bytes of a row in a frame: as the table stores it, or float32."""
        return self.table.spec.row_bytes, self.table.spec.dim * 4

    def tell_lower_positions(self) -> None:
        """Let tiers that servers share know how far the tiers below them are."""
        below: Mapping[int, Position] = {}
        for tier in reversed(self.table.tiers):
            if isinstance(tier, LastingTier):
                tier.lower_positions(self.topic, below)
                below = tier.positions(self.topic)

    def seek(self, partition: int, position: Position) -> None:
        """Let every tier go on from a position."""
        for tier in self.lasting:
            tier.seek(self.topic, {partition: position})


class Partition:
    """A stream partition that is read. Used by one thread, but for ``stats``.

    Parameters
    ----------
    following
        The table.
    number
        Of the partition.
    position
        The first record to apply.
    backoff_s
        Pause after a first failure, in seconds.
    """

    def __init__(
        self, following: Following, number: int, position: Position, backoff_s: float
    ) -> None:
        self.following = following
        self.number = number
        self.pending = Pending(following.table.spec, number, position)
        self.state = StreamState.READING
        self.reason = ""
        self.retry_s = 0.0  # when it is tried again, by the monotonic clock
        self._backoff_s = self._first_backoff_s = backoff_s

    @property
    def reads(self) -> bool:
        """Whether messages are to be taken up."""
        return self.state in (StreamState.READING, StreamState.RETRYING)

    @property
    def ready(self) -> bool:
        """Whether something waits that may be applied now."""
        if not self.pending or not self.reads:
            return False
        if self.state is StreamState.RETRYING:
            return monotonic() >= self.retry_s
        return True

    def take(self, message: Message, refuse: Callable[[Message, str], None]) -> None:
        """Take a message up; one that cannot be applied is refused and counted."""
        records: Records | None = None
        counters = self.following.counters
        counters.add(messages=1)
        try:
            is_delete = message.key == DELETE
            if message.key is not None and not is_delete:
                raise FrameError(BadFrame.KEYED, f"has the Kafka key {message.key!r}")
            records = decode(
                message.value,
                is_delete=is_delete,
                value_sizes=self.following.value_sizes,
                key_bytes=self.following.key_bytes,
            )
        except FrameError as exc:
            counters.skip(exc.reason.value)
            refuse(message, str(exc))
        self.pending.add(Arrived(message.offset, message.timestamp_ms, records))

    def apply(self, burst_rows: int, stop: Callable[[], bool]) -> None:
        """Apply what waits, piece by piece, until done or told to stop.

        Raises
        ------
        StreamGapError
            If a tier has lost records before.
        TierError, CacheError, DeviceError
            If a piece could not be applied; it waits, with those after it.
        HPSError
            If the table's model is not served any more.
        """
        following = self.following
        with following.gate:
            for piece in self.pending.pieces(PIECE_ROWS, burst_rows):
                if stop():
                    return
                rows: Rows | None = piece.rows
                following.table.apply(piece.keys, rows, piece.span, following.into)
                now_s = time()
                ages_s = [
                    now_s - m.timestamp_ms / 1e3
                    for m in piece.finished
                    if m.timestamp_ms is not None
                ]
                following.counters.applied(
                    piece.n_records, rows=rows is not None, ages_s=ages_s
                )

    def fail(self, error: TierError | CacheError | DeviceError) -> None:
        """Wait before the next attempt, longer each time."""
        self.following.counters.add(retries=1)
        pause_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._backoff_s = min(self._backoff_s * 2, MAX_BACKOFF_S)
        self.retry_s = monotonic() + pause_s
        self.state, self.reason = StreamState.RETRYING, str(error)

    def recover(self) -> bool:
        """Note that a piece was applied; return whether it had failed before."""
        failed = self.state is StreamState.RETRYING
        if failed:
            self.state, self.reason = StreamState.READING, ""
        self._backoff_s = self._first_backoff_s
        return failed

    def rewind(self, gap: StreamGapError) -> Position:
        """Go back to where a tier is that has lost records."""
        position = Position(gap.offset, gap.record)
        self.following.counters.add(rewinds=1)
        self.pending.restart(position)
        return position

    def stats(self, end: int | None) -> PartitionStats:
        """Return the state; ``end`` is the offset after the last message."""
        position = self.pending.position
        if end is not None:
            end = max(end, position.offset)  # it was seen a moment ago
        lag = None if end is None else end - position.offset
        return PartitionStats(self.number, self.state, self.reason, position, end, lag)
