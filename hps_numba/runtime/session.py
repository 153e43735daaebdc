"""Lookups of one model on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.config import InferenceParams
from hps_numba.errors import UnknownTableError
from hps_numba.runtime.arrays import as_flags, as_keys, as_output, check_length
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.hierarchy import Chunk, Hierarchy
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.types import Mask, Rows

Array = NDArray[Any]


@dataclass(frozen=True)
class ServedModel:
    """A model that is being served."""

    params: InferenceParams
    tables: tuple[Hierarchy, ...]
    gate: Gate
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


@dataclass
class _Request:
    """One table of one lookup."""

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
    released while rows are copied. What a lookup returns is the caller's own.
    """

    def __init__(self, model: ServedModel, pipeline: Pipeline, chunk_keys: int) -> None:
        self._model = model
        self._pipeline = pipeline
        self._chunk_keys = chunk_keys

    @overload
    def lookup(
        self,
        tables: int | str,
        keys: ArrayLike,
        *,
        out: Array | None = ...,
        found: Mask | None = ...,
    ) -> Array: ...

    @overload
    def lookup(
        self,
        tables: Mapping[str, ArrayLike],
        *,
        out: Mapping[str, Array] | None = ...,
        found: Mapping[str, Mask] | None = ...,
    ) -> dict[str, Array]: ...

    def lookup(
        self,
        tables: int | str | Mapping[str, ArrayLike],
        keys: ArrayLike | None = None,
        *,
        out: Any = None,
        found: Any = None,
    ) -> Array | dict[str, Array]:
        """Return the rows of keys, of one table or of several at once.

        Parameters
        ----------
        tables
            A table's name or position, or a mapping from names to keys.
        keys
            Integers of any dtype and shape S; None with a mapping.
        out
            float32 (or the table's stored dtype) of shape S + (dim,), contiguous; with
            a mapping, a mapping from some or all of its names.
        found
            bool of shape S: set to whether any tier knew the key; a mapping likewise.

        Returns
        -------
        array or dict of arrays
            float32 of shape S + (dim,), or ``out``. Keys that no tier knows get the
            table's default row.

        Raises
        ------
        UnknownTableError
            If the model has no such table.
        TypeError, ValueError
            If keys, ``out`` or ``found`` do not fit; nothing is written then.
        TierUnavailableError
            If a tier fails and ``on_tier_failure`` is ``raise``.
        ClosedError
            If the server is closed.
        """
        with self._model.gate:
            if isinstance(tables, Mapping):
                if keys is not None:
                    raise TypeError("keys go into the mapping of tables, not beside it")
                outs, flags = ({} if a is None else a for a in (out, found))
                _check_names(tables, outs, flags)
                requests = {
                    name: self._request(name, asked, outs.get(name), flags.get(name))
                    for name, asked in tables.items()
                }
                self._run(list(requests.values()))
                return {name: request.out for name, request in requests.items()}
            if keys is None:
                raise TypeError("keys are missing; pass them beside the table's name")
            request = self._request(tables, keys, out, found)
            self._run([request])
            return request.out

    def _request(
        self, table: int | str, keys: ArrayLike, out: Array | None, found: Mask | None
    ) -> _Request:
        hierarchy = self._model.table(table)
        spec = hierarchy.spec
        given = as_keys(keys, spec)
        check_length(given, spec)
        result = as_output(out, given.shape, spec)
        flags = as_flags(found, given.shape, spec)
        flat_keys, flat_found = given.reshape(-1), flags.reshape(-1)
        if result.dtype == spec.numpy_dtype:
            rows = result.reshape(-1, spec.dim)
        else:
            rows = np.empty((flat_keys.size, spec.dim), spec.numpy_dtype)
        step = self._chunk_keys
        if flat_keys.size <= step:
            chunks = [Chunk(flat_keys, rows, flat_found)] if flat_keys.size else []
            return _Request(hierarchy, result, flags, chunks, rows)
        chunks = [
            Chunk(
                flat_keys[low : low + step],
                rows[low : low + step],
                flat_found[low : low + step],
            )
            for low in range(0, flat_keys.size, step)
        ]
        return _Request(hierarchy, result, flags, chunks, rows)

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
