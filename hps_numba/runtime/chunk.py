"""The piece of work that goes through the tiers of a table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from hps_numba.types import Keys, Mask, Rows

Watch = Callable[[str, float, float], None]
"""Called with the name of a tier that was asked, begin and end in s."""


@dataclass
class Chunk:
    """Some keys of one lookup, the rows to write, and what is known so far."""

    keys: Keys
    out: Rows
    found: Mask
    resolved: int = 0
    joined: int = 0
    degraded: bool = False
    watch: Watch | None = None  # told of every tier that is asked for these keys
    # Held while a tier is asked that answers one chunk after the other.
    turn: AbstractContextManager[object] = field(default_factory=nullcontext)

    @property
    def done(self) -> bool:
        """Whether every key is resolved."""
        return self.resolved == self.keys.size
