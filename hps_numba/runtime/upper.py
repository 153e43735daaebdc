"""Caches above the tiers of a table, as the tiers see them."""

from __future__ import annotations

import logging
from typing import Protocol

from hps_numba.errors import CacheError, DeviceError
from hps_numba.runtime.stats import TierUse
from hps_numba.types import Keys, Mask, Rows

logger = logging.getLogger(__name__)


class UpperCache(Protocol):
    """A cache above the tiers, whose lookups and inserts are its own affair.

    What it is given comes after the tiers below it have it, one call after another.
    """

    def update(self, keys: Keys, rows: Rows) -> int:
        """Replace the rows of those of the unique keys that are cached."""

    def evict(self, keys: Keys) -> int:
        """Remove unique keys."""

    def clear(self) -> None:
        """Remove all keys."""

    def keys_of(self, first_set: int, n_sets: int) -> Keys:
        """Return the keys of a part of the cache."""

    def use(self) -> TierUse:
        """Return the counters."""


def replace_rows(cache: UpperCache, keys: Keys, rows: Rows, found: Mask) -> int:
    """Give a cache the rows that were found, and take the others from it."""
    if not found.all():
        cache.evict(keys[~found])
    return cache.update(keys[found], rows[found])


def evict_in_any_case(cache: UpperCache, keys: Keys) -> None:
    """Remove unique keys; a cache that fails is logged only."""
    try:
        cache.evict(keys)
    except (CacheError, DeviceError) as exc:
        logger.warning("cache: rows of a failed update were not evicted: %s", exc)
