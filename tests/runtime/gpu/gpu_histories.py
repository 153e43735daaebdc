"""One key in a hierarchy with GPU caches above it, stepped through by a schedule.

What a lookup leaves to the device, the insert of its rows, is a task of its own: it may
run at any time after the lookup has queued it, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.config import InferenceParams
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.deferred import DeferredInsert
from hps_numba.runtime.gpu.filling import fill
from hps_numba.runtime.gpu.lookup import GpuPath
from hps_numba.runtime.gpu.refreshing import refresh
from hps_numba.runtime.gpu.sizing import plan_cache
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.models import server_closed
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.runtime.session import LookupSession, ServedModel
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.types import Keys, RowBlock, Rows
from tests.runtime import histories
from tests.runtime.histories import DELETED, KEY, SPEC, History, Lookup, Stage, row
from tests.support.orders import Footprint

CROWD = np.arange(100, 128, dtype=np.int64)
LANES = 8  # more than a history has lookups, as inserts come when lanes are free


class SteppedTableCache(TableCache):
    """Stops before it does something that others may notice."""

    point: Callable[[str], None]
    pausing = True

    @property
    def epoch(self) -> int:
        self.point(f"{self.name}.epoch")
        return self._epoch

    def update(self, keys: Keys, rows: Rows) -> int:
        self.point(f"{self.name}.raise")
        return super().update(keys, rows)

    def evict(self, keys: Keys) -> int:
        self.point(f"{self.name}.raise")
        return super().evict(keys)

    def clear(self) -> None:
        self.point(f"{self.name}.clear")
        super().clear()

    def keys_of(self, first_set: int, n_sets: int) -> Keys:
        if self.pausing:
            self.point(f"{self.name}.keys_of")
        return super().keys_of(first_set, n_sets)

    def _write(self, *args: Any) -> NDArray[np.uint8]:
        if self.pausing:
            self.point(f"{self.name}.write")
        return super()._write(*args)


class SteppedDeferred:
    """A queue whose every item is a task."""

    def __init__(self, stage: GpuStage) -> None:
        self._stage = stage

    def put(self, item: DeferredInsert) -> bool:
        scheduler = self._stage.scheduler
        if self._stage.settled:
            return False
        scheduler.spawn(f"deferred {scheduler.n_tasks}", item.store, label="begin")
        return True


class GpuStage(Stage):
    """A hierarchy under GPU caches of one set each, for many histories.

    Parameters
    ----------
    threads, uppers, parts
        As of ``Stage``.
    devices
        How many there are.
    threshold
        Hit rate from which on rows are fetched when their lookup is over.
    table_cache, deferred
        Parts to use, such as ones with a planted fault.
    """

    def __init__(
        self,
        threads: Executor,
        uppers: Sequence[Callable[[], Tier]] = (HostTier,),
        *,
        devices: int = 1,
        threshold: float = 1.1,
        table_cache: type[SteppedTableCache] = SteppedTableCache,
        deferred: type[SteppedDeferred] = SteppedDeferred,
        **parts: Any,
    ) -> None:
        super().__init__(threads, uppers, **parts)
        self.settled = False
        self.n_devices = devices
        self.threshold = threshold
        plan = plan_cache(_params(threshold), [1])
        self._caches = {
            device: GpuCache(_gpu(device), plan, n_lanes=LANES, block_rows=28)
            for device in range(devices)
        }
        self.caches = [
            self._stepped(cache, table_cache) for cache in self._caches.values()
        ]
        self.table.caches = tuple(self.caches)
        queue = deferred(self)
        self._sessions = [self._session(d, threshold, queue) for d in range(devices)]
        self._peeks = [self._session(d, 0.0, _Dropped()) for d in range(devices)]

    def begin(self, *, warm: bool) -> None:
        self.settled = False
        for one in self.caches:
            TableCache.clear(one)
        super().begin(warm=warm)
        if warm:
            for one in self.caches:
                one.insert(KEY, row(histories.FIRST), one.epoch)

    def lookup(self, device: int) -> tuple[Rows, bool]:
        """Return the key's row, and whether it was found."""
        return _look_up(self._sessions[device])

    def held(self, device: int) -> int | None:
        """Return the version that a cache holds."""
        out, found = _look_up(self._peeks[device])
        return int(out[0, 0]) if found else None

    def crowd_out(self) -> None:
        """Let other keys take the key's place in the first cache, in one step."""
        (first, *_), (peek, *_) = self.caches, self._peeks
        rows = np.zeros((CROWD.size, SPEC.dim), np.float32)
        first.pausing = False
        for _ in range(16):
            peek.lookup(SPEC.name, CROWD)  # so that the key's last hit is long ago
            first.insert(CROWD, rows, first._epoch)
            if KEY not in first.keys_of(0, first.n_sets):
                break
        first.pausing = True

    def close(self) -> None:
        """Give the devices' memory back."""
        for one in self._caches.values():
            one.close()

    def _stepped(
        self, cache: GpuCache, table_cache: type[SteppedTableCache]
    ) -> SteppedTableCache:
        (group,) = cache.groups
        stepped = table_cache(group, 0, cache.gpu, cache._writer)
        stepped.point = self.point
        cache.tables[SPEC.tag] = stepped
        insert = group.cache.insert

        def insert_later(*args: Any, stream: int, **rest: Any) -> None:
            def run() -> None:
                insert(*args, stream=stream, **rest)
                cache.gpu.wait(stream)

            if "outcomes" in rest or self.settled:
                run()
                return
            name = f"insert {self.scheduler.n_tasks}"
            self.scheduler.spawn(name, run, label=f"{stepped.name}.insert")

        group.cache.insert = insert_later  # type: ignore[method-assign]
        return stepped

    def _session(self, device: int, threshold: float, deferred: Any) -> LookupSession:
        gate = Gate(SPEC.model, server_closed)
        served = ServedModel(_params(threshold), (self.table,), gate)
        pipeline = Pipeline(self.threads)  # type: ignore[arg-type]
        path = GpuPath(served, self._caches[device], pipeline, deferred)
        return LookupSession(served, path)


