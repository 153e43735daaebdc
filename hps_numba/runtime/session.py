"""Lookups of one model on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.config import InferenceParams
from hps_numba.errors import DeviceError, UnknownTableError
from hps_numba.runtime.arrays import as_flags, as_keys, as_output, check_length
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.types import Mask, Rows

if TYPE_CHECKING:
    from hps_numba.runtime.gpu.cache import GpuCache
    from hps_numba.runtime.gpu.refreshing import Refresher

Array = NDArray[Any]


@dataclass(frozen=True)
class ServedModel:
    """A model that is being served."""

    params: InferenceParams
    tables: tuple[Hierarchy, ...]
    gate: Gate
    caches: dict[int, GpuCache] = field(default_factory=dict)  # by device
    refreshers: list[Refresher] = field(default_factory=list)
    sessions: dict[int, LookupSession] = field(default_factory=dict)  # by device

    @property
    def name(self) -> str:
        """The model's name."""
        return self.params.model_name

    def table(self, table: int | str) -> Hierarchy:
        """Return a table by position or name."""
        if isinstance(table, str):
            for candidate in self.tables:
                if candidate.spec.name == table:
                    return candidate
        elif isinstance(table, (int, np.integer)) and 0 <= table < len(self.tables):
            return self.tables[table]
        names = ", ".join(f"{i}: {t.spec.name}" for i, t in enumerate(self.tables))
        raise UnknownTableError(
            f"model {self.name!r} has no table {table!r}; it has {names}"
        )


@dataclass(slots=True)  # frozen ones take longer to make
class Asked:
    """One table of one lookup, as the caller gave it."""

    table: Hierarchy
    keys: Any
    out: Any = None
    found: Mask | None = None


class LookupPath(Protocol):
    """Where the lookups of a session go."""

    def run(self, asked: Sequence[Asked], stream: Any) -> list[Any]:
        """Return the rows of each table's keys; see ``LookupSession.lookup``."""

    def prepare(self, sizes: Mapping[str, int]) -> Any:
        """Return a lookup of fixed sizes; see ``LookupSession.prepare``."""


@dataclass
class _Request:
    """One table of one lookup, checked."""

    table: Hierarchy
    out: Array
    found: Mask
    chunks: list[Chunk]
    rows: Rows  # what chunks write to: out, or a buffer in the stored dtype


class LookupSession:
    """Looks rows of one model up; made by ``HPS.session``.

    Notes
    -----
    Thread-safe: a session holds no buffers, so threads may share one. The GIL is
    released while rows are copied and while a device is waited for. What a lookup
    returns is the caller's own.
    """

    def __init__(self, model: ServedModel, path: LookupPath) -> None:
        self._model = model
        self._path = path

    @overload
    def lookup(
        self,
        tables: int | str,
        keys: ArrayLike,
        *,
        out: Any = ...,
        found: Mask | None = ...,
        stream: Any = ...,
    ) -> Any: ...

    @overload
    def lookup(
        self,
        tables: Mapping[str, ArrayLike],
        *,
        out: Mapping[str, Any] | None = ...,
        found: Mapping[str, Mask] | None = ...,
        stream: Any = ...,
    ) -> dict[str, Any]: ...

    def lookup(
        self,
        tables: int | str | Mapping[str, ArrayLike],
        keys: ArrayLike | None = None,
        *,
        out: Any = None,
        found: Any = None,
        stream: Any = None,
    ) -> Any:
        """Return the rows of keys, of one table or of several at once.

        Parameters
        ----------
        tables
            A table's name or position, or a mapping from names to keys.
        keys
            Integers of any dtype and shape S; None with a mapping. With a GPU cache
            also int64 or uint64 on the session's device: an array with DLPack or
            ``__cuda_array_interface__``.
        out
            float32 (or the table's stored dtype) of shape S + (dim,), contiguous; with
            a mapping, a mapping from some or all of its names. On the device if the
            result is.
        found
            NumPy bool of shape S: set to whether the key was known, to the cache or to
            a tier; a mapping likewise.
        stream
            CUDA stream that the result is for: anything with ``__cuda_stream__``, or a
            handle. The device's default stream if None.

        Returns
        -------
        array or dict of arrays
            float32 of shape S + (dim,), or ``out``: a NumPy array for keys of the host
            without ``stream``; else an array on the device, valid in the order of the
            stream, of CuPy if that is installed. Keys that no tier knows get the
            table's default row; so do, at or above ``hit_rate_threshold``, keys that
            the cache lacks.

        Raises
        ------
        UnknownTableError
            If the model has no such table.
        TypeError, ValueError
            If keys, ``out`` or ``found`` do not fit; nothing is written then.
        TierUnavailableError
            If a tier fails and ``on_tier_failure`` is ``raise``.
        DeviceError
            If the device refuses the work.
        ClosedError
            If the server is closed.
        """
        with self._model.gate:
            # Asked for first: it takes longer to tell that something is no mapping.
            if isinstance(tables, str) or not isinstance(tables, Mapping):
                if keys is None:
                    raise TypeError(
                        "keys are missing; pass them beside the table's name"
                    )
                asked = Asked(self._model.table(tables), keys, out, found)
                return self._path.run([asked], stream)[0]
            if keys is not None:
                raise TypeError("keys go into the mapping of tables, not beside it")
            outs, flags = ({} if a is None else a for a in (out, found))
            _check_names(tables, outs, flags)
            every = [
                Asked(self._model.table(name), given, outs.get(name), flags.get(name))
                for name, given in tables.items()
            ]
            return dict(zip(tables, self._path.run(every, stream), strict=True))

    def prepare(self, sizes: Mapping[str, int]) -> Any:
        """Return a lookup of a fixed number of keys a table, in buffers of its own.

        Its launch neither allocates nor waits, so that it may be part of a CUDA graph;
        see ``hps_numba.runtime.gpu.prepared.PreparedLookup``.

        Parameters
        ----------
        sizes
            Number of keys by table.

        Raises
        ------
        UnknownTableError
            If the model has no such table.
        TypeError, ValueError
            If a size is no number of keys that a lookup of the table may have, or a
            table has two.
        DeviceError
            If the session has no GPU cache, or the device too little memory.
        """
        with self._model.gate:
            return self._path.prepare(sizes)


