"""The piece of work that goes through the tiers of a table."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from typing_extensions import Self

from hps_numba.types import Keys, Mask, Rows

Watch = Callable[[str, float, float], None]
"""Called with the name of a tier that was asked, begin and end in s."""


class Turn:
    """A chunk's turn: a context that may be left early.

    Parameters
    ----------
    turns
        Held by whose turn it is; all chunks of a lookup have one.
    """

    def __init__(self, turns: threading.Lock) -> None:
        self._turns = turns
        self._mine = False

    def __enter__(self) -> Self:
        """Wait for the turn."""
        self._turns.acquire()
        self._mine = True
        return self

    def __exit__(self, *_: object) -> None:
        """Pass the turn on, unless that was done."""
        self.pass_on()

    def pass_on(self) -> None:
        """Let the next chunk have its turn; does nothing without one."""
        if self._mine:
            self._mine = False
            self._turns.release()


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
    turn: Turn = field(default_factory=lambda: Turn(threading.Lock()))

    @property
    def done(self) -> bool:
        """Whether every key is resolved."""
        return self.resolved == self.keys.size
