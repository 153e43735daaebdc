"""Update stamps: which keys changed since a backfill's rows were read.

Invariant: ``epoch`` never falls, and the stamp of a bucket is at least the epoch of the
last write to any key in it. A bucket that is held has the largest stamp of all.

Keys share buckets, so a backfill may be refused although another key was written; it is
only work lost. The memory is fixed, and evicting a row does not forget its stamp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import Keys, Mask

BUCKETS = 1 << 14
HELD = np.iinfo(np.int64).max
_MIX = np.uint64(0x9E3779B97F4A7C15)


class UpdateStamps:
    """The update epoch of one table, and a stamp per bucket of keys.

    Not thread-safe: the owner calls every method but ``held`` under its table's lock.
    """

    nbytes = BUCKETS * 8

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self._stamps = np.full(BUCKETS, epoch, np.int64)

    def commit(self, keys: Keys) -> None:
        """Note that rows of these keys were written or deleted."""
        self.epoch += 1
        buckets = _bucket(keys)
        self._stamps[buckets[self._stamps[buckets] != HELD]] = self.epoch

    def commit_all(self) -> None:
        """Note that any key may have changed."""
        self.epoch += 1
        self._stamps[self._stamps != HELD] = self.epoch

    def hold(self, keys: Keys | None) -> None:
        """Refuse backfills of these keys (of all, if None) until ``release``."""
        self._stamps[slice(None) if keys is None else _bucket(keys)] = HELD

    def release(self) -> None:
        """End every hold as a write would have."""
        self.epoch += 1
        self._stamps[self._stamps == HELD] = self.epoch

    @contextmanager
    def held(
        self, lock: AbstractContextManager[object], keys: Keys | None
    ) -> Iterator[None]:
        """Hold keys (all, if None) for a context, taking the lock at both ends."""
        with lock:
            self.hold(keys)
        try:
            yield
        finally:
            with lock:
                self.release()

    def admit(self, keys: Keys, epoch: int) -> Mask:
        """Return which keys were not written since ``epoch`` and are not held."""
        admitted: Mask = self._stamps[_bucket(keys)] <= epoch
        return admitted


def _bucket(keys: Keys) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = keys.view(np.uint64) * _MIX
    return mixed >> np.uint64(64 - 14)
