"""What is written to the tiers of a table, and what each tier is given of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hps_numba.tiers.base import LastingTier, Tier
from hps_numba.types import Keys, Rows, StreamSpan


@dataclass(frozen=True)
class Change:
    """New rows of unique keys, or (without rows) their removal."""

    keys: Keys
    rows: Rows | None

    def evicts_first(self, tier: Tier) -> bool:
        """Whether an upper tier loses the keys before a tier below is written."""
        return True

    def write(self, tier: Tier, tag: str, *, newest: bool) -> bool:
        """Write a tier, and return whether its rows are these.

        Parameters
        ----------
        tier, tag
            A tier, after those below it, and the table.
        newest
            Whether the tiers below have just these rows, not newer ones.
        """
        if self.rows is None:
            tier.delete(tag, self.keys)
        else:
            tier.insert(tag, self.keys, self.rows)
        return newest


@dataclass(frozen=True)
class StreamChange(Change):
    """A change that an update stream brought, for the tiers that follow the stream.

    It may come again, after a failure or a new start. Tiers that last know how far
    they are, and skip it. If one did, the tiers above it lose the keys instead: it may
    have newer rows by now.
    """

    span: StreamSpan
    into: Collection[Tier]

    def evicts_first(self, tier: Tier) -> bool:
        """Whether an upper tier loses the keys before a tier below is written.

        Those that follow the stream keep serving the old rows until they are given the
        new ones, however many come a second.
        """
        return tier not in self.into

    def write(self, tier: Tier, tag: str, *, newest: bool) -> bool:
        """Write a tier, and return whether its rows are these."""
        if tier not in self.into:
            return newest
        if isinstance(tier, LastingTier):
            rows = self.rows if newest else None
            written = tier.apply(tag, self.keys, rows, self.span)
            return newest and written == self.keys.size
        return super().write(tier, tag, newest=newest) if newest else False
