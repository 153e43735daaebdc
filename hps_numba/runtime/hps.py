"""The server object: models, their tiers, and everything that may be done to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import ConfigError, UnknownTableError
from hps_numba.runtime.arrays import as_keys, as_rows, newest_of_each
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.estimate import Estimate, estimate
from hps_numba.runtime.gate import Gate
from hps_numba.runtime.gpus import Gpus
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.loading import LoadProgress
from hps_numba.runtime.models import ModelSet, server_closed
from hps_numba.runtime.pipeline import Observer, Pipeline
from hps_numba.runtime.session import LookupSession
from hps_numba.runtime.stats import ServerStats, TableStats
from hps_numba.runtime.stores import open_stores
from hps_numba.runtime.updates.opening import open_updates
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Mask, TableSpec

if TYPE_CHECKING:
    from hps_numba.runtime.updates.control import Updates


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
        Called with what is being done, rows done and rows in all; calls no method of
        the server.
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
        self._gate = Gate("server", server_closed)
        estimate(self._config)  # refuses bad files before a store is opened
        self._stores = open_stores(self._config, wrap_tier)
        self._backfills = BackfillQueue(self._config.backfill_queue_bytes)
        self._workers = ThreadPoolExecutor(
            max(m.thread_pool_size for m in self._config.models),
            thread_name_prefix="hps-lookup",
        )
        self._pipeline = Pipeline(self._workers)
        self._gpus = Gpus(self._config)
        self._models = ModelSet(
            self._config, self._stores, self._backfills, self._gpus, progress=progress
        )
        self._updates: Updates | None = None
        try:
            self._models.add(self._config.models, force_reload=force_reload)
            self._updates = open_updates(
                self._config, self._stores, lambda: self._models.served, self._tag
            )
            if self._updates is not None:
                self._updates.start()
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
        return tuple(served.name for served in self._models.served)

    @property
    def updates(self) -> Updates:
        """The update streams: how far they are, to pause, to seek.

        Raises
        ------
        ConfigError
            If no ``update_source`` is configured.
        """
        if self._updates is None:
            raise ConfigError("update_source: no stream of updates is configured")
        return self._updates

    def lookup(
        self,
        keys: ArrayLike,
        model_name: str,
        table_id: int | str = 0,
        device_id: int = 0,
        *,
        out: Any = None,
        found: Mask | None = None,
    ) -> Any:
        """Return the rows of keys, with HugeCTR's signature.

        See ``LookupSession.lookup``; ``table_id`` is a position or a name.
        """
        session = self._models.session(model_name, device_id)
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
        with self._gate:
            served = self._models[model]
            devices = served.params.deployed_devices
            if device not in devices:
                raise UnknownTableError(
                    f"model {model!r} is not deployed to device {device}; "
                    f"deployed_device_list is {list(devices)}"
                )
            pipeline = self._pipeline
            if observer is not None:
                pipeline = Pipeline(self._workers, observer)
            path = self._gpus.path(served, device, pipeline)
            session = LookupSession(served, path)
            if observer is not None:
                return session
            return served.sessions.setdefault(device, session)

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
        with self._table(model, table) as hierarchy:
            flat = _one_dimensional(as_keys(keys, hierarchy.spec), hierarchy.spec)
            given = as_rows(rows, flat.size, hierarchy.spec)
            hierarchy.update(*newest_of_each(flat, given))

    def delete(self, model: str, table: int | str, keys: ArrayLike) -> None:
        """Remove keys (n,) from every tier; later lookups get the default row.

        Raises as ``update``.
        """
        with self._table(model, table) as hierarchy:
            flat = _one_dimensional(as_keys(keys, hierarchy.spec), hierarchy.spec)
            hierarchy.delete(np.unique(flat))

    def refresh(
        self,
        model: str | None = None,
        table: int | str | None = None,
        *,
        keys: ArrayLike | None = None,
    ) -> int:
        """Read rows that upper tiers and GPU caches hold again from below.

        For a database that was changed beneath this server; its own updates need none.
        A lookup that read a row before the change may still bring it to a cache after
        the refresh, unless ``keys`` names it.

        Parameters
        ----------
        model, table
            Which tables; all if None.
        keys
            The keys (n,) that changed, of one table; all that are held if None.

        Returns
        -------
        int
            Number of rows written to upper tiers and caches.

        Raises
        ------
        TierError
            If a tier fails.
        TypeError, ValueError
            If keys do not fit, or do not come with a model and a table.
        """
        if keys is not None:
            if model is None or table is None:
                raise TypeError("keys to refresh are of one model and one table")
            with self._table(model, table) as hierarchy:
                flat = _one_dimensional(as_keys(keys, hierarchy.spec), hierarchy.spec)
                return hierarchy.refresh_keys(np.unique(flat))
        with self._gate:
            asked = self._models.served if model is None else (self._models[model],)
        refreshed = 0
        for served in asked:
            with served.gate:
                tables = served.tables if table is None else (served.table(table),)
                refreshed += sum(self._models.refresh(served, t) for t in tables)
        return refreshed

    def add_model(self, params: InferenceParams, *, force_reload: bool = False) -> None:
        """Serve one more model; returns when its tables are loaded.

        Raises
        ------
        ConfigError
            If a model of this name is served, or the host budget has no room left.
        """
        with self._gate:
            self._models.add((params,), force_reload=force_reload)
        if self._updates is not None:
            self._updates.look_soon()

    def remove_model(self, name: str, *, drop_tables: bool = False) -> None:
        """Stop serving a model and free its host memory.

        Parameters
        ----------
        name
            The model. Its lookups that are under way end first.
        drop_tables
            Remove its tables from the persistent database, too.
        """
        with self._gate:
            self._models.remove(name, drop_tables=drop_tables)

    def reload(self, name: str, *, force: bool = False) -> bool:
        """Load a model's directories again if their contents changed.

        Lookups go on meanwhile and see old rows or new ones.

        Returns
        -------
        bool
            Whether any table was loaded.
        """
        with self._gate:
            return self._models.reload(name, force=force)

    def locate(self, model: str, table: int | str, keys: ArrayLike) -> list[str]:
        """Return the name of the tier that each key (n,) would be read from now."""
        with self._table(model, table) as hierarchy:
            return hierarchy.locate(as_keys(keys, hierarchy.spec).reshape(-1))

    def estimate(self) -> Estimate:
        """Return the bytes that the configuration takes; see ``estimate``."""
        return estimate(self._config)

    def stats(self) -> ServerStats:
        """Return counters of every table, since it was opened."""
        tables: list[TableStats] = []
        with self._gate:
            for served in self._models.served:
                # Unless it was removed meanwhile.
                with suppress(UnknownTableError), served.gate:
                    tables += [table.stats() for table in served.tables]
            return ServerStats(
                tables=tuple(tables),
                backfill=self._backfills.stats(),
                deferred=self._gpus.stats(),
                updates=self._updates.stats() if self._updates else None,
            )

    def drain(self) -> None:
        """Wait until all that lookups left to the background is done or dropped."""
        self._gpus.drain()
        self._backfills.drain()

    def close(self) -> None:
        """End all work and close the tiers; the second call does nothing."""
        self._gate.close()
        if self._updates is not None:
            self._updates.close()
        self._models.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._gpus.close()
        self._models.close_caches()
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

    def _tag(self, model: str, table: int | str) -> str:
        with self._gate:
            return self._models[model].table(table).spec.tag

    @contextmanager
    def _table(self, model: str, table: int | str) -> Iterator[Hierarchy]:
        """Enter a model's gate for one of its tables."""
        with self._gate:
            served = self._models[model]
        with served.gate:
            yield served.table(table)


def _one_config(
    config: ParameterServerConfig | None, path: str | os.PathLike[str] | None
) -> ParameterServerConfig:
    if (config is None) == (path is None):
        raise TypeError("pass either ps_config or hps_json_config_file")
    if path is not None:
        return ParameterServerConfig.from_json(path)
    assert config is not None
    return config


def _one_dimensional(keys: Keys, spec: TableSpec) -> Keys:
    if keys.ndim != 1:
        raise ValueError(
            f"table {spec.tag}: keys of a write have one dimension; got {keys.shape}"
        )
    return keys
