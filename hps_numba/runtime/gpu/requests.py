"""What a lookup asks of a GPU cache: its tables, and one query for each group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import N_MISSING, N_UNIQUE_HITS, N_UNIQUE_MISSING
from hps_numba.kernels.cuda.operands import Batch
from hps_numba.runtime.arrays import as_flags, as_keys, as_output, check_length
from hps_numba.runtime.gpu.arrays import (
    DeviceView,
    device_keys,
    device_output,
    is_on_device,
    order,
)
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.lane import GroupLane, Lane
from hps_numba.runtime.gpu.misses import Missing
from hps_numba.runtime.gpu.new_arrays import new_array
from hps_numba.runtime.gpu.table_cache import Group, TableCache
from hps_numba.runtime.session import Asked
from hps_numba.types import Keys, Mask

_WORD = 4  # bytes of a result's word


class Part:
    """One table of a lookup, checked.

    Parameters
    ----------
    asked
        What the caller gave.
    cache
        The table's cache.
    gpu
        Its device.
    stream
        The caller's stream.
    on_device
        Whether the caller wants the rows on the device in any case.

    Attributes
    ----------
    result
        What the caller gets, once the lookup is done.
    start
        Where the part's keys begin among those of its query.
    """

    def __init__(
        self, asked: Asked, cache: TableCache, gpu: Gpu, stream: int, on_device: bool
    ) -> None:
        spec = asked.table.spec
        self.asked, self.cache = asked, cache
        self.keys: DeviceView | Keys
        if is_on_device(asked.keys):
            self.keys = device_keys(asked.keys, spec, stream=stream, gpu=gpu)
            on_device = True
        else:
            self.keys = as_keys(asked.keys, spec)
            check_length(self.keys.size, spec)
            on_device = on_device or is_on_device(asked.out)
        shape, self.n_keys = self.keys.shape, self.keys.size
        self.shape = (*shape, spec.dim)
        self.on_device = on_device
        self.out: DeviceView | None = None
        self.result: Any = asked.out
        self.dtype = np.dtype(np.float32)
        if not on_device:
            self.result = as_output(asked.out, shape, spec)
            self.dtype = self.result.dtype
        elif asked.out is not None:
            self.out = device_output(asked.out, shape, spec, stream=stream, gpu=gpu)
            self.dtype = self.out.dtype
        self.found: Mask | None = None
        if asked.found is not None:
            self.found = as_flags(asked.found, shape, spec).reshape(-1)
        self.start = 0
        self.begin()

    def begin(self) -> None:
        """Count from the start."""
        self.n_defaults = self.n_deferred = self.n_joined = 0
        self.degraded = False

    @property
    def n_bytes(self) -> int:
        """Bytes of the result."""
        return self.n_keys * self.cache.spec.dim * self.dtype.itemsize

    def count(self, ns: int) -> None:
        """Raise the table's counters."""
        counters = self.asked.table.counters
        if self.n_joined or self.degraded or self.n_deferred:
            counters.add(
                joined=self.n_joined,
                degraded=int(self.degraded),
                deferred=self.n_deferred,
            )
        counters.add_lookup(self.n_keys, self.n_defaults, ns)


