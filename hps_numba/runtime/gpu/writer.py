"""Writes to a cache from the host: keys and rows go down, outcomes come back."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import ClosedError
from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.kernels.cuda.launch import LaunchError
from hps_numba.kernels.cuda.layout import DUMP_BYTES, DUMPED, DUMPED_BUSY, WAYS
from hps_numba.runtime.gpu.lane_layout import StagingLayout
from hps_numba.runtime.gpu.staging import Staged, Staging
from hps_numba.types import Keys, Rows, TableSpec


class Writer:
    """One block of rows and a stream, for one write at a time.

    Used as a context, whose value is the stream: writers wait for each other.

    Parameters
    ----------
    gpu
        The device.
    layout
        The block.

    Raises
    ------
    ClosedError
        If it is entered after ``close``: by whoever was waited for in vain.
    """

    def __init__(self, gpu: Gpu, layout: StagingLayout) -> None:
        self.n_rows = layout.n_rows
        self._gpu = gpu
        self._lock = threading.Lock()  # guards all below
        self._closed = False
        self._staging = Staging(gpu, layout)
        self._counts = Block(gpu, DUMP_BYTES)
        self._stream = gpu.stream()
        gpu.zero(self._counts.address, DUMP_BYTES, self._stream)

    def __enter__(self) -> int:
        self._lock.acquire()
        if self._closed:
            self._lock.release()
            raise ClosedError("the GPU cache is closed")
        return self._stream

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            # Whatever came of the write: the next one may use the block.
            self._rest()
        self._lock.release()

    def send(
        self, keys: Keys, rows: Rows | None, spec: TableSpec, stream: int
    ) -> Staged:
        """Copy keys, and rows if there are any, to the device."""
        staged = self._staging.lay_out(keys.size, spec)
        staged.keys[:] = keys
        begin, end = staged.keys_offset, staged.selected_offset
        if rows is not None:
            staged.rows[:] = rows
            begin = 0
        self._gpu.copy(staged.base + begin, staged.host + begin, end - begin, stream)
        return staged

    def outcomes(self, staged: Staged, stream: int) -> NDArray[np.uint8]:
        """Wait for a write and return what became of each key."""
        n, offset = staged.outcomes.nbytes, staged.outcomes_offset
        self._gpu.copy(staged.host + offset, staged.base + offset, n, stream)
        self._gpu.wait(stream)
        return staged.outcomes.copy()

    def dump(
        self, cache: Cache, table: int, first_set: int, n_sets: int, stream: int
    ) -> tuple[Keys, int]:
        """Return the keys in a range of sets, and how many sets could not be read."""
        keys = np.empty(n_sets * WAYS, np.int64)
        counts = np.empty(DUMP_BYTES, np.uint8)
        address = self._staging.address
        cache.dump(
            table,
            first_set,
            n_sets,
            keys=address,
            counts=self._counts.address,
            stream=stream,
        )
        source, target = self._counts.address, int(counts.ctypes.data)
        self._gpu.copy(target, source, DUMP_BYTES, stream)
        self._gpu.wait(stream)
        n = int(counts[DUMPED : DUMPED + 8].view(np.uint64)[0])
        self._gpu.copy(int(keys.ctypes.data), address, 8 * n, stream)
        self._gpu.wait(stream)
        n_busy = int(counts[DUMPED_BUSY : DUMPED_BUSY + 4].view(np.uint32)[0])
        return keys[:n], n_busy

    def close(self) -> None:
        """Wait for the last write, and give everything back, even after a failure."""
        with self:
            self._closed = True
            self._rest()
            self._staging.close()
            self._counts.close()
            self._gpu.drop_stream(self._stream)

    def _rest(self) -> None:
        """Wait until the device is done with the block."""
        with suppress(LaunchError):
            self._gpu.wait(self._stream)
