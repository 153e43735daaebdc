"""Lookups of a fixed number of keys, whose launch may be part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np

from hps_numba.errors import ClosedError
from hps_numba.kernels.cuda.launch import CudaStream, stream_handle
from hps_numba.runtime.arrays import check_length
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.errors import device_errors
from hps_numba.runtime.gpu.misses import Misses, Missing
from hps_numba.runtime.gpu.new_arrays import new_array
from hps_numba.runtime.gpu.requests import GroupQuery, Part
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.runtime.session import Asked

_DEFAULT_STREAM = 0


class PreparedLookup:
    """A lookup in buffers of its own; made by ``LookupSession.prepare``.

    Write keys into ``keys``, ``launch``, and read ``rows``, all on one stream. The
    launch neither allocates nor waits and so may be captured into a CUDA graph, whose
    replays look up what ``keys`` hold then. Rows of keys that the cache lacks are
    default rows until ``complete`` has brought them.

    Attributes
    ----------
    keys
        By table: int64 (n,) on the device, to be filled before a launch.
    rows
        By table: float32 (n, dim) on the device.

    Notes
    -----
    For one launch at a time; not thread-safe. A graph must not be replayed once the
    lookup, its model or the server is closed: its memory is gone then.
    """

    def __init__(
        self,
        cache: GpuCache,
        tables: Mapping[str, Hierarchy],
        sizes: Mapping[str, int],
        pipeline: Pipeline,
        gate: Gate,
    ) -> None:
        _check(tables, sizes)
        self._cache, self._pipeline, self._gate = cache, pipeline, gate
        self._closed = False
        self.keys: dict[str, Any] = dict.fromkeys(sizes)
        self.rows: dict[str, Any] = dict.fromkeys(sizes)
        self._queries: list[GroupQuery] = []
        members = [
            [name for name, table in tables.items() if table.spec.tag in group.tags]
            for group in cache.groups
        ]
        with device_errors(f"a prepared lookup on device {cache.gpu.ordinal}"):
            self._lane = cache.new_lane([sum(sizes[n] for n in m) for m in members])
            try:
                for i, names in enumerate(members):
                    if names:
                        self._add(i, {n: (tables[n], sizes[n]) for n in names})
                cache.gpu.wait(_DEFAULT_STREAM)
            except BaseException:
                self._lane.close()
                raise

    def launch(self, stream: CudaStream | int | None = None) -> None:
        """Look up what ``keys`` hold.

        Parameters
        ----------
        stream
            Where the launch is queued; the device's default stream if None.

        Raises
        ------
        ClosedError
            If the lookup or its model was closed.
        DeviceError
            If the device refuses the launch.
        """
        handle = self._handle(stream)
        with self._gate, device_errors("a prepared lookup"):
            for query in self._queries:
                query.launch(handle, threshold=0.0)

    def complete(self, stream: CudaStream | int | None = None) -> int:
        """Bring the rows that the last launch lacked, and insert them.

        Parameters
        ----------
        stream
            That of the launch, or of the graph's replay. The call waits for it.

        Returns
        -------
        int
            How many unique keys were missing. If it is 0, ``rows`` are as they were.

        Raises
        ------
        TierUnavailableError
            If a tier fails and ``on_tier_failure`` is ``raise``.
        DeviceError
            If the device failed.
        ClosedError
            If the lookup or its model was closed.
        """
        begin_ns, handle = perf_counter_ns(), self._handle(stream)
        with self._gate, device_errors("a prepared lookup"):
            for query in self._queries:
                query.read_results(handle)
            self._cache.gpu.wait(handle)
            parts = [part for query in self._queries for part in query.parts]
            for part in parts:
                part.begin()
            missing = [one for query in self._queries for one in query.missing()]
            try:
                self._bring(missing, handle)
            except BaseException:
                for query in self._queries:
                    query.count_error()
                raise
            finally:
                self._lane.rest(handle)
        for part in parts:
            part.count(perf_counter_ns() - begin_ns)
        return sum(one.n_unique for one in missing)

    def close(self) -> None:
        """Give the buffers back; the second call does nothing. ``rows`` stay valid."""
        if not self._closed:
            self._closed = True
            self._lane.close()

    def __enter__(self) -> PreparedLookup:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, group: int, members: dict[str, tuple[Hierarchy, int]]) -> None:
        """Add a group's query, whose tables' keys follow each other in memory."""
        # Arrays that callers keep are of a stream that is still there without the lane.
        cache, stream, start = self._cache, _DEFAULT_STREAM, 0
        ordered = sorted(
            members.items(), key=lambda item: cache.tables[item[1][0].spec.tag].index
        )
        total = sum(n for _, n in members.values())
        flat, address = new_array((total,), np.int64, gpu=cache.gpu, stream=stream)
        parts = []
        for name, (table, n) in ordered:
            self.keys[name] = flat[start : start + n]
            start += n
            asked = Asked(table, self.keys[name])
            found = cache.tables[table.spec.tag]
            parts.append(Part(asked, found, cache.gpu, stream, on_device=True))
        query = GroupQuery(
            cache.groups[group], self._lane.groups[group], parts, cache.gpu
        )
        query.use_keys(address, stream)
        query.make_room(stream)
        query.finish(stream)
        self._queries.append(query)
        for (name, _), part in zip(ordered, parts, strict=True):
            self.rows[name] = part.result

    def _bring(self, missing: list[Missing], stream: int) -> None:
        if not missing:
            return
        for one in missing:
            one.read_keys(stream)
        self._cache.gpu.wait(stream)
        misses = Misses(self._cache, self._lane, missing, stream)
        self._pipeline.run(misses.work, misses)
        for one in missing:
            one.mark_found(stream)

    def _handle(self, stream: CudaStream | int | None) -> int:
        if self._closed:
            raise ClosedError("the prepared lookup is closed")
        return stream if isinstance(stream, int) else stream_handle(stream)


def _check(tables: Mapping[str, Hierarchy], sizes: Mapping[str, int]) -> None:
    """Refuse sizes that do not fit before any memory is taken."""
    seen = set()
    for name, table in tables.items():
        spec, n_keys = table.spec, sizes[name]
        if not isinstance(n_keys, (int, np.integer)):
            raise TypeError(f"table {spec.tag}: {n_keys!r} is no number of keys")
        if n_keys < 0:
            raise ValueError(f"table {spec.tag}: a lookup of {n_keys} keys")
        check_length(int(n_keys), spec)
        if spec.tag in seen:
            raise ValueError(f"table {spec.tag} is asked for twice")
        seen.add(spec.tag)
