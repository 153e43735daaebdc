"""Warnings about tiers that fail, few enough to be read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

from hps_numba.errors import TierError

EVERY_S = 10.0


class FailureLog:
    """Warns of each failing tier once in a while. Thread-safe.

    A tier that is down fails every lookup and every backfill. What is not said is
    counted, and the next warning says how much it was.

    Parameters
    ----------
    logger
        Where warnings go.
    every_s
        Seconds from one warning of a tier to the next.
    clock
        Returns seconds.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._logger = logger
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}  # by tier, guarded by _lock
        self._unsaid: dict[str, int] = {}  # by tier, guarded by _lock

    def report(self, what: str, tag: str, error: Exception) -> None:
        """Say that something failed for a table, unless its tier was named lately."""
        where = (error.tier if isinstance(error, TierError) else None) or tag
        with self._lock:
            now_s = self._clock()
            said_s = self._said_s.get(where)
            if said_s is not None and now_s < said_s + self._every_s:
                self._unsaid[where] = self._unsaid.get(where, 0) + 1
                return
            self._said_s[where] = now_s
            unsaid = self._unsaid.pop(where, 0)
        self._logger.warning(
            "%s tag=%s unsaid=%d error=%s: %s",
            what,
            tag,
            unsaid,
            type(error).__name__,
            error,
        )
