"""How many bytes the buffers of a lookup take, and where each part lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hps_numba.kernels.cuda.layout import (
    DUMP_BYTES,
    MAX_KEYS,
    WAYS,
    WorkLayout,
    aligned,
)
from hps_numba.runtime.gpu.sizing import CachePlan


@dataclass(frozen=True)
class LaneLayout:
    """One group's part of a lane.

    Parameters
    ----------
    n_keys
        Keys of one lookup at most.
    n_tables
        Tables of the group.
    """

    n_keys: int
    n_tables: int

    @cached_property
    def work(self) -> WorkLayout:
        """The workspace, at the front of the device's memory."""
        return WorkLayout(self.n_keys, self.n_tables)

    @property
    def keys(self) -> int:
        """Offset of the keys in the device's memory."""
        return self.work.n_bytes

    @property
    def offsets(self) -> int:
        """Offset of the tables' offsets in the device's memory."""
        return self.keys + aligned(8 * self.n_keys)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return self.offsets + aligned(8 * (self.n_tables + 1))

    @property
    def pinned_results(self) -> int:
        """Offset of the results in pinned memory, after keys and offsets."""
        return 8 * (self.n_keys + self.n_tables + 1)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory."""
        return self.pinned_results + 16 * self.n_tables


@dataclass(frozen=True)
class StagingLayout:
    """A block of rows with their keys, marks and outcomes, one behind the other.

    Parameters
    ----------
    n_rows
        Rows at most.
    row_bytes
        Bytes of the widest row.
    """

    n_rows: int
    row_bytes: int

    def offsets(self, n: int, row_bytes: int) -> tuple[int, int, int, int]:
        """Return where keys, marks and outcomes of ``n`` rows begin, and the end."""
        if n > self.n_rows or row_bytes > self.row_bytes:
            raise ValueError(
                f"{n} rows of {row_bytes} bytes exceed a block of {self.n_rows} rows "
                f"of {self.row_bytes}"
            )
        keys = aligned(n * row_bytes, 16)
        return keys, keys + 8 * n, keys + 9 * n, keys + 10 * n

    @property
    def n_bytes(self) -> int:
        """Bytes of a block, on the device and of pinned memory alike."""
        return aligned(self.offsets(self.n_rows, self.row_bytes)[3])


def lane_layouts(
    plan: CachePlan, block_rows: int
) -> tuple[list[LaneLayout], StagingLayout]:
    """Return what a lane of a cache has: a part for each group, and blocks of rows.

    Parameters
    ----------
    plan
        The cache.
    block_rows
        Rows that are fetched at once at most.
    """
    lanes = [
        LaneLayout(
            min(sum(s.max_keys for s in group.specs), MAX_KEYS), len(group.specs)
        )
        for group in plan.groups
    ]
    most = max(spec.max_keys for group in plan.groups for spec in group.specs)
    row_bytes = max(group.layout.rows.row_bytes for group in plan.groups)
    # A dump goes through a block too, a set's keys at least.
    n_rows = max(min(block_rows, most), WAYS)
    return lanes, StagingLayout(n_rows, row_bytes)


class Buffers(NamedTuple):
    """Bytes of a cache's buffers, on its device and of pinned host memory."""

    device: int
    pinned: int


def buffer_bytes(plan: CachePlan, block_rows: int, n_lanes: int) -> Buffers:
    """Return the bytes of a cache's lanes, and of the block that writes go through."""
    lanes, staging = lane_layouts(plan, block_rows)
    blocks = (2 * n_lanes + 1) * staging.n_bytes
    return Buffers(
        n_lanes * sum(layout.device_bytes for layout in lanes) + blocks + DUMP_BYTES,
        n_lanes * sum(layout.pinned_bytes for layout in lanes) + blocks,
    )
