"""The models of a server: opened, loaded and removed while others are served."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Literal

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import (
    ClosedError,
    ConfigError,
    HPSError,
    TierError,
    UnknownTableError,
)
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.estimate import host_shares
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.gate import PATIENCE_S, Gate
from hps_numba.runtime.gpus import Gpus
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.loading import LoadProgress, Source, load_table, reporter
from hps_numba.runtime.session import LookupSession, ServedModel
from hps_numba.runtime.stores import Stores
from hps_numba.tiers.model_files import open_model_directory
from hps_numba.types import TableSpec

logger = logging.getLogger(__name__)


class ModelSet:
    """What is served, by name. Thread-safe; changes of the set wait for each other.

    Parameters
    ----------
    config
        The server's configuration; its models are not served before ``add`` is called.
    stores
        The tiers.
    backfills
        Queue for rows that upper tiers lack.
    gpus
        Opens GPU caches.
    progress
        Told how far loading is.
    """

    def __init__(
        self,
        config: ParameterServerConfig,
        stores: Stores,
        backfills: BackfillQueue,
        gpus: Gpus,
        *,
        progress: LoadProgress | None,
    ) -> None:
        self._config = config
        self._stores = stores
        self._backfills = backfills
        self._gpus = gpus
        self._progress = progress
        self._failures = FailureLog(logger)  # of all tables: tiers fail for all
        self._changing = threading.Lock()
        self._served: dict[str, ServedModel] = {}  # written under _changing
        self._grants: dict[str, int] = {}  # host bytes by tag, guarded by _changing

    @property
    def served(self) -> tuple[ServedModel, ...]:
        """The models, in the order in which they were added."""
        return tuple(self._served.values())

    def __getitem__(self, name: str) -> ServedModel:
        served = self._served.get(name)
        if served is None:
            raise self._unknown(name, "is not served")
        return served

    def session(self, name: str, device: int) -> LookupSession | None:
        """Return the session of a model on a device if there is one."""
        served = self._served.get(name)
        return served.sessions.get(device) if served is not None else None

    def add(self, models: tuple[InferenceParams, ...], *, force_reload: bool) -> None:
        """Serve models, which share the host memory that is left.

        Raises
        ------
        ConfigError
            If a model of that name is served, or there is no host memory left.
        ModelFileError, TierError
            If a table cannot be loaded; the model is not served then.
        """
        with self._changing:
            for params in models:
                if params.model_name in self._served:
                    raise ConfigError(
                        f"model {params.model_name!r} is served already; use reload() "
                        f"for new files, or remove_model() first"
                    )
                if params.i64_input_key != self._config.supportlonglong:
                    raise ConfigError(
                        f"model {params.model_name!r}: i64_input_key="
                        f"{params.i64_input_key} differs from the server's "
                        f"supportlonglong={self._config.supportlonglong}; all models "
                        f"of a server share one width of keys"
                    )
            budget = self._config.volatile_db.max_bytes
            if budget is not None:
                budget -= sum(self._grants.values())
            shares = host_shares(self._config, models, budget)
            for params in models:
                self._serve_locked(params, shares, force_reload)

    def remove(self, name: str, *, drop_tables: bool) -> None:
        """Stop serving a model, once its lookups have ended (at most 30 s later)."""
        with self._changing:
            served = self[name]
            persistent = self._stores.persistent
            if drop_tables and persistent is not None and persistent.read_only:
                raise ConfigError(
                    f"model {name!r}: its tables cannot be dropped, since "
                    f"persistent_db.read_only is true; remove it without drop_tables"
                )
            del self._served[name]
            served.gate.close(lambda: self._unknown(name, "was removed"))
            for table in served.tables:
                self._gpus.forget(table.spec.tag)
            _close_caches(served)
            names = [] if drop_tables else [table.spec.name for table in served.tables]
            kept = {tier.name: names for tier in self._stores.lasting}
            self._release_locked(served.params, kept)

    def reload(self, name: str, *, force: bool) -> bool:
        """Load what changed of a model's files; return whether anything did."""
        with self._changing:
            served = self[name]
            sources = self._sources(served.params)
            loaded = self._load(served, sources, force)
            if loaded:
                self._warm_up(served, sources)
            return loaded

    def refresh(self, served: ServedModel, table: Hierarchy) -> int:
        """Read a table's rows again where upper tiers and caches hold them.

        Returns how many were written there.
        """
        refreshed = table.refresh(self._config.volatile_db.max_batch_size)
        if served.caches:
            from hps_numba.runtime.gpu.refreshing import refresh

            share = served.params.cache_refresh_percentage_per_iteration or 1.0
            for cache in served.caches.values():
                refreshed += refresh(cache.tables[table.spec.tag], table, share)
        return refreshed

    def close(self) -> None:
        """Let nobody in, and wait until everybody is out."""
        deadline = monotonic() + PATIENCE_S
        for served in self.served:
            served.gate.close(patience_s=max(deadline - monotonic(), 0.0))

    def close_caches(self) -> None:
        """Give the memory of devices back; nobody looks anything up any more."""
        for served in self.served:
            _close_caches(served)

    def _serve_locked(
        self, params: InferenceParams, shares: dict[str, int | None], force: bool
    ) -> None:
        lasting = self._stores.lasting
        kept = {tier.name: tier.tables(params.model_name) for tier in lasting}
        try:
            tables = tuple(
                self._open_locked(spec, shares[spec.tag]) for spec in params.tables()
            )
            gate = Gate(params.model_name, server_closed)
            served = ServedModel(params, tables, gate)
            sources = self._sources(params)
            self._load(served, sources, force)
            for table in tables:
                table.warm_up()
            self._open_caches(served, sources)
        except BaseException:
            try:
                self._release_locked(params, kept)
            except TierError as exc:  # what failed first is what is raised
                logger.warning("model=%s not released: %s", params.model_name, exc)
            raise
        self._served[params.model_name] = served

    def _open_locked(self, spec: TableSpec, max_bytes: int | None) -> Hierarchy:
        self._grants[spec.tag] = max_bytes or 0
        for tier in self._stores.tiers:
            tier.open_table(spec, max_bytes=max_bytes)
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
            failures=self._failures,
        )

    def _release_locked(
        self, params: InferenceParams, kept: Mapping[str, list[str]]
    ) -> None:
        """Free a model's host memory, and drop its stored tables but those to keep.

        Of tables that lasting tiers keep, ``kept`` has the names by tier.
        """
        for spec in params.tables():
            self._grants.pop(spec.tag, None)
            self._backfills.forget(spec.tag)
            if self._stores.local is not None:
                self._stores.local.drop_table(spec.tag)
        for tier in self._stores.lasting:
            for spec in params.tables():
                if spec.name not in kept[tier.name]:
                    tier.drop_table(spec.tag)

    def _load(
        self, served: ServedModel, sources: list[Source | None], force: bool
    ) -> bool:
        """Load tables and return whether any was not stored already."""
        loaded = [
            load_table(
                table, self._stores, source, force=force, progress=self._progress
            )
            for table, source in zip(served.tables, sources, strict=True)
        ]
        return any(loaded)

    def _open_caches(self, served: ServedModel, sources: list[Source | None]) -> None:
        """Put GPU caches above the tiers, and warm them up."""
        params = served.params
        rows = [source.directory.n_rows if source else 0 for source in sources]
        served.caches.update(self._gpus.open(params, rows, self._compiling(served)))
        if not served.caches:
            return
        try:
            for table in served.tables:
                table.caches = tuple(
                    cache.tables[table.spec.tag] for cache in served.caches.values()
                )
            self._warm_up(served, sources)
            interval_s = params.refresh_interval
            if interval_s and params.cache_refresh_percentage_per_iteration:
                from hps_numba.runtime.gpu.refreshing import Refresher

                served.refreshers.append(
                    Refresher(
                        served.name,
                        interval_s,
                        lambda: [self.refresh(served, t) for t in served.tables],
                    )
                )
        except BaseException:
            _close_caches(served)
            raise

    def _warm_up(self, served: ServedModel, sources: list[Source | None]) -> None:
        """Bring rows into the model's GPU caches before they are asked for."""
        if not served.caches:
            return
        from hps_numba.runtime.gpu.filling import fill
        from hps_numba.runtime.gpu.warming import warm_keys

        for i, (table, source) in enumerate(zip(served.tables, sources, strict=True)):
            for cache in served.caches.values():
                mine = cache.tables[table.spec.tag]
                directory = source.directory if source else None
                wanted = warm_keys(served.params, i, directory, limit=mine.n_slots)
                step = f"warm-up of {mine.name}"
                report = reporter(self._progress, table, step, wanted.total)
                fill(mine, table, wanted.blocks, report)

    def _compiling(self, served: ServedModel) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done, total: progress(f"{served.name} kernels", done, total)

    def _sources(self, params: InferenceParams) -> list[Source | None]:
        """Return where each table's rows come from; checks the sizes of the files."""
        specs = params.tables()
        if not params.sparse_model_files:
            return [None] * len(specs)
        key_bytes: Literal[8] | None = 8 if self._config.supportlonglong else None
        return [
            Source(
                open_model_directory(
                    path, spec.dim, key_bytes=key_bytes, table=spec.tag
                ),
                params,
            )
            for spec, path in zip(specs, params.sparse_model_files, strict=True)
        ]

    def _unknown(self, name: str, what: str) -> HPSError:
        return UnknownTableError(
            f"model {name!r} {what}; served are {', '.join(self._served) or 'none'}"
        )


def server_closed() -> HPSError:
    """Return the error of a call that comes after ``close``."""
    return ClosedError("the server is closed")


def _close_caches(served: ServedModel) -> None:
    for refresher in served.refreshers:
        refresher.close()
    for cache in served.caches.values():
        cache.close()
