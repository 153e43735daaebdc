"""Refresh: rows that a cache holds are read again, a part of its sets at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from hps_numba.errors import HPSError
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # for a refresh that is under way when its server closes


def refresh(cache: TableCache, table: Hierarchy, share: float = 1.0) -> int:
    """Read every row of a cache again; return how many were replaced.

    Parameters
    ----------
    cache
        The table's cache.
    table
        Where the rows come from. Its updates wait for one step at most.
    share
        Share of the sets that a step takes.
    """
    return sum(
        table.refresh_sets(cache, first, n) for first, n in _ranges(cache, share)
    )


def _ranges(cache: TableCache, share: float) -> Iterator[tuple[int, int]]:
    """Yield the first set of each step, and how many it takes."""
    step = max(1, min(int(cache.n_sets * share), cache.max_sets))
    for first in range(0, cache.n_sets, step):
        yield first, min(step, cache.n_sets - first)


class Refresher:
    """Refreshes at intervals, in a thread of its own.

    Parameters
    ----------
    name
        What is refreshed, for messages.
    interval_s
        Seconds from the end of one refresh to the next.
    step
        Refreshes once; what it raises of this package is logged, and tried again.
    """

    def __init__(
        self, name: str, interval_s: float, step: Callable[[], object]
    ) -> None:
        self._name, self._interval_s, self._step = name, interval_s, step
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"hps-refresh-{name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop; waits for a refresh that is under way. The second call does nothing."""
        self._stop.set()
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._once()

    def _once(self) -> None:
        try:
            self._step()
        except HPSError as exc:
            logger.warning("refresh of %s failed: %s", self._name, exc)
