"""Keys whose rows are fetched when their lookup is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.types import Keys


@dataclass(frozen=True)
class DeferredInsert:
    """Unique keys that a lookup gave default rows, to be fetched and inserted."""

    cache: TableCache
    table: Hierarchy
    keys: Keys
    asked_s: float = field(default_factory=monotonic)

    @property
    def tag(self) -> str:
        """Tag of the table."""
        return self.cache.spec.tag

    @property
    def n_bytes(self) -> int:
        """Bytes that the queue holds for it."""
        return self.keys.nbytes

    def store(self) -> int:
        """Fetch the rows and insert them; return how many keys were brought.

        Those count that were brought for another lookup since this one missed them.
        """
        recent, step = self.cache.recent, self.cache.block_rows
        left = self.keys[~recent.since(self.keys, self.asked_s)]
        stored = self.keys.size - left.size
        for low in range(0, left.size, step):
            keys, now_s = left[low : low + step], monotonic()
            epoch = self.cache.epoch
            rows, found = self.table.fetch(keys)
            stored += self.cache.insert(keys[found], rows[found], epoch)
            recent.note(keys[found], now_s)
        return stored
