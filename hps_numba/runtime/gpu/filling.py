"""Warm-up: rows that a cache has before the first lookup."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.types import Keys

logger = logging.getLogger(__name__)


def fill(
    cache: TableCache,
    table: Hierarchy,
    blocks: Iterable[Keys],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Insert the rows of keys, the most wanted first; return how many have a place.

    Parameters
    ----------
    cache
        The table's cache. No row leaves it for another one.
    table
        Where the rows come from.
    blocks
        Unique keys.
    progress
        Called with the number of keys done since the last call.

    Raises
    ------
    TierError
        If a tier fails.
    DeviceError
        If the device fails.

    Notes
    -----
    Safe beside lookups and updates: a row that is updated meanwhile is not put back.
    """
    n_keys = n_known = n_placed = 0
    for block in blocks:
        for low in range(0, block.size, cache.block_rows):
            keys = block[low : low + cache.block_rows]
            epoch = cache.epoch
            rows, found = table.read(keys)
            if not found.all():
                keys, rows = keys[found], rows[found]
            n_placed += cache.insert(keys, rows, epoch, make_room=False)
            n_keys, n_known = n_keys + found.size, n_known + keys.size
            if progress is not None:
                progress(found.size)
    logger.info(
        "table=%s cache=%s warm-up: %d of %d keys are cached, %d had no row, "
        "%d no room",
        cache.spec.tag,
        cache.name,
        n_placed,
        n_keys,
        n_keys - n_known,
        n_known - n_placed,
    )
    return n_placed
