"""What the operations of a cache are given, all of it in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.layout import WorkLayout

WARP = 32
MAX_TABLES = 65535  # of one launch: the grid's limit in y


class Launcher(Protocol):
    """Whoever runs kernels: a device, or a stand-in for one."""

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        """Queue a kernel on a stream."""


@dataclass(frozen=True)
class Workspace:
    """Device memory for the misses of one lookup at a time."""

    layout: WorkLayout
    base: int


@dataclass(slots=True)  # frozen ones take longer to make
class Batch:
    """What a launch works on, in device memory.

    Parameters
    ----------
    n
        Keys, or bags of a pooled query; of all tables together.
    keys
        Address of int64 keys.
    offsets
        Address of uint64 (n_tables + 1,), where each table's part begins; 0 if all is
        table 0's.
    n_tables, first_table
        Which tables of the cache the parts are for; ``offsets`` counts from the first.
    n_longest
        Keys or bags of the longest table; ``n`` unless given.
    """

    n: int
    keys: int
    offsets: int = 0
    n_tables: int = 1
    n_longest: int | None = None
    first_table: int = 0

    def __post_init__(self) -> None:
        """Refuse tables that no grid has."""
        if not 1 <= self.n_tables <= MAX_TABLES:
            raise ValueError(
                f"n_tables={self.n_tables} is not between 1 and {MAX_TABLES}"
            )
        if self.first_table < 0:
            raise ValueError(f"first_table={self.first_table} is negative")

    def check(self, n_keys: int, work: Workspace, n_held: int) -> None:
        """Raise ValueError if workspace or cache have too little for the batch."""
        if n_keys > work.layout.n_keys:
            raise ValueError(
                f"{n_keys} keys exceed the workspace's {work.layout.n_keys}"
            )
        end = self.first_table + self.n_tables
        if self.n_tables > work.layout.n_tables or end > n_held:
            raise ValueError(
                f"{self.n_tables} tables from table {self.first_table} on exceed the "
                f"workspace's {work.layout.n_tables} or the cache's {n_held}"
            )

    def check_table(self, table: int) -> None:
        """Raise ValueError if a table is none of the batch's."""
        if not 0 <= table < self.n_tables:
            raise ValueError(f"table {table} is none of the query's {self.n_tables}")

    def grid(self, per_block: int) -> tuple[int, int]:
        """Return a grid of one block a table at least: an empty launch reports, too."""
        longest = self.n if self.n_longest is None else self.n_longest
        return max(1, -(-longest // per_block)), self.n_tables


@dataclass(frozen=True)
class Bags:
    """How the keys of a pooled query are grouped.

    Parameters
    ----------
    begins
        Address of uint64 (n_bags + 1,): where each bag's keys begin, and the end.
    n_keys
        Keys of all bags.
    weights
        Address of float32 (n_keys,), or 0.
    mean
        Whether sums are divided by the number of the bag's keys.
    """

    begins: int
    n_keys: int
    weights: int = 0
    mean: bool = False


def check_aligned(values: int, n_bytes: int) -> None:
    """Raise ValueError if an address of rows is not a multiple of ``n_bytes``."""
    if values % n_bytes:
        raise ValueError(f"values={values:#x} are not aligned to {n_bytes} bytes")


def warps(spec: KernelSpec, n: int) -> tuple[int, int]:
    """Return the grid of a kernel that takes a warp for each of ``n``."""
    return -(-n * WARP // spec.block), 1
