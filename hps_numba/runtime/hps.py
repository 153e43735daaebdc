"""The server object: models, their tiers, and everything that may be done to them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import ClosedError, ConfigError, HPSError, UnknownTableError
from hps_numba.runtime.arrays import as_keys, as_rows, newest_of_each
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.estimate import Estimate, estimate, host_shares
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.loading import LoadProgress, Source, load_table
from hps_numba.runtime.pipeline import Observer, Pipeline
from hps_numba.runtime.session import LookupSession, ServedModel
from hps_numba.runtime.stats import ServerStats
from hps_numba.runtime.stores import open_stores
from hps_numba.tiers.base import Tier
from hps_numba.tiers.model_files import open_model_directory
from hps_numba.types import Keys, Mask, TableSpec

logger = logging.getLogger(__name__)


class HPS:
    """An embedding parameter server in this process.

    Parameters
    ----------
    ps_config
        The configuration.
    hps_json_config_file
        Path of a ps.json to read instead.
    force_reload
        Load every model directory, even one whose rows are stored already. Undoes
        updates.
    progress
        Called with what is being done, rows done and rows in all.
    wrap_tier
        Called with each tier; returns the tier to use, such as a wrapper that logs,
        delays or fails.

    Raises
    ------
    ConfigError
        If the configuration cannot be served here.
    ModelFileError
        If a model directory is missing or refused.
    TierError
        If a tier cannot be opened.

    Notes
    -----
    The constructor returns when every table is loaded. All methods may be called from
    several threads at once. ``close`` waits for the calls that are under way; calls
    that come later raise ``ClosedError``.
    """

    def __init__(
        self,
        ps_config: ParameterServerConfig | None = None,
        *,
        hps_json_config_file: str | os.PathLike[str] | None = None,
        force_reload: bool = False,
        progress: LoadProgress | None = None,
        wrap_tier: Callable[[Tier], Tier] | None = None,
    ) -> None:
        self._config = _one_config(ps_config, hps_json_config_file)
        self._changing = threading.Lock()  # one change of the set of models at a time
        self._lock = threading.Lock()
        self._models: dict[str, ServedModel] = {}  # written under _lock
        self._params: dict[str, InferenceParams] = {}  # guarded by _lock
        self._sessions: dict[tuple[str, int], LookupSession] = {}  # under _lock
        self._grants: dict[str, int] = {}  # host bytes by tag, guarded by _changing
        self._gate = Gate("server", _closed)
        self._progress = progress
        _warn_of_gpu_caches(self._config)
        budget = self._config.volatile_db.max_bytes
        shares = host_shares(self._config, self._config.models, budget)
        self._stores = open_stores(self._config, wrap_tier)
        self._backfills = BackfillQueue(self._config.backfill_queue_bytes)
        self._workers = ThreadPoolExecutor(
            max(m.thread_pool_size for m in self._config.models),
            thread_name_prefix="hps-lookup",
        )
        self._pipeline = Pipeline(self._workers)
        try:
            for params in self._config.models:
                self._serve(params, shares, force_reload)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_json(
        cls,
        path: str | os.PathLike[str],
        *,
        strict: bool = True,
        force_reload: bool = False,
        progress: LoadProgress | None = None,
    ) -> HPS:
        """Return a server for a ps.json; unknown keys are errors if ``strict``."""
        config = ParameterServerConfig.from_json(path, strict=strict)
        return cls(config, force_reload=force_reload, progress=progress)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that are served."""
        return tuple(self._models)

    def lookup(
        self,
        keys: ArrayLike,
        model_name: str,
        table_id: int | str = 0,
        device_id: int = 0,
        *,
        out: NDArray[Any] | None = None,
        found: Mask | None = None,
    ) -> NDArray[Any]:
        """Return the rows of keys, with HugeCTR's signature.

        See ``LookupSession.lookup``; ``table_id`` is a position or a name.
        """
        session = self._sessions.get((model_name, device_id))
        if session is None:
            session = self.session(model_name, device_id)
        return session.lookup(table_id, keys, out=out, found=found)

    def session(
        self, model: str, device: int = 0, *, observer: Observer | None = None
    ) -> LookupSession:
        """Return the session of a model on a device.

        Parameters
        ----------
        model
            A model that is served.
        device
            One of the model's ``deployed_device_list``.
        observer
            Told when each stage of each chunk of a lookup began and ended.

        Raises
        ------
        UnknownTableError
            If there is no such model, or it is not deployed to the device.
        """
        with self._gate, self._lock:
            served = self._model(model)
            devices = self._params[model].deployed_devices
            if device not in devices:
                raise UnknownTableError(
                    f"model {model!r} is not deployed to device {device}; "
                    f"deployed_device_list is {list(devices)}"
                )
            if observer is not None:
                return self._new_session(served, Pipeline(self._workers, observer))
            return self._sessions.setdefault(
                (model, device), self._new_session(served, self._pipeline)
            )

    def update(
        self, model: str, table: int | str, keys: ArrayLike, rows: ArrayLike
    ) -> None:
        """Store new rows of keys in every tier.

        When it returns, every lookup that begins sees the new rows or newer ones, and
        they are in the persistent database if there is one.

        Parameters
        ----------
        model, table
            The table.
        keys
            Integers (n,). Of a key that repeats the last row counts.
        rows
            (n, dim). NaN and infinity are stored and counted.

        Raises
        ------
        UpdateError
            If a tier cannot be written; says how many keys were.
        TypeError, ValueError
            If keys or rows do not fit; nothing is written then.
        """
        with self._writing(model, table) as hierarchy:
            flat = _one_dimensional(as_keys(keys, hierarchy.spec), hierarchy.spec)
            given = as_rows(rows, flat.size, hierarchy.spec)
            hierarchy.update(*newest_of_each(flat, given))

    def delete(self, model: str, table: int | str, keys: ArrayLike) -> None:
        """Remove keys (n,) from every tier; later lookups get the default row.

        Raises as ``update``.
        """
        with self._writing(model, table) as hierarchy:
            flat = _one_dimensional(as_keys(keys, hierarchy.spec), hierarchy.spec)
            hierarchy.delete(np.unique(flat))

    def refresh(self, model: str | None = None, table: int | str | None = None) -> int:
        """Read rows that upper tiers hold again from the persistent database.

        For a database that was changed beneath this server; its own updates need none.

        Returns
        -------
        int
            Number of rows written to upper tiers.
        """
        names = self.models if model is None else (model,)
        refreshed = 0
        for name in names:
            served = self._model(name)
            with served.gate:
                tables = served.tables if table is None else (served.table(table),)
                step = self._config.volatile_db.max_batch_size
                refreshed += sum(t.refresh(step) for t in tables)
        return refreshed

    def add_model(self, params: InferenceParams, *, force_reload: bool = False) -> None:
        """Serve one more model; returns when its tables are loaded.

        Raises
        ------
        ConfigError
            If a model of this name is served, or the host budget has no room left.
        """
        with self._gate, self._changing:
            with self._lock:
                if params.model_name in self._models:
                    raise ConfigError(
                        f"model {params.model_name!r} is served already; use reload() "
                        f"for new files, or remove_model() first"
                    )
            budget = self._config.volatile_db.max_bytes
            if budget is not None:
                budget -= sum(self._grants.values())
            shares = host_shares(self._config, (params,), budget)
            self._serve(params, shares, force_reload)

    def remove_model(self, name: str, *, drop_tables: bool = False) -> None:
        """Stop serving a model and free its host memory.

        Parameters
        ----------
        name
            The model. Its lookups that are under way end first.
        drop_tables
            Remove its tables from the persistent database, too.
        """
        with self._gate, self._changing:
            with self._lock:
                served = self._model(name)
                del self._models[name], self._params[name]
                for key in [k for k in self._sessions if k[0] == name]:
                    del self._sessions[key]
            served.gate.close(lambda: _unknown_model(name, self.models, removed=True))
            self._release(served, drop_tables=drop_tables)

    def reload(self, name: str, *, force: bool = False) -> bool:
        """Load a model's directories again if their contents changed.

        Lookups go on meanwhile and see old rows or new ones.

        Returns
        -------
        bool
            Whether any table was loaded.
        """
        served = self._model(name)
        with served.gate, self._changing:
            sources = _sources(self._params[name])
            n_loaded = sum(
                load_table(
                    table, self._stores, source, force=force, progress=self._progress
                )
                for table, source in zip(served.tables, sources, strict=True)
            )
            return n_loaded > 0

    def locate(self, model: str, table: int | str, keys: ArrayLike) -> list[str]:
        """Return the name of the tier that each key (n,) would be read from now."""
        served = self._model(model)
        with served.gate:
            hierarchy = served.table(table)
            return hierarchy.locate(as_keys(keys, hierarchy.spec).reshape(-1))

    def estimate(self) -> Estimate:
        """Return the bytes that the configuration takes; see ``estimate``."""
        return estimate(self._config)

    def stats(self) -> ServerStats:
        """Return counters of every table, since it was opened."""
        with self._gate:
            models = list(self._models.values())
            return ServerStats(
                tables=tuple(t.stats() for served in models for t in served.tables),
                backfill=self._backfills.stats(),
            )

    def drain(self) -> None:
        """Wait until every row that lookups found is backfilled or dropped."""
        self._backfills.drain()

    def close(self) -> None:
        """End all work and close the tiers; the second call does nothing."""
        self._gate.close()
        for served in list(self._models.values()):
            served.gate.close(_closed)
        self._workers.shutdown()
        self._backfills.close()
        for tier in self._stores.tiers:
            tier.close()

    def __enter__(self) -> HPS:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(
        self, params: InferenceParams, shares: dict[str, int | None], force: bool
    ) -> None:
        """Open and load a model's tables, then let lookups in."""
        served = ServedModel(
            params.model_name,
            tuple(self._hierarchy(spec, shares[spec.tag]) for spec in params.tables()),
            Gate(params.model_name, _closed),
        )
        try:
            for table, source in zip(served.tables, _sources(params), strict=True):
                load_table(
                    table, self._stores, source, force=force, progress=self._progress
                )
        except BaseException:
            self._release(served, drop_tables=False)
            raise
        with self._lock:
            self._models[params.model_name] = served
            self._params[params.model_name] = params

    def _hierarchy(self, spec: TableSpec, max_bytes: int | None) -> Hierarchy:
        for tier in self._stores.tiers:
            tier.open_table(spec, max_bytes=max_bytes)
        self._grants[spec.tag] = max_bytes or 0
        config = self._config
        fills = config.volatile_db.cache_missed_embeddings
        return Hierarchy(
            spec,
            self._stores.tiers,
            backfills=self._backfills if fills else None,
            on_failure=config.on_tier_failure,
            write_rows=min(
                config.volatile_db.max_batch_size, config.persistent_db.max_batch_size
            ),
        )

    def _release(self, served: ServedModel, *, drop_tables: bool) -> None:
        for table in served.tables:
            self._grants.pop(table.spec.tag, None)
            for tier in self._stores.tiers:
                if tier is self._stores.volatile or drop_tables:
                    tier.drop_table(table.spec.tag)

    @contextmanager
    def _writing(self, model: str, table: int | str) -> Iterator[Hierarchy]:
        served = self._model(model)
        with served.gate:
            yield served.table(table)

    def _model(self, name: str) -> ServedModel:
        served = self._models.get(name)
        if served is None:
            with self._gate:
                raise _unknown_model(name, self.models)
        return served

    def _new_session(self, served: ServedModel, pipeline: Pipeline) -> LookupSession:
        return LookupSession(served, pipeline, self._config.volatile_db.max_batch_size)


