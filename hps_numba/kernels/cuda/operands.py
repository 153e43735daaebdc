"""What the operations of a cache are given, all of it in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.layout import WorkLayout

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


@dataclass(frozen=True)
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
        if not 1 <= self.n_tables <= MAX_TABLES:
            raise ValueError(
                f"n_tables={self.n_tables} is not between 1 and {MAX_TABLES}"
            )

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
