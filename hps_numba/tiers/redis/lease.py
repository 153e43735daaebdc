"""The lease of a load: while it lasts, no server backfills rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from hps_numba.errors import TierTimeoutError
from hps_numba.tiers.redis.scripts import LEASE_US

_LEASE_S = LEASE_US / 1e6


class Lease:
    """Refuses backfills from ``begin`` to ``end``, if ``keep`` is called often enough.

    Parameters
    ----------
    stamp_all
        Stamps all keys with a lease in us.
    tag
        The table's, for messages.
    monotonic
        Time in s.
    """

    def __init__(
        self,
        stamp_all: Callable[[int], None],
        tag: str,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        self._stamp_all = stamp_all
        self._tag = tag
        self._monotonic = monotonic
        self._since_s = 0.0

    def begin(self) -> None:
        """Refuse backfills from now on."""
        # Read first: what a server grants may only be longer.
        self._since_s = self._monotonic()
        self._stamp_all(LEASE_US)

    def keep(self) -> None:
        """Renew the lease if that is due.

        Raises
        ------
        TierTimeoutError
            If it passed: a backfill may have put an old row over a new one.
        """
        age_s = self._monotonic() - self._since_s
        if age_s >= _LEASE_S:
            raise TierTimeoutError(
                f"a block of rows took {age_s:.0f} s of the {_LEASE_S:.0f} s in which "
                f"a load keeps older rows out; load the table again",
                tier="redis",
                tag=self._tag,
            )
        if age_s >= _LEASE_S / 3:
            self.begin()

    def end(self) -> None:
        """Refuse backfills that began before now, and no others."""
        self.keep()
        self._stamp_all(0)
