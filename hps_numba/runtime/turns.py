"""When chunks of one lookup pass a tier one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from hps_numba.runtime.chunk import Chunk
from hps_numba.tiers.base import Tier

FEW = 1 / 16  # of a chunk's keys, left to the tiers below


class Turns:
    """Decides for one table where chunks take turns. Thread-safe.

    They do in a tier that answers in turn, as long as it leaves keys to tiers below:
    each of them is at work on another chunk then. With next to nothing to do below, a
    chunk that waits for its turn only keeps the tier waiting.

    Parameters
    ----------
    tiers
        All tiers of the table.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        # Replaced by whoever comes last; a turn too many or too few does no harm.
        self._taken = {tier: tier.in_turn for tier in tiers[:-1]}

    def of(self, tier: Tier, chunk: Chunk) -> AbstractContextManager[object]:
        """Return the context in which a tier is asked for keys of a chunk."""
        return chunk.turn if self._taken.get(tier) else nullcontext()

    def note(self, tier: Tier, asked: int, hits: int) -> None:
        """Note how many of the keys that it was asked for a tier had."""
        if tier.in_turn and tier in self._taken:
            self._taken[tier] = asked - hits > FEW * asked