def _one_config(
    config: ParameterServerConfig | None, path: str | os.PathLike[str] | None
) -> ParameterServerConfig:
    if (config is None) == (path is None):
        raise TypeError("pass either ps_config or hps_json_config_file")
    if path is not None:
        return ParameterServerConfig.from_json(path)
    assert config is not None
    return config


def _sources(params: InferenceParams) -> list[Source | None]:
    """Return where each table's rows come from; checks the sizes of the files."""
    specs = params.tables()
    if not params.sparse_model_files:
        return [None] * len(specs)
    return [
        Source(open_model_directory(path, spec.dim, table=spec.tag), params)
        for spec, path in zip(specs, params.sparse_model_files, strict=True)
    ]


def _one_dimensional(keys: Keys, spec: TableSpec) -> Keys:
    if keys.ndim != 1:
        raise ValueError(
            f"table {spec.tag}: keys of a write have one dimension; got {keys.shape}"
        )
    return keys


def _closed() -> HPSError:
    return ClosedError("the server is closed")


def _unknown_model(
    name: str, served: tuple[str, ...], *, removed: bool = False
) -> HPSError:
    what = "was removed" if removed else "is not served"
    return UnknownTableError(
        f"model {name!r} {what}; served are {', '.join(served) or 'none'}"
    )


def _warn_of_gpu_caches(config: ParameterServerConfig) -> None:
    cached = [m.model_name for m in config.models if m.use_gpu_embedding_cache]
    if cached:
        logger.warning(
            "models=%s gpucache=true: no GPU cache is available; rows are served from "
            "host memory and the tiers below it",
            ",".join(cached),
        )
