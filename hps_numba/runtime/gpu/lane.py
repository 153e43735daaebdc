"""What one lookup at a time works with beside the cache: workspaces, and rows to come.

A *lane* has a workspace and room for keys for each group of tables, and two blocks of
rows, one of which is filled while the other one is copied and inserted. A lookup takes
a lane, and gives it back when the host is done with it; what the device is still to do
with it then is waited for by the lane's next lookup, on the device.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import ClosedError
from hps_numba.kernels.cuda.gpu import Block, Event, Gpu, PinnedBlock
from hps_numba.kernels.cuda.launch import LaunchError
from hps_numba.kernels.cuda.layout import WORK_HEADER, WorkLayout
from hps_numba.kernels.cuda.operands import Workspace
from hps_numba.runtime.gpu.lane_layout import LaneLayout, StagingLayout
from hps_numba.runtime.gpu.staging import Staging
from hps_numba.types import Keys

_PATIENCE_S = 5.0  # for lookups that hang when the cache is closed


class GroupLane:
    """Workspace, keys, offsets and results of one group's queries.

    Parameters
    ----------
    gpu
        The device.
    layout
        What it has room for.

    Attributes
    ----------
    keys, offsets, results
        Pinned: int64 (n_keys,), which holds unique missing keys when they have been
        read; uint64 (n_tables + 1,); uint32 (n_tables, 4).
    keys_address, offsets_address
        On the device, of the same sizes.
    """

    def __init__(self, gpu: Gpu, layout: LaneLayout) -> None:
        self.layout = layout
        self._gpu = gpu
        self._block = Block(gpu, layout.device_bytes)
        self._pinned = PinnedBlock(gpu, layout.pinned_bytes)
        base, host = self._block.address, self._pinned.array
        self.workspace = Workspace(layout.work, base)
        self.keys_address = base + layout.keys
        self.offsets_address = base + layout.offsets
        n_keys, n_tables = layout.n_keys, layout.n_tables
        self.keys: Keys = host[: n_keys * 8].view(np.int64)
        self.offsets = host[n_keys * 8 :][: (n_tables + 1) * 8].view(np.uint64)
        results = host[layout.pinned_results :][: n_tables * 16].view(np.uint32)
        self.results: NDArray[np.uint32] = results.reshape(n_tables, 4)
        # Pinned addresses, and where the results come from: needed by each lookup.
        self._keys_host = self._pinned.address
        self._results_host = self._keys_host + layout.pinned_results
        self._results_device = base + layout.work.results

    def prepare(self, stream: int) -> None:
        """Bring the workspace into its first state."""
        self._gpu.zero(self.workspace.base, self.layout.work.n_bytes, stream)
        header = self.layout.work.header(self.workspace.base)
        assert header.nbytes == WORK_HEADER
        address = int(header.ctypes.data)
        self._gpu.copy(self.workspace.base, address, header.nbytes, stream)
        self._gpu.wait(stream)

    def send_keys(self, start: int, keys: Keys, stream: int) -> None:
        """Copy keys of the host to the device's keys from ``start`` on."""
        self.keys[start : start + keys.size] = keys
        at = 8 * start
        self._gpu.copy(
            self.keys_address + at, self._keys_host + at, 8 * keys.size, stream
        )

    def send_offsets(self, offsets: Sequence[int], stream: int) -> None:
        """Copy where each table's keys begin, and the end."""
        self.offsets[: len(offsets)] = offsets
        source = self._keys_host + 8 * self.layout.n_keys
        self._gpu.copy(self.offsets_address, source, 8 * len(offsets), stream)

    def read_results(self, n_tables: int, stream: int) -> None:
        """Queue the copy of a query's results; wait for the stream before reading."""
        self._gpu.copy(self._results_host, self._results_device, 16 * n_tables, stream)

    def read_unique(self, start: int, n: int, stream: int) -> Keys:
        """Queue the copy of a table's unique missing keys, and return their place."""
        target = self._keys_host + 8 * start
        self._gpu.copy(target, self.unique(start), 8 * n, stream)
        return self.keys[start : start + n]

    def unique(self, start: int) -> int:
        """Return the device's address of unique missing keys from ``start`` on."""
        return self.workspace.base + self.layout.work.unique + 8 * start

    def read_missing(
        self, start: int, n_keys: int, n_missing: int, stream: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which of a table's positions missed, and the number of each one's key.

        ``start`` and ``n_keys`` say which positions are the table's. Waits.
        """
        work: WorkLayout = self.layout.work
        pairs = np.empty((n_missing, 2), np.uint32)
        firsts = np.empty(n_keys, np.uint32)
        for array, offset in (
            (pairs, work.missing + 8 * start),
            (firsts, work.firsts + 4 * start),
        ):
            source = self.workspace.base + offset
            self._gpu.copy(int(array.ctypes.data), source, array.nbytes, stream)
        self._gpu.wait(stream)
        positions, first = (pairs.astype(np.int64) - start).T
        return positions, firsts[first].astype(np.int64)

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()
        self._pinned.close()


class Lane:
    """The buffers of one lookup.

    Parameters
    ----------
    gpu
        The device.
    groups
        A layout for each group of tables.
    staging
        Of the two blocks of rows.

    Attributes
    ----------
    stream
        For lookups that bring none of their own.
    side
        Where rows are copied and inserted.
    """

    def __init__(
        self, gpu: Gpu, groups: Sequence[LaneLayout], staging: StagingLayout
    ) -> None:
        self._gpu = gpu
        self.groups = tuple(GroupLane(gpu, layout) for layout in groups)
        self.staging = (Staging(gpu, staging), Staging(gpu, staging))
        self.copied, self._done = Event(gpu), Event(gpu)
        # Last, as they do not go by themselves if there is no memory for the others.
        self.stream, self.side = gpu.stream(), gpu.stream()
        self._in_use = False
        for group in self.groups:
            group.prepare(self.stream)

    def begin(self, stream: int) -> None:
        """Let a lookup's stream wait for what the last lookup left to do."""
        if self._in_use:
            self._done.hold_up(stream)
            self._in_use = False

    def end(self, stream: int) -> None:
        """Keep the buffers until what ``side`` and the lookup's stream have is done."""
        self.copied.record(stream)
        self.copied.hold_up(self.side)
        self._done.record(self.side)
        self._in_use = True

    def rest(self, stream: int) -> None:
        """Wait until nothing uses the buffers any more, whatever came of it."""
        for one in (stream, self.side):
            with suppress(LaunchError):
                self._gpu.wait(one)
        self._in_use = False

    def close(self) -> None:
        """Wait for the device, and give everything back, even if it has failed."""
        if self._in_use:
            with suppress(LaunchError):
                self._done.wait()
        self.rest(self.stream)
        for group in self.groups:
            group.close()
        for staging in self.staging:
            staging.close()
        self.copied.close()
        self._done.close()
        for stream in (self.stream, self.side):
            self._gpu.drop_stream(stream)


class LanePool:
    """The lanes of a cache. Thread-safe; whoever finds none waits for one.

    Parameters
    ----------
    lanes
        The lanes, which the pool closes.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._n_lanes = len(lanes)
        self._free: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        for lane in lanes:
            self._free.put(lane)

    def take(self) -> Lane:
        """Return a free lane, once there is one; ``give_back`` it in any case."""
        lane = self._free.get()
        if lane is None or not self._n_lanes:
            self._free.put(None)
            raise ClosedError("the GPU cache is closed")
        return lane

    def give_back(self, lane: Lane) -> None:
        """Let others take a lane."""
        self._free.put(lane)

    def close(self) -> bool:
        """Close the lanes; return whether all were given back, and so were closed.

        Waits a moment for lookups, which are over by now if nothing below hangs.
        """
        deadline = monotonic() + _PATIENCE_S
        n_closed = 0
        with suppress(queue.Empty):
            while n_closed < self._n_lanes:
                lane = self._free.get(timeout=max(deadline - monotonic(), 0.0))
                if lane is not None:
                    lane.close()
                    n_closed += 1
        all_closed, self._n_lanes = n_closed == self._n_lanes, 0
        self._free.put(None)
        return all_closed
