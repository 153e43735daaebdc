"""Which keys were brought into a cache a moment ago."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import Keys, Mask

_BITS = 14
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Recent:
    """When keys were last brought; a key may be forgotten for another one.

    Lookups that follow each other miss the same keys until the first of them has been
    brought, and ask for them as often.

    Notes
    -----
    For one thread.
    """

    def __init__(self) -> None:
        self._keys = np.zeros(1 << _BITS, np.int64)
        self._times = np.full(1 << _BITS, -np.inf)

    def since(self, keys: Keys, time_s: float) -> Mask:
        """Return which keys are known to have been brought at ``time_s`` or later."""
        places = _places(keys)
        known: Mask = (self._keys[places] == keys) & (self._times[places] >= time_s)
        return known

    def note(self, keys: Keys, time_s: float) -> None:
        """Remember that keys were brought at ``time_s``."""
        places = _places(keys)
        self._keys[places] = keys
        # Of keys that share a place the last one stays, with its own time.
        self._times[places] = time_s


def _places(keys: Keys) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = keys.view(np.uint64) * _MIX
    return mixed >> np.uint64(64 - _BITS)
