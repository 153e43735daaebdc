"""The devices of a server, and the GPU caches of its models.

Imports no CUDA package before a model asks for a cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import ConfigError
from hps_numba.runtime.backfill import BackfillQueue
from hps_numba.runtime.pipeline import Pipeline
from hps_numba.runtime.session import HostPath, LookupPath, ServedModel
from hps_numba.runtime.stats import NO_BACKFILLS, BackfillStats

if TYPE_CHECKING:
    from hps_numba.kernels.cuda.gpu import Gpu
    from hps_numba.runtime.gpu.cache import GpuCache

logger = logging.getLogger(__name__)


class Gpus:
    """Opens devices and caches. Guarded by its owner's lock, but for ``path``.

    Parameters
    ----------
    config
        The server's configuration.
    """

    def __init__(self, config: ParameterServerConfig) -> None:
        self._config = config
        self._gpus: dict[int, Gpu] = {}
        self._deferred: BackfillQueue | None = None  # once there is a cache
        self._warned = False

    def open(
        self,
        params: InferenceParams,
        rows: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[int, GpuCache]:
        """Return a model's empty cache on each of its devices.

        Parameters
        ----------
        params
            The model.
        rows
            Rows of each table's model directory, or 0.
        progress
            Called with how many kernels are compiled, and how many there are.

        Returns
        -------
        dict
            By device; empty if the model has none, or there is no GPU to be used, of
            which the log has one warning.

        Raises
        ------
        ConfigError
            If there is no GPU and the model requires one, a device is not there, or the
            tables do not fit the configured bytes.
        DeviceError
            If a device has too little memory.
        """
        if not params.use_gpu_embedding_cache:
            return {}
        reason = self._unusable()
        if reason is not None:
            self._do_without(params, reason)
            return {}
        from hps_numba.runtime.gpu.cache import GpuCache
        from hps_numba.runtime.gpu.sizing import plan_cache

        if self._deferred is None:
            self._deferred = BackfillQueue(
                self._config.backfill_queue_bytes, name="hps-deferred"
            )
        plan = plan_cache(params, rows)
        caches: dict[int, GpuCache] = {}
        try:
            for device in params.deployed_devices:
                caches[device] = GpuCache(
                    self._gpu(device, params),
                    plan,
                    n_lanes=params.number_of_worker_buffers_in_pool,
                    block_rows=self._config.volatile_db.max_batch_size,
                    progress=progress,
                )
        except BaseException:
            for cache in caches.values():
                cache.close()
            raise
        return caches

    def path(self, served: ServedModel, device: int, pipeline: Pipeline) -> LookupPath:
        """Return the way of a model's lookups on a device."""
        cache = served.caches.get(device)
        if cache is None or self._deferred is None:
            chunk_keys = self._config.volatile_db.max_batch_size
            return HostPath(served.name, pipeline, chunk_keys)
        from hps_numba.runtime.gpu.lookup import GpuPath

        return GpuPath(served, cache, pipeline, self._deferred)

    def forget(self, tag: str) -> None:
        """Drop what waits for a table, and wait for what is being inserted of it."""
        if self._deferred is not None:
            self._deferred.forget(tag)

    def drain(self) -> None:
        """Wait until all keys that were deferred are inserted, refused or dropped."""
        if self._deferred is not None:
            self._deferred.drain()

    def stats(self) -> BackfillStats:
        """Return what became of keys that were deferred."""
        return NO_BACKFILLS if self._deferred is None else self._deferred.stats()

    def close(self) -> None:
        """Drop the deferred keys; the second call does nothing."""
        if self._deferred is not None:
            self._deferred.close()

    def _gpu(self, device: int, params: InferenceParams) -> Gpu:
        from hps_numba.kernels.cuda.gpu import Gpu
        from hps_numba.kernels.cuda.launch import DeviceUnavailableError

        if device not in self._gpus:
            try:
                self._gpus[device] = Gpu(device)
            except DeviceUnavailableError as exc:
                raise ConfigError(
                    f"model {params.model_name!r}: deployed_device_list: {exc}"
                ) from exc
        return self._gpus[device]

    def _unusable(self) -> str | None:
        """Return why no device can be used, or None."""
        if self._gpus:
            return None
        try:
            from hps_numba.kernels.cuda.launch import (
                DeviceUnavailableError,
                count_devices,
            )
        except ImportError as exc:
            return f"{exc}; install hps-numba[cuda13] or hps-numba[cuda12]"
        try:
            return None if count_devices() else "the driver shows no device"
        except DeviceUnavailableError as exc:
            return str(exc)

    def _do_without(self, params: InferenceParams, reason: str) -> None:
        if params.require_gpu:
            raise ConfigError(
                f"model {params.model_name!r}: require_gpu is true, and no GPU cache "
                f"is available: {reason}"
            )
        if self._warned:
            return
        self._warned = True
        cached = [
            m.model_name for m in self._config.models if m.use_gpu_embedding_cache
        ]
        logger.warning(
            "models=%s gpucache=true: no GPU cache is available (%s); rows are served "
            "from host memory and the tiers below it",
            ",".join(cached or [params.model_name]),
            reason,
        )
