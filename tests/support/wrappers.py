"""Tiers around a tier: they stop, fail or count, and otherwise do what it does."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.base import Epoch, Tier, TierStats
from hps_numba.types import Keys, Mask, RowBlock, Rows, TableSpec


class WrappedTier(Tier):
    """Does what the tier in it does, and calls ``before`` and ``after`` around it.

    Both get the operation: a method's name, or ``hold`` and ``release`` for the two
    ends of a hold. What lasting tiers add is passed on as well.
    """

    def __init__(self, tier: Tier) -> None:
        self.inner = tier
        self.name = tier.name
        self.local = tier.local
        self.in_turn = tier.in_turn

    def before(self, operation: str) -> None:
        """Called before an operation of the tier."""

    def after(self, operation: str) -> None:
        """Called after an operation of the tier that did not raise."""

    def open_table(self, spec: TableSpec, *, max_bytes: int | None = None) -> None:
        self.inner.open_table(spec, max_bytes=max_bytes)

    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,
    ) -> int:
        return self._call("fetch", tag, keys, out, found, budget_s=budget_s)

    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        self._call("insert", tag, keys, rows)

    def delete(self, tag: str, keys: Keys) -> int:
        return self._call("delete", tag, keys)

    def load(self, tag: str, blocks: Iterable[RowBlock], **options: Any) -> int:
        return self._call("load", tag, blocks, **options)

    def epoch(self, tag: str) -> Epoch:
        return self._call("epoch", tag)

    @contextmanager
    def hold(self, tag: str, keys: Keys | None = None) -> Iterator[None]:
        self.before("hold")
        with self.inner.hold(tag, keys):
            self.after("hold")
            try:
                yield
            finally:
                self.before("release")
        self.after("release")

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        return self._call("backfill", tag, keys, rows, epoch)

    def arrange(self, tag: str, keys: Keys) -> NDArray[np.int64] | None:
        return self.inner.arrange(tag, keys)

    def evict(self, tag: str, keys: Keys | None = None) -> int:
        return self._call("evict", tag, keys)

    def iterate(self, tag: str, *, block_rows: int = 65_536) -> Iterator[RowBlock]:
        blocks = self.inner.iterate(tag, block_rows=block_rows)
        while True:
            self.before("iterate")
            block = next(blocks, None)
            self.after("iterate")
            if block is None:
                return
            yield block

    def tables(self, model: str) -> list[str]:
        return self.inner.tables(model)

    def size(self, tag: str) -> int:
        return self.inner.size(tag)

    def stats(self, tag: str) -> TierStats:
        return self.inner.stats(tag)

    def drop_table(self, tag: str) -> None:
        self._call("drop_table", tag)

    def close(self) -> None:
        self.inner.close()

    @property
    def read_only(self) -> bool:
        return self.inner.read_only  # type: ignore[attr-defined]  # lasting tiers

    def fingerprint(self, tag: str) -> dict[str, Any] | None:
        return self.inner.fingerprint(tag)  # type: ignore[attr-defined]  # as above

    def loading(self, tag: str) -> AbstractContextManager[None]:
        return self._call("loading", tag)

    def untouched(self, tag: str) -> bool:
        return self.inner.untouched(tag)  # type: ignore[attr-defined]  # as above

    def _call(self, operation: str, *args: Any, **options: Any) -> Any:
        self.before(operation)
        result = getattr(self.inner, operation)(*args, **options)
        self.after(operation)
        return result


class GatedTier(WrappedTier):
    """Comes to the points ``<tier>.<operation>`` and ``<tier>.<operation>.done``."""

    def __init__(self, tier: Tier, point: Callable[[str], None]) -> None:
        super().__init__(tier)
        self._point = point

    def before(self, operation: str) -> None:
        self._point(f"{self.name}.{operation}")

    def after(self, operation: str) -> None:
        self._point(f"{self.name}.{operation}.done")


class SteppedTier(WrappedTier):
    """Comes to the point ``<tier>.<operation>`` before each operation only."""

    def __init__(self, tier: Tier, point: Callable[[str], None]) -> None:
        super().__init__(tier)
        self._point = point

    def before(self, operation: str) -> None:
        self._point(f"{self.name}.{operation}")


class FailingTier(WrappedTier):
    """Raises where it is told to. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self._changed = threading.Condition()
        self._failing: dict[str, float] = {}  # times left, guarded by _changed
        self._failures: Counter[str] = Counter()  # guarded by _changed

    def fail(
        self, operation: str, *, times: float = math.inf, late: bool = False
    ) -> None:
        """Fail an operation, a number of times or until ``heal``.

        ``late`` fails it after it was done, as a connection does that breaks before the
        answer arrives.
        """
        with self._changed:
            self._failing[f"{operation}.done" if late else operation] = times

    def heal(self) -> None:
        """Fail no more."""
        with self._changed:
            self._failing.clear()

    def wait_failed(self, operation: str) -> None:
        """Wait until an operation has failed."""
        with self._changed:
            failed = self._changed.wait_for(lambda: self._failures[operation], 30.0)
        assert failed, f"{operation} did not fail"

    def before(self, operation: str) -> None:
        self._maybe_fail(operation)

    def after(self, operation: str) -> None:
        self._maybe_fail(f"{operation}.done")

    def _maybe_fail(self, operation: str) -> None:
        with self._changed:
            if self._failing.get(operation, 0) <= 0:
                return
            self._failing[operation] -= 1
            self._failures[operation] += 1
            self._changed.notify_all()
        raise TierUnavailableError(f"{operation} was made to fail", tier=self.name)


class CountingTier(WrappedTier):
    """Counts operations, and the keys that were asked for. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()  # guarded by _lock
        self.fetched: Counter[int] = Counter()  # by key, guarded by _lock

    def before(self, operation: str) -> None:
        with self._lock:
            self.calls[operation] += 1

    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,
    ) -> int:
        with self._lock:
            self.fetched.update(keys[~found].tolist())
        return super().fetch(tag, keys, out, found, budget_s=budget_s)
