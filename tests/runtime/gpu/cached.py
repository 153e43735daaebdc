"""What the GPU caches of a server hold, without changing it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda import gpu as gpu_module
from hps_numba.kernels.cuda.layout import SET_BYTES
from hps_numba.runtime.gpu.lookup import GpuPath
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.session import LookupSession, ServedModel
from tests.oracle import versions_in

NOTHING = (0, 0, 0, 0)  # live: bytes, pinned bytes, streams, events
_OUT_OF_MEMORY = 2


def served_model(server: HPS, model: str = "wdl") -> ServedModel:
    return server._models[model]


def table_cache(
    server: HPS, table: str, device: int = 0, model: str = "wdl"
) -> TableCache:
    """Return a table's cache on a device."""
    served = served_model(server, model)
    return served.caches[device].tables[served.table(table).spec.tag]


def cached_keys(cache: TableCache) -> Any:
    """Return the keys that a cache holds, set by set."""
    steps = range(0, cache.n_sets, cache.max_sets)
    found = [cache.keys_of(i, min(cache.max_sets, cache.n_sets - i)) for i in steps]
    return np.concatenate(found)


def cached_versions(
    server: HPS, table: str, device: int = 0, model: str = "wdl"
) -> dict[int, int]:
    """Return the version of each key that a cache holds, -1 for a torn row."""
    cache = table_cache(server, table, device, model)
    session = peek(server, device, model)
    versions: dict[int, int] = {}
    keys, step = cached_keys(cache), cache.spec.max_keys
    for low in range(0, keys.size, step):
        part = keys[low : low + step]
        found = np.zeros(part.size, np.bool_)
        rows = session.lookup(table, part, found=found)
        assert found.all()
        versions |= zip(part.tolist(), versions_in(part, rows).tolist(), strict=True)
    return versions


def peek(server: HPS, device: int = 0, model: str = "wdl") -> LookupSession:
    """Return a session that finds what is cached and fetches nothing."""
    served = served_model(server, model)
    options = {"hit_rate_threshold": 0.0}
    peeking = replace(served, params=served.params.model_copy(update=options))
    nowhere: Any = _Nowhere()
    path = GpuPath(peeking, served.caches[device], server._pipeline, nowhere)
    return LookupSession(peeking, path)


class _Nowhere:
    """A queue without room."""

    def put(self, item: Any) -> bool:
        return False


class Held:
    """A set of a cache that looks as if a writer held it, until it is let go."""

    def __init__(self, cache: TableCache, number: int = 0) -> None:
        layout = cache.group.plan.layout
        offset = layout.offset("meta", cache.index) + number * SET_BYTES
        self._address = cache.group.base + offset
        self._gpu = cache._gpu
        self._seq = np.zeros(1, np.uint32)
        self._copy(self._seq, to_device=False)
        assert self._seq[0] % 2 == 0
        self._copy(self._seq + np.uint32(1))

    def let_go(self) -> None:
        """Free the set."""
        self._copy(self._seq)

    def _copy(self, seq: Any, *, to_device: bool = True) -> None:
        pair = (self._address, seq.ctypes.data)
        self._gpu.copy(*(pair if to_device else pair[::-1]), 4, 0)
        self._gpu.wait(0)


class Meter:
    """Counts the memory that was taken for devices, and refuses some of it.

    Stands for the driver in the module that allocates.

    Attributes
    ----------
    device, pinned
        Bytes that are taken, by address.
    refuse_at
        Number of the allocation that fails, counted from now; None for none.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.device: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.refuse_at: int | None = None
        self.n_blocks = 0  # that were ever taken
        self.streams: set[int] = set()
        self.events: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    @property
    def live(self) -> tuple[int, int, int, int]:
        """Bytes on devices, pinned bytes, streams and events."""
        sizes = sum(self.device.values()), sum(self.pinned.values())
        return (*sizes, len(self.streams), len(self.events))

    def settled(self, wanted: tuple[int, ...] = NOTHING) -> tuple[int, ...]:
        """Return ``live``, without what waits for the garbage collector."""
        if self.live != wanted:
            gc.collect()
        return self.live

    def cuMemAlloc(self, n_bytes: int) -> Any:  # noqa: N802 - the driver's name
        return self._allocate(self._driver.cuMemAlloc, self.device, n_bytes)

    def cuMemAllocHost(self, n_bytes: int) -> Any:  # noqa: N802 - the driver's name
        return self._allocate(self._driver.cuMemAllocHost, self.pinned, n_bytes)

    def cuMemFree(self, address: int) -> Any:  # noqa: N802 - the driver's name
        self.device.pop(address, None)  # what is older is not counted
        return self._driver.cuMemFree(address)

    def cuMemFreeHost(self, address: int) -> Any:  # noqa: N802 - the driver's name
        self.pinned.pop(address, None)
        return self._driver.cuMemFreeHost(address)

    def cuStreamCreate(self, flags: int) -> Any:  # noqa: N802 - the driver's name
        status, stream = self._driver.cuStreamCreate(flags)
        self.streams.add(int(stream))
        return status, stream

    def cuStreamDestroy(self, stream: int) -> Any:  # noqa: N802 - the driver's name
        self.streams.discard(stream)
        return self._driver.cuStreamDestroy(stream)

    def cuEventCreate(self, flags: int) -> Any:  # noqa: N802 - the driver's name
        status, event = self._driver.cuEventCreate(flags)
        self.events.add(int(event))
        return status, event

    def cuEventDestroy(self, event: Any) -> Any:  # noqa: N802 - the driver's name
        self.events.discard(int(event))
        return self._driver.cuEventDestroy(event)

    def _allocate(self, allocate: Any, taken: dict[int, int], n_bytes: int) -> Any:
        if self.refuse_at is not None:
            self.refuse_at -= 1
            if self.refuse_at < 0:
                return _OUT_OF_MEMORY, 0
        status, address = allocate(n_bytes)
        taken[int(address)] = n_bytes
        self.n_blocks += 1
        return status, address


@contextmanager
def metered() -> Iterator[Meter]:
    """Count device memory for a context."""
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(gpu_module.driver)
        patch.setattr(gpu_module, "driver", meter)
        yield meter
