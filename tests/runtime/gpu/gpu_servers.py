"""Servers with GPU caches, what they have to answer, and arrays to ask them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import ArrayLike

from hps_numba.config import DatabaseType
from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, model, server_config
from tests.runtime.gpu.foreign import Described, description
from tests.support.fakegpu.device import FakeDevice

_INT64 = np.iinfo(np.int64)
EDGES = np.array([-1, _INT64.min, _INT64.max])
GUARD = 0x5C  # bytes around an output


@dataclass(frozen=True)
class Edged(Table):
    """A table that has the keys at the edges of int64 too."""

    @property
    def keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.concatenate([np.arange(self.n_rows, dtype=np.int64), EDGES])


# Three tables of one group, one in another, two of half precision in a third.
ITEMS = Edged("items", dim=4, n_rows=300, version=1, default=-1.0)
USERS = Edged("users", dim=4, n_rows=200, version=2, default=0.5)
SHOPS = Edged("shops", dim=8, n_rows=200, version=3, default=4.0)
BRANDS = Edged("brands", dim=4, n_rows=60, version=4, default=7.0)
COLOURS = Table("colours", dim=4, n_rows=200, version=5, default=-3.0, dtype="float16")
SIZES = Table("sizes", dim=4, n_rows=90, version=6, default=9.0, dtype="float16")
TABLES = (ITEMS, USERS, SHOPS, BRANDS, COLOURS, SIZES)
MAX_KEYS = 400


def gpu_server(
    root: Path,
    tables: Sequence[Table] = TABLES,
    *,
    block_rows: int = 64,
    host: bool = True,
    wrap_tier: Callable[[Tier], Tier] | None = None,
    server: Mapping[str, Any] | None = None,
    **options: Any,
) -> HPS:
    """Return a server of a model ``wdl`` with a cache for half of the rows.

    Parameters
    ----------
    root
        Where its files are.
    tables
        The model's tables.
    block_rows
        Rows of a block, and so of a chunk.
    host
        Whether there is host memory between the cache and RocksDB.
    wrap_tier
        As of ``HPS``.
    server
        Options of the server's configuration.
    options
        Of the model's.
    """
    params = model(
        root,
        tables,
        **{
            "use_gpu_embedding_cache": True,
            "cache_size_percentage": 0.5,
            "hit_rate_threshold": 1.1,
            "max_batchsize": MAX_KEYS // 10,
            "number_of_worker_buffers_in_pool": 2,
        }
        | options,
    )
    volatile: dict[str, Any] = {"max_batch_size": block_rows}
    if not host:
        volatile["type"] = DatabaseType.DISABLED
    config = server_config(root, [params], volatile=volatile, **(server or {}))
    return HPS(config, wrap_tier=wrap_tier)


def rows_for(table: Table, keys: ArrayLike, dtype: Any = np.float32) -> Any:
    """Return the rows that a lookup of keys of any shape has to give."""
    array = np.asarray(keys).astype(np.int64)
    rows = versioned_rows(array, table.version, table.dim)
    found = known(table, array)[..., None]
    return np.where(found, rows, np.float32(table.default)).astype(dtype)


def known(table: Table, keys: ArrayLike) -> Any:
    """Return which of the keys the tiers know."""
    return np.isin(np.asarray(keys).astype(np.int64), table.keys)


def some_keys(rng: np.random.Generator, table: Table, shape: Any) -> Any:
    """Return keys of which most are known, some repeat, and some are at the edges."""
    keys = rng.integers(-20, table.n_rows + 40, shape)
    return np.where(rng.random(shape) < 0.1, rng.choice(EDGES, shape), keys)


def downloaded(gpu: Gpu, array: Any, stream: int = 0) -> Any:
    """Return what an array on the device holds in the order of a stream.

    Nobody else is waited for: what is still to come on another stream is not there.
    """
    described = array.__cuda_array_interface__
    host = np.empty(described["shape"], described["typestr"])
    gpu.copy(host.ctypes.data, described["data"][0], host.nbytes, stream)
    gpu.wait(stream)
    return host


def settle(gpu: Gpu) -> None:
    """Wait for all streams: also for inserts, which no lookup waits for."""
    with gpu.launcher.current():
        (status,) = driver.cuCtxSynchronize()
    assert not status


class Lent(Described):
    """Another library's view of an array: has its interface, and keeps it alive."""

    def __init__(self, array: Any, stream: int | None = None) -> None:
        described = dict(array.__cuda_array_interface__)
        if stream is not None:
            described["stream"] = stream
        super().__init__(described)
        self.array = array


class Guarded:
    """An output on the device with bytes around it that nobody may touch.

    Parameters
    ----------
    gpu
        The device.
    shape, dtype
        Of the output.
    offset
        Bytes between a multiple of 256 and the output.
    """

    def __init__(
        self, gpu: Gpu, shape: tuple[int, ...], dtype: Any, *, offset: int = 256
    ) -> None:
        self._gpu = gpu
        self._shape, self._dtype, self._offset = shape, np.dtype(dtype), offset
        self._n_bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._block = Block(gpu, offset + self._n_bytes + 256)
        whole = np.full(self._block.n_bytes, GUARD, np.uint8)
        gpu.copy(self._block.address, whole.ctypes.data, whole.nbytes, 0)
        gpu.wait(0)
        described = description(self._block, shape, self._dtype.str)
        described["data"] = (self._block.address + offset, False)
        self.array = Described(described)

    def rows(self, stream: int = 0) -> Any:
        """Return the output, after a check that nothing beside it was written."""
        whole = np.empty(self._block.n_bytes, np.uint8)
        self._gpu.copy(whole.ctypes.data, self._block.address, whole.nbytes, stream)
        self._gpu.wait(stream)
        begin, end = self._offset, self._offset + self._n_bytes
        assert (whole[:begin] == GUARD).all()
        assert (whole[end:] == GUARD).all()
        return whole[begin:end].copy().view(self._dtype).reshape(self._shape)

    def untouched(self) -> bool:
        """Return whether nothing was written at all."""
        return bool((self.rows().view(np.uint8) == GUARD).all())


@contextmanager
def streams(gpu: Gpu, n: int) -> Iterator[list[int]]:
    """Give some streams for a context."""
    made = [gpu.stream() for _ in range(n)]
    yield made
    for stream in made:
        gpu.wait(stream)
        gpu.drop_stream(stream)


def hold(server: HPS, tables: Iterable[Table], device: int = 0) -> None:
    """Look all keys of tables up, so that a cache large enough has them."""
    session = server.session("wdl", device)
    for table in tables:
        for low in range(0, table.keys.size, MAX_KEYS):
            session.lookup(table.name, table.keys[low : low + MAX_KEYS])


def launched(fake: FakeDevice, since: int = 0) -> list[str]:
    """Return the operations whose kernels ran since a place in the list, in order."""
    return [name.split("_")[0] for name in fake.launches[since:]]