class GpuHistory(History):
    """The tasks of one schedule on a stage with GPU caches."""

    _stage: GpuStage

    def lookup_on(self, device: int, *names: str) -> None:
        """Add lookups on a device."""
        for name in names:
            self.scheduler.spawn(
                name, lambda n=name: self._look_up_on(device, n), label="begin"
            )

    def lookup(self, *names: str) -> None:
        self.lookup_on(0, *names)

    def crowd(self) -> None:
        """Add the arrival of other keys, for which the key has to leave its set."""
        first = self._stage.caches[0]
        self.scheduler.spawn(
            "crowd", self._stage.crowd_out, label=f"{first.name}.write"
        )

    def warm_up(self) -> None:
        """Add a warm-up with the key."""
        first = self._stage.caches[0]
        self.scheduler.spawn(
            "warm-up", lambda: fill(first, self._stage.table, [KEY]), label="begin"
        )

    def refresh(self) -> None:
        def run() -> None:
            self._stage.table.refresh(8)
            for one in self._stage.caches:
                refresh(one, self._stage.table)

        self.scheduler.spawn("refresh", run, label="begin")

    def refresh_key(self) -> None:
        """Add a refresh of the key only."""
        self.scheduler.spawn(
            "refresh", lambda: self._stage.table.refresh_keys(KEY), label="begin"
        )

    def reload(self, version: int) -> None:
        """Add a load of files with this version."""
        self.scheduler.spawn(
            f"reload {version}", lambda: self._reload(version), label="begin"
        )

    def check(self) -> str | None:
        stage = self._stage
        stage.settled = True
        newest = stage.lower.applied[-1] or None
        for device in range(stage.n_devices):
            version = stage.held(device)
            if version not in (None, newest):
                return f"gpu:{device} holds version {version} under {newest}"
        if reason := super().check():
            return reason
        held = {stage.held(device) for device in range(stage.n_devices)}
        # Lookups that do not wait leave nothing behind here.
        wanted = {newest} if stage.threshold > 1 else {newest, None}
        return None if held <= wanted else f"caches hold {held} under {newest}"

    def _known(self) -> list[tuple[int, int, str]]:
        # While an update is under way, lookups find the old row or the new one.
        return [(v, end, f"{v} was acknowledged") for v, end in self._acknowledged]

    def _look_up(self, name: str) -> None:
        for device in range(self._stage.n_devices):
            self._look_up_on(device, f"{name} on {device}")

    def _look_up_on(self, device: int, name: str) -> None:
        begin = self._tick()
        self.scheduler.point(f"gpu:{device}.query")
        out, found = self._stage.lookup(device)
        self.scheduler.point("end")
        assert (out == out[0, 0]).all()
        version = int(out[0, 0])
        if found:
            assert version != DELETED
        elif self._stage.threshold < 1:
            return  # nobody knows yet
        self._lookups.append(Lookup(name, version, begin, self._tick()))

    def _reload(self, version: int) -> None:
        block = RowBlock(KEY, row(version))
        table = self._stage.table
        with table.replacing():
            for tier in reversed(table.tiers):
                tier.load(SPEC.tag, [block])
                table.forget_flights()
        self._acknowledge(version)


@cache
def footprint(label: str) -> Footprint:
    """Return what the step that begins at a stop point touches."""
    place, operation = label.split(".") if "." in label else (label, "")
    if not place.startswith("gpu:"):
        return histories.footprint(label)
    rows, epoch, stamps = place, f"{place} epoch", f"{place} stamps"
    reads, writes = {
        "query": ({rows}, set()),
        "keys_of": ({rows}, set()),
        "epoch": ({epoch}, set()),
        "raise": (set(), {epoch}),
        "write": (set(), {rows, stamps}),
        "insert": ({stamps}, {rows}),
        "clear": (set(), {rows, epoch, stamps}),
    }[operation]
    return Footprint(frozenset(reads), frozenset(writes))


class _Dropped:
    """A queue without room."""

    def put(self, item: DeferredInsert) -> bool:
        return False


@cache
def _gpu(device: int) -> Gpu:
    return Gpu(device)


def _params(threshold: float) -> InferenceParams:
    return InferenceParams(
        model_name=SPEC.model,
        max_batchsize=28,
        hit_rate_threshold=threshold,
        embedding_table_names=[SPEC.name],
        embedding_vecsize_per_table=[SPEC.dim],
        maxnum_catfeature_query_per_table_per_sample=[1],
        default_value_for_each_table=[float(DELETED)],
    )


def _look_up(session: LookupSession) -> tuple[Rows, bool]:
    found = np.zeros(1, np.bool_)
    return session.lookup(SPEC.name, KEY, found=found), bool(found[0])
