"""The GPU cache of one model on one device.

Tables whose rows have the same type lie in one block of device memory, a *group*, and
are looked up in one launch. Lookups of all sessions of the device share the cache.

*No resurrection.* Each table has an update epoch. Whoever fetches rows below the cache
reads the epoch first and inserts with it; an update writes the tiers below first, then
the cache with the next epoch, in place. So a row that was read before an update is
either inserted before it, and replaced, or refused by the stamp that the update leaves
on its keys, whether they are cached or not. An update returns when the device is done
with it: every lookup that begins later finds the new row. Until then a lookup may find
either row.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.gpu.errors import device_errors
from hps_numba.runtime.gpu.lane import Lane, LanePool
from hps_numba.runtime.gpu.lane_layout import LaneLayout, lane_layouts
from hps_numba.runtime.gpu.sizing import CachePlan
from hps_numba.runtime.gpu.table_cache import Group, TableCache
from hps_numba.runtime.gpu.writer import Writer

logger = logging.getLogger(__name__)


class GpuCache:
    """The cache of one model on one device.

    Parameters
    ----------
    gpu
        The device.
    plan
        Sizes, of ``plan_cache``.
    n_lanes
        Lookups that may run at once; others wait.
    block_rows
        Rows that are fetched, copied and inserted at once.
    progress
        Called with how many kernels are compiled and how many there are.

    Raises
    ------
    DeviceError
        If the device has too little memory, or refuses the work.
    """

    def __init__(
        self,
        gpu: Gpu,
        plan: CachePlan,
        *,
        n_lanes: int,
        block_rows: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.gpu = gpu
        self.plan = plan
        self._closing = threading.Lock()
        self._closed = False
        # Whatever fails, what was made before is given back at once.
        with (
            device_errors(f"the GPU cache on device {gpu.ordinal}"),
            ExitStack() as made,
        ):
            lanes, staging = lane_layouts(plan, block_rows)
            self._staging = staging
            self.groups = tuple(
                made.enter_context(closing(Group(gpu, group))) for group in plan.groups
            )
            self._writer = made.enter_context(closing(Writer(gpu, staging)))
            with self._writer as stream:
                for group in self.groups:
                    group.prepare(gpu, stream)
            every_lane = [
                made.enter_context(closing(Lane(gpu, lanes, staging)))
                for _ in range(n_lanes)
            ]
            gpu.launcher.warm_up(self._kernels(), progress)
            made.pop_all()
        self.lanes = LanePool(every_lane)
        self.block_rows = staging.n_rows
        self.tables = {
            spec.tag: TableCache(group, i, gpu, self._writer)
            for group in self.groups
            for i, spec in enumerate(group.plan.specs)
        }

    def new_lane(self, n_keys: Sequence[int]) -> Lane:
        """Return a lane with room for some keys of each group; the caller closes it."""
        layouts = [
            LaneLayout(max(1, n), len(group.plan.specs))
            for n, group in zip(n_keys, self.groups, strict=True)
        ]
        return Lane(self.gpu, layouts, self._staging)

    def close(self) -> None:
        """Wait for lookups, and give the memory back; the second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if not self.lanes.close():
            logger.warning(
                "cache=gpu:%d a lookup does not end: its device memory is kept",
                self.gpu.ordinal,
            )
            return
        self._writer.close()
        for group in self.groups:
            group.close()

    def _kernels(self) -> Iterable[KernelSpec]:
        """Return what lookups and writes launch, each once."""
        return dict.fromkeys(
            spec
            for group in self.groups
            for cache in (group.cache, group.stored)
            for spec in cache.kernels(every_one=False)
        )