class HostPath:
    """Lookups in host memory and the tiers below it. Thread-safe.

    Parameters
    ----------
    model
        Name of the model, for messages.
    pipeline
        Runs the chunks.
    chunk_keys
        Keys of a chunk.
    """

    def __init__(self, model: str, pipeline: Pipeline, chunk_keys: int) -> None:
        self._model = model
        self._pipeline = pipeline
        self._chunk_keys = chunk_keys

    def run(self, asked: Sequence[Asked], stream: Any) -> list[Any]:
        """Return rows as NumPy arrays; see ``LookupSession.lookup``."""
        if stream is not None:
            raise TypeError(
                f"model {self._model!r} has no GPU cache here, so its lookups have "
                f"no stream; set gpucache to true where there is a GPU"
            )
        requests = [self._request(one) for one in asked]
        self._run(requests)
        return [request.out for request in requests]

    def prepare(self, sizes: Mapping[str, int]) -> Any:
        """Refuse: there is no device."""
        raise DeviceError(
            f"model {self._model!r} has no GPU cache here; prepared lookups need one"
        )

    def _request(self, asked: Asked) -> _Request:
        spec = asked.table.spec
        given = as_keys(asked.keys, spec)
        check_length(given.size, spec)
        result = as_output(asked.out, given.shape, spec)
        flags = as_flags(asked.found, given.shape, spec)
        flat_keys, flat_found = given.reshape(-1), flags.reshape(-1)
        if result.dtype == spec.numpy_dtype:
            rows = result.reshape(-1, spec.dim)
        else:
            rows = np.empty((flat_keys.size, spec.dim), spec.numpy_dtype)
        step = self._chunk_keys
        if flat_keys.size <= step:
            chunks = [Chunk(flat_keys, rows, flat_found)] if flat_keys.size else []
            return _Request(asked.table, result, flags, chunks, rows)
        chunks = [
            Chunk(
                flat_keys[low : low + step],
                rows[low : low + step],
                flat_found[low : low + step],
            )
            for low in range(0, flat_keys.size, step)
        ]
        return _Request(asked.table, result, flags, chunks, rows)

    def _run(self, requests: list[_Request]) -> None:
        begin_ns = perf_counter_ns()
        for request in requests:
            request.found.fill(False)
        try:
            self._pipeline.run([(r.table, c) for r in requests for c in r.chunks])
        except BaseException:
            for request in requests:
                request.table.counters.add(errors=1)
            raise
        for request in requests:
            _finish(request, begin_ns)


def _check_names(asked: Mapping[str, Any], *given: Mapping[str, Any]) -> None:
    for names in given:
        if not isinstance(names, Mapping):
            raise TypeError(
                f"out and found of several tables are mappings; got "
                f"{type(names).__name__}"
            )
        for name in names:
            if name not in asked:
                raise ValueError(
                    f"out and found name tables of this lookup; got {name!r}, "
                    f"but keys of {', '.join(asked) or 'none'}"
                )


def _finish(request: _Request, begin_ns: int) -> None:
    """Write default rows, convert to the caller's dtype, and count."""
    n_keys = request.rows.shape[0]
    n_defaults = n_keys - sum(chunk.resolved for chunk in request.chunks)
    if n_defaults:
        request.rows[~request.found.reshape(-1)] = request.table.spec.default_value
    if request.out.dtype != request.rows.dtype:
        request.out[...] = request.rows.reshape(request.out.shape)
    counters = request.table.counters
    joined = sum(chunk.joined for chunk in request.chunks)
    degraded = any(chunk.degraded for chunk in request.chunks)
    if joined or degraded:
        counters.add(joined=joined, degraded=int(degraded))
    counters.add_lookup(n_keys, n_defaults, perf_counter_ns() - begin_ns)