class GroupQuery:
    """One launch: the parts of a lookup whose tables lie in one group.

    Parameters
    ----------
    group
        The group.
    lane
        Its buffers.
    parts
        The parts, each of another table.
    gpu
        The device.

    Raises
    ------
    ValueError
        If there are more keys than a lane has room for, outputs of two types, or two
        parts of one table.
    """

    def __init__(
        self, group: Group, lane: GroupLane, parts: list[Part], gpu: Gpu
    ) -> None:
        self.lane = lane
        self.parts = sorted(parts, key=lambda part: part.cache.index)
        self._gpu = gpu
        first, last = self.parts[0], self.parts[-1]
        self.first_table = first.cache.index
        self.n_tables = last.cache.index - self.first_table + 1
        self.n_keys = 0
        for i, part in enumerate(self.parts):
            if i and part.cache is self.parts[i - 1].cache:
                raise ValueError(f"table {part.cache.spec.tag} is asked for twice")
            part.start = self.n_keys
            self.n_keys += part.n_keys
            if part.dtype != first.dtype:
                raise ValueError(
                    f"out of {first.cache.spec.tag} is {first.dtype} and that of "
                    f"{part.cache.spec.tag} {part.dtype}; tables that are looked up "
                    f"together give rows of one dtype"
                )
        if self.n_keys > lane.layout.n_keys:
            raise ValueError(
                f"table {first.cache.spec.tag} and those with rows like it: "
                f"{self.n_keys} keys in one lookup exceed {lane.layout.n_keys}"
            )
        self.cache: Cache = group.output(first.dtype)
        self.batch: Batch
        self.out = 0
        self._rows: Any = None  # keeps the output's memory
        self._counted = False  # whether unique hits are among the results

    @staticmethod
    def of(parts: list[Part], cache: GpuCache, lane: Lane) -> list[GroupQuery]:
        """Return the queries of a lookup."""
        queries = []
        for group, group_lane in zip(cache.groups, lane.groups, strict=True):
            members = [part for part in parts if part.cache.group is group]
            if members:
                queries.append(GroupQuery(group, group_lane, members, cache.gpu))
        return queries

    def send(self, stream: int) -> None:
        """Bring the keys together on the device, and make room for their rows."""
        parts, lane = self.parts, self.lane
        for part in parts:
            if part.found is not None:
                part.found.fill(True)
            for given in (part.keys, part.out):
                if isinstance(given, DeviceView):
                    order(given, stream, self._gpu)
        if len(parts) == 1 and isinstance(parts[0].keys, DeviceView):
            address = parts[0].keys.address
        else:
            address = lane.keys_address
            for part in parts:
                self._send_part(part, stream)
        self.use_keys(address, stream)
        self.make_room(stream)

    def use_keys(self, address: int, stream: int) -> None:
        """Take the keys from where they are on the device, one table after another."""
        if len(self.parts) == 1:
            self.batch = Batch(self.n_keys, address, first_table=self.first_table)
            return
        self.lane.send_offsets(self._offsets(), stream)
        self.batch = Batch(
            self.n_keys,
            address,
            self.lane.offsets_address,
            self.n_tables,
            max(part.n_keys for part in self.parts),
            self.first_table,
        )

    def make_room(self, stream: int) -> None:
        """Choose where the rows go."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.out is not None:
            self.out = first.out.address
            return
        self._rows, self.out = new_array(
            (self.n_keys, first.shape[-1]), first.dtype, gpu=self._gpu, stream=stream
        )

    def launch(self, stream: int, threshold: float) -> None:
        """Query; neither allocates nor waits. Misses get default rows below 1."""
        self._counted = 0 < threshold < 1
        if self.n_keys:
            self.cache.query(
                self.batch,
                self.out,
                self.lane.workspace,
                fill=threshold < 1,
                count_unique=self._counted,
                stream=stream,
            )

    def read_results(self, stream: int) -> None:
        """Queue the copy of what ``missing`` needs."""
        if self.n_keys:
            self.lane.read_results(self.n_tables, stream)
        else:
            self.lane.results[: self.n_tables] = 0

    def missing(self) -> Iterator[Missing]:
        """Yield what each table lacks; the results must be here."""
        for part in self.parts:
            results = self.lane.results[part.cache.index - self.first_table].tolist()
            n_missing = results[N_MISSING // _WORD]
            n_unique = results[N_UNIQUE_MISSING // _WORD]
            n_hits = results[N_UNIQUE_HITS // _WORD]
            if self._counted:
                part.asked.table.counters.add_unique(
                    part.cache.name, n_hits + n_unique, n_hits
                )
            if n_missing:
                yield Missing(self, part, n_missing, n_unique, n_hits)

    def finish(self, stream: int) -> None:
        """Bring the rows to where the caller wants them."""
        copied = False
        for part in self.parts:
            address = self.out + part.start * part.shape[-1] * part.dtype.itemsize
            if part.out is not None:
                if part.out.address != address:
                    self._gpu.copy(part.out.address, address, part.n_bytes, stream)
            elif part.on_device:
                part.result = self._part_of_rows(part)
            else:
                target = int(part.result.ctypes.data)
                self._gpu.copy(target, address, part.n_bytes, stream)
                copied = True
        if copied:
            self._gpu.wait(stream)

    def count_error(self) -> None:
        """Count that the lookup failed."""
        for part in self.parts:
            part.asked.table.counters.add(errors=1)

    def _send_part(self, part: Part, stream: int) -> None:
        if isinstance(part.keys, DeviceView):
            target = self.lane.keys_address + 8 * part.start
            self._gpu.copy(target, part.keys.address, 8 * part.n_keys, stream)
        else:
            self.lane.send_keys(part.start, part.keys.reshape(-1), stream)

    def _offsets(self) -> list[int]:
        """Return where each table's keys begin; tables without a part have none."""
        lengths = [0] * (self.n_tables + 1)
        for part in self.parts:
            lengths[part.cache.index - self.first_table + 1] = part.n_keys
        return list(itertools.accumulate(lengths))

    def _part_of_rows(self, part: Part) -> Any:
        """Return a part's rows as an array of its own shape."""
        rows = self._rows[part.start : part.start + part.n_keys]
        return rows.reshape(part.shape)
