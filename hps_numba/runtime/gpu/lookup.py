"""Lookups through a GPU cache: query, then what it lacks, from the tiers below.

::

    caller's stream  | query |       | scatter 0 |          | scatter 1 |
    lane's side stream       | copy 0 |  insert 0 | copy 1 |    insert 1 |
    host               (wait)| fetch 0 | fetch 1 ...

One launch a group of tables finds every hit. Where all hit, the host waits for nothing
but the number of misses. Unique missing keys go down the hierarchy in chunks; their
rows come back through two blocks of pinned memory in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from typing import Any

from hps_numba.kernels.cuda.interchange import device_of_stream, n_devices
from hps_numba.kernels.cuda.launch import stream_handle
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.gpu.arrays import THREAD_STREAM
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.deferred import DeferredInsert
from hps_numba.runtime.gpu.errors import device_errors
from hps_numba.runtime.gpu.lane import Lane
from hps_numba.runtime.gpu.misses import Misses, Missing
from hps_numba.runtime.gpu.prepared import PreparedLookup
from hps_numba.runtime.gpu.requests import GroupQuery, Part
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.runtime.session import Asked, ServedModel


class GpuPath:
    """Lookups of one model in the cache of one device. Thread-safe.

    Parameters
    ----------
    model
        The model.
    cache
        Its cache on the device.
    pipeline
        Fetches what the cache lacks.
    deferred
        Queue for keys that are to be fetched when their lookup is over.
    """

    def __init__(
        self,
        model: ServedModel,
        cache: GpuCache,
        pipeline: Pipeline,
        deferred: BackfillQueue,
    ) -> None:
        self._model = model
        self._cache = cache
        self._pipeline = pipeline
        self._deferred = deferred
        self._threshold = model.params.hit_rate_threshold
        self._errors = device_errors(f"model {model.name!r}")

    def run(self, asked: Sequence[Asked], stream: Any) -> list[Any]:
        """Return the rows of each table's keys; see ``LookupSession.lookup``."""
        begin_ns = perf_counter_ns()
        cache = self._cache
        handle = stream if isinstance(stream, int) else stream_handle(stream)
        if handle > THREAD_STREAM and n_devices() > 1:
            self._check_stream(handle)
        with self._errors:
            parts = [
                Part(
                    one,
                    cache.tables[one.table.spec.tag],
                    cache.gpu,
                    handle,
                    on_device=stream is not None,
                )
                for one in asked
            ]
            on_host = not any(part.on_device for part in parts)
            lane = cache.lanes.take()
            try:
                queries = GroupQuery.of(parts, cache, lane)
                self._run(queries, lane, lane.stream if on_host else handle)
            finally:
                cache.lanes.give_back(lane)
        for part in parts:
            part.count(perf_counter_ns() - begin_ns)
            if stream is not handle and hasattr(part.result, "keep"):
                part.result.keep(stream)
        return [part.result for part in parts]

    def prepare(self, sizes: Mapping[str, int]) -> PreparedLookup:
        """Return a lookup of fixed sizes; see ``LookupSession.prepare``."""
        tables = {name: self._model.table(name) for name in sizes}
        gate = self._model.gate
        return PreparedLookup(self._cache, tables, sizes, self._pipeline, gate)

    def _check_stream(self, stream: int) -> None:
        """Refuse a stream of another device, whose kernels cannot reach the cache."""
        ordinal, mine = device_of_stream(stream), self._cache.gpu.ordinal
        if ordinal not in (None, mine):
            raise ValueError(
                f"model {self._model.name!r}: the stream is of device {ordinal}, the "
                f"session of {mine}"
            )

    def _run(self, queries: list[GroupQuery], lane: Lane, stream: int) -> None:
        lane.begin(stream)
        try:
            for query in queries:
                query.send(stream)
                query.launch(stream, self._threshold)
                query.read_results(stream)
            self._cache.gpu.wait(stream)
            missing = [m for query in queries for m in query.missing()]
            if missing:
                self._resolve(missing, lane, stream)
            for query in queries:
                query.finish(stream)
        except BaseException:
            lane.rest(stream)  # before others use it
            for query in queries:
                query.count_error()
            raise

    def _resolve(self, missing: list[Missing], lane: Lane, stream: int) -> None:
        """Fetch missing keys, now or when the lookup is over."""
        for one in missing:
            one.read_keys(stream)
        self._cache.gpu.wait(stream)
        now = []
        for one in missing:
            if one.hit_rate >= self._threshold:
                self._deferred.put(
                    DeferredInsert(one.cache, one.table, one.keys.copy())
                )
                one.defer()
            else:
                now.append(one)
        if now:
            misses = Misses(self._cache, lane, now, stream)
            self._pipeline.run(misses.work, misses)
            lane.end(stream)
        for one in missing:
            one.mark_found(stream)
