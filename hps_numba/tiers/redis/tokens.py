"""Which update numbers a server's lookups may take for tokens.

A token stands for what was written to a partition before it was given; a backfill that
carries it says that the server's lower tier has all of that. Where servers follow an
update stream, each with a lower tier of its own, a server may lag behind what others
wrote to Redis. So a number becomes a token once the lower tier is as far in the stream
as the partition was when the number was read.

Invariant: the lower tier has applied all of the stream that a partition had when its
token was the partition's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

from hps_numba.types import Position

At: TypeAlias = tuple[int, int]  # offset and record: compared faster than a Position

_START = (0, 0)
_NONE = -1  # refuses every backfill


class Tokens:
    """The tokens of a table's partitions. Not thread-safe, but ``all`` is.

    Parameters
    ----------
    n_partitions
        Partitions of the table.
    """

    def __init__(self, n_partitions: int) -> None:
        self._tokens = [_NONE] * n_partitions
        # A number that is no token yet, and the positions at which it will be.
        self._waiting: list[tuple[int, Mapping[int, At]] | None] = [None] * n_partitions
        self._lower: dict[int, At] = {}  # positions of the lower tier

    def all(self) -> tuple[int, ...]:
        """Return the token of each partition."""
        return tuple(self._tokens)

    def see(self, partition: int, number: int, stored: Mapping[int, At]) -> None:
        """Note a partition's number, and its positions at that moment."""
        if self._has(stored):
            self._take(partition, number)
            return
        waiting = self._waiting[partition]
        # One that is reached later does not take the place of one that is near, or a
        # server that always lags a little would have no token ever again.
        if waiting is None or _not_beyond(stored, waiting[1]):
            self._waiting[partition] = number, stored

    def reach(self, partition: int, position: Position) -> None:
        """Note that the lower tier has a partition of the stream up to a position."""
        at = (position.offset, position.record)
        self._lower[partition] = max(at, self._lower.get(partition, at))
        for p, waiting in enumerate(self._waiting):
            if waiting is not None and self._has(waiting[1]):
                self._take(p, waiting[0])

    def seek(self, positions: Mapping[int, Position]) -> None:
        """Set where the lower tier is, forwards or backwards."""
        for partition, position in positions.items():
            self._lower.pop(partition, None)
            self.reach(partition, position)

    def _has(self, stored: Mapping[int, At]) -> bool:
        lower = self._lower
        return all(lower.get(p, _START) >= at for p, at in stored.items())

    def _take(self, partition: int, number: int) -> None:
        self._tokens[partition] = max(self._tokens[partition], number)
        self._waiting[partition] = None


def _not_beyond(stored: Mapping[int, At], others: Mapping[int, At]) -> bool:
    return all(p in others and at <= others[p] for p, at in stored.items())


@lru_cache(maxsize=1024)  # partitions of a table mostly have the same
def parsed(stream: bytes) -> Mapping[int, At]:
    """Return the positions that a partition's stamps have, by partition of the stream.

    Raises
    ------
    ValueError
        If it is no such text.
    """
    found: dict[int, At] = {}
    for entry in stream.decode().split():
        partition, _, position = entry.partition("=")
        at = Position.parse(position)
        found[int(partition)] = (at.offset, at.record)
    return found
