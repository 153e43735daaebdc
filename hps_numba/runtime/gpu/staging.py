"""Rows on their way to a device: a block of pinned memory, and one like it there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hps_numba.kernels.cuda.gpu import Block, Event, Gpu, PinnedBlock
from hps_numba.runtime.gpu.lane_layout import StagingLayout
from hps_numba.types import Keys, Mask, Rows, TableSpec


@dataclass(frozen=True)
class Staged:
    """Rows of one block: pinned arrays, and where the device finds them.

    ``selected`` marks the keys that are to be inserted; ``keys`` are there if the
    device does not have them already.
    """

    rows: Rows
    keys: Keys
    selected: Mask
    outcomes: NDArray[np.uint8]
    base: int  # the device's address of the rows
    host: int  # the pinned address of the rows
    keys_offset: int
    selected_offset: int
    outcomes_offset: int

    @property
    def keys_address(self) -> int:
        """The device's address of the keys."""
        return self.base + self.keys_offset

    @property
    def selected_address(self) -> int:
        """The device's address of the marks."""
        return self.base + self.selected_offset

    @property
    def outcomes_address(self) -> int:
        """The device's address of the outcomes."""
        return self.base + self.outcomes_offset


class Staging:
    """A block of rows on its way to the device.

    Parameters
    ----------
    gpu
        The device.
    layout
        Most rows, and how wide they are at most.
    """

    def __init__(self, gpu: Gpu, layout: StagingLayout) -> None:
        self.layout = layout
        self._gpu = gpu
        self._block = Block(gpu, layout.n_bytes)
        self._pinned = PinnedBlock(gpu, layout.n_bytes)
        self._free = Event(gpu)
        self._used = False

    def lay_out(self, n: int, spec: TableSpec) -> Staged:
        """Return the places of ``n`` rows of a table."""
        keys, selected, outcomes, end = self.layout.offsets(n, spec.row_bytes)
        host = self._pinned.array
        return Staged(
            rows=host[: n * spec.row_bytes].view(spec.numpy_dtype).reshape(n, spec.dim),
            keys=host[keys : keys + 8 * n].view(np.int64),
            selected=host[selected : selected + n].view(np.bool_),
            outcomes=host[outcomes:end],
            base=self._block.address,
            host=self._pinned.address,
            keys_offset=keys,
            selected_offset=selected,
            outcomes_offset=outcomes,
        )

    @property
    def address(self) -> int:
        """The device's address of the block."""
        return self._block.address

    def wait(self) -> None:
        """Wait until the device is done with the block."""
        if self._used:
            self._free.wait()
            self._used = False

    def used_until_now(self, stream: int) -> None:
        """Keep the block until what a stream was given so far is done."""
        self._free.record(stream)
        self._used = True

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()
        self._pinned.close()
        self._free.close()
