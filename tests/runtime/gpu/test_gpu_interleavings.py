"""No resurrection in GPU caches, in every order of steps.

``HPS_TEST_ALL_ORDERS=1`` adds worlds that take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.interchange import n_devices
from hps_numba.runtime import table_writer
from hps_numba.runtime.changes import Change
from hps_numba.runtime.gpu import lookup as lookup_module
from hps_numba.runtime.gpu.deferred import DeferredInsert
from hps_numba.runtime.gpu.misses import Misses
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.upper import UpperCache, replace_rows
from hps_numba.types import Keys, Rows
from tests.runtime.gpu.gpu_cases import (
    CASES,
    DEFERRED,
    TWO,
    Case,
    lookup_on_the_second_device_update,
    lookup_reload,
    lookup_update,
    lookup_update_that_fails_late,
    update_refresh,
    update_refresh_of_the_key,
    warm_up_delete,
    warm_up_update,
)
from tests.runtime.gpu.gpu_histories import (
    GpuStage,
    SteppedDeferred,
    SteppedTableCache,
)
from tests.runtime.histories import FIRST, KEY

pytestmark = pytest.mark.device


@pytest.fixture
def make_stage(threads: ThreadPoolExecutor) -> Iterator[Callable[..., GpuStage]]:
    """Return what makes stages, which are closed when the test ends."""
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> GpuStage:
            if options.get("devices", 1) > n_devices():
                pytest.skip("this machine has one device")
            stage = GpuStage(threads, *args, **options)
            stack.callback(stage.close)
            return stage

        yield make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_brings_an_old_row_back(
    case: Case,
    make_stage: Callable[..., GpuStage],
    report: Callable[[str], None],
) -> None:
    seen = case.explore(make_stage(case.uppers, **case.options))
    report(f"{case}: {seen.schedules} orders")
    assert seen.schedules > 2
    assert [str(violation) for violation in seen.violations] == []


def test_a_crowd_pushes_the_key_out(make_stage: Callable[..., GpuStage]) -> None:
    stage = make_stage()
    stage.begin(warm=True)
    assert stage.held(0) == FIRST
    stage.crowd_out()
    assert stage.held(0) is None


# Planted faults. Each must be seen, or the tests above prove nothing.


class ReadsEpochsLate(Misses):
    def take(self, number: int) -> None:
        self._lane.staging[number % 2].wait()

    def give(self, number: int) -> None:
        super().take(number)
        super().give(number)


class DefersTheEpochToo(DeferredInsert):
    def store(self) -> int:
        rows, found = self.table.fetch(self.keys)
        return self.cache.insert(self.keys[found], rows[found], self.cache.epoch)


class DefersAsItIs(SteppedDeferred):
    """Makes of each item another one, with a fault."""

    def put(self, item: DeferredInsert) -> bool:
        return super().put(DefersTheEpochToo(item.cache, item.table, item.keys))


class UpdatesCachesFirst(Hierarchy):
    def _write_part(self, change: Change) -> None:
        caches, keys, rows = self.caches, change.keys, change.rows
        for cache in caches:
            cache.evict(keys) if rows is None else cache.update(keys, rows)
        self.caches = ()
        try:
            super()._write_part(change)
        finally:
            self.caches = caches


class UpdatesTheFirstCacheOnly(Hierarchy):
    def _write_part(self, change: Change) -> None:
        caches, self.caches = self.caches, self.caches[:1]
        try:
            super()._write_part(change)
        finally:
            self.caches = caches


class RefreshesWithoutLock(Hierarchy):
    def refresh_sets(self, cache: UpperCache, first_set: int, n_sets: int) -> int:
        keys = cache.keys_of(first_set, n_sets)
        return replace_rows(cache, keys, *self.read(keys))

    def refresh_keys(self, keys: Keys) -> int:
        rows, found = self.read(keys)
        return sum(replace_rows(cache, keys, rows, found) for cache in self.caches)


class RefreshesWhatIsThere(Hierarchy):
    """Leaves rows in caches that are gone beneath."""

    def refresh_sets(self, cache: UpperCache, first_set: int, n_sets: int) -> int:
        with self._write_lock:
            keys = cache.keys_of(first_set, n_sets)
            rows, found = self.read(keys)
            return cache.update(keys[found], rows[found])


class ReplacesWithoutClear(Hierarchy):
    def replacing(self) -> ExitStack:
        caches, self.caches = self.caches, ()
        try:
            return super().replacing()
        finally:
            self.caches = caches


class ClearsFirst(Hierarchy):
    """Empties caches before there are new rows, and not after."""

    def replacing(self) -> ExitStack:
        for cache in self.caches:
            cache.clear()
        caches, self.caches = self.caches, ()
        try:
            return super().replacing()
        finally:
            self.caches = caches


class IgnoresEpochs(SteppedTableCache):
    def insert(
        self, keys: Keys, rows: Rows, epoch: int, *, make_room: bool = True
    ) -> int:
        return super().insert(keys, rows, 1 << 40, make_room=make_room)


class StaysInItsEpoch(SteppedTableCache):
    """Stamps the keys of an update with the epoch that lookups read before it."""

    def update(self, keys: Keys, rows: Rows) -> int:
        self._epoch -= 1
        return super().update(keys, rows)


class LeavesDeletedRows(SteppedTableCache):
    def evict(self, keys: Keys) -> int:
        return 0


class UpdatesWhatIsCached(SteppedTableCache):
    """Leaves no stamp on keys that are not cached."""

    def update(self, keys: Keys, rows: Rows) -> int:
        cached = np.isin(keys, TableCache.keys_of(self, 0, self.n_sets))
        return super().update(keys[cached], rows[cached])


def acknowledging_early(stage: GpuStage) -> None:
    """Let updates return when they are queued, before the device has done them."""

    def later(cache: TableCache, update: Callable[..., int]) -> Callable[..., int]:
        def run(keys: Keys, rows: Rows) -> int:
            scheduler = stage.scheduler
            name = f"write {scheduler.n_tasks}"
            scheduler.spawn(name, lambda: update(keys, rows) and None, label="begin")
            return 0

        return run

    for cache in stage.caches:
        cache.update = later(cache, cache.update)  # type: ignore[method-assign]


def missing_evictions(patch: pytest.MonkeyPatch) -> None:
    """Let a failed update leave what is cached."""
    patch.setattr(table_writer, "evict_in_any_case", lambda cache, keys: None)


def late_epochs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lookup_module, "Misses", ReadsEpochsLate)


def nothing(_: Any) -> None:
    """Patch nothing."""


@pytest.mark.parametrize(
    ("case", "parts", "patch"),
    [
        pytest.param(
            Case(lookup_update),
            {},
            late_epochs,
            id="a lookup reads the epoch after the rows",
        ),
        pytest.param(
            Case(lookup_update, options=DEFERRED),
            {"deferred": DefersAsItIs},
            nothing,
            id="a deferred insert reads the epoch after the rows",
        ),
        pytest.param(
            Case(lookup_update),
            {"hierarchy": UpdatesCachesFirst},
            nothing,
            id="caches are updated before the tiers",
        ),
        pytest.param(
            Case(lookup_on_the_second_device_update, warm=True, options=TWO),
            {"hierarchy": UpdatesTheFirstCacheOnly},
            nothing,
            id="one device is updated",
        ),
        pytest.param(
            Case(lookup_update_that_fails_late, warm=True),
            {},
            missing_evictions,
            id="a failed update leaves old rows in caches",
        ),
        pytest.param(
            Case(update_refresh, warm=True),
            {"hierarchy": RefreshesWithoutLock},
            nothing,
            id="a refresh does not wait for updates",
        ),
        pytest.param(
            Case(update_refresh_of_the_key, warm=True),
            {"hierarchy": RefreshesWithoutLock},
            nothing,
            id="a refresh of keys does not wait for updates",
        ),
        pytest.param(
            Case(lookup_reload, warm=True),
            {"hierarchy": ReplacesWithoutClear},
            nothing,
            id="a reload leaves caches as they are",
        ),
        pytest.param(
            Case(lookup_reload),
            {"hierarchy": ClearsFirst},
            nothing,
            id="a reload empties caches before the tiers have new rows",
        ),
        pytest.param(
            Case(warm_up_update),
            {"table_cache": IgnoresEpochs},
            nothing,
            id="a warm-up stores rows from before an update",
        ),
        pytest.param(
            Case(lookup_update),
            {"table_cache": StaysInItsEpoch},
            nothing,
            id="an update leaves the epoch as it was",
        ),
        pytest.param(
            Case(warm_up_delete, warm=True),
            {"table_cache": LeavesDeletedRows},
            nothing,
            id="deleted rows stay in caches",
        ),
        pytest.param(
            Case(lookup_update),
            {"table_cache": UpdatesWhatIsCached},
            nothing,
            id="keys that are not cached are not stamped",
        ),
    ],
)
def test_a_planted_fault_is_seen(
    case: Case,
    parts: dict[str, type],
    patch: Callable[[pytest.MonkeyPatch], None],
    make_stage: Callable[..., GpuStage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch(monkeypatch)
    stage = make_stage(case.uppers, **case.options, **parts)
    assert case.explore(stage, stop_at_first=True).violations


def test_an_update_that_does_not_wait_for_the_device_is_seen(
    make_stage: Callable[..., GpuStage],
) -> None:
    stage = make_stage()
    acknowledging_early(stage)
    case = Case(lookup_update, warm=True)
    assert case.explore(stage, stop_at_first=True).violations


def test_a_refresh_that_leaves_what_is_gone_is_seen(
    make_stage: Callable[..., GpuStage],
) -> None:
    for hierarchy, left in ((Hierarchy, None), (RefreshesWhatIsThere, FIRST)):
        stage = make_stage((), hierarchy=hierarchy)
        stage.begin(warm=True)
        stage.lower.evict(stage.table.spec.tag, KEY)
        (cache,) = stage.caches
        stage.table.refresh_sets(cache, 0, cache.n_sets)
        assert stage.held(0) == left
