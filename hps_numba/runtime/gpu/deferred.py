"""Keys whose rows are fetched when their lookup is over."""

from __future__ import annotations

from dataclasses import dataclass

from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.types import Keys


@dataclass(frozen=True)
class DeferredInsert:
    """Unique keys that a lookup gave default rows, to be fetched and inserted."""

    cache: TableCache
    table: Hierarchy
    keys: Keys

    @property
    def tag(self) -> str:
        """Tag of the table."""
        return self.cache.spec.tag

    @property
    def n_bytes(self) -> int:
        """Bytes that the queue holds for it."""
        return self.keys.nbytes

    def store(self) -> int:
        """Fetch the rows and insert them; return how many were inserted."""
        stored, step = 0, self.cache.block_rows
        for low in range(0, self.keys.size, step):
            keys = self.keys[low : low + step]
            epoch = self.cache.epoch
            rows, found = self.table.fetch(keys)
            stored += self.cache.insert(keys[found], rows[found], epoch)
        return stored
