"""Sizes, axes and goals of the benchmarks on a GPU, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from bench.gpu.baselines import Libraries
from bench.gpu.device import Device
from bench.gpu.records import Line, Sink
from bench.harness import Plan
from hps_numba.kernels.cuda.layout import RowLayout

_T = TypeVar("_T")

SEED = 20_240_601
ZIPF = 1.05
KEYS_A_BAG = 32


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Tables take ``table_bytes`` of rows each, or ``max_slots`` rows; what a launch reads
    and writes rotates over ``pool`` keys. One axis varies at a time around the centre:
    ``n`` uniform unique keys, all hits, rows of ``dim`` float32, a table filled to
    ``load``.
    """

    table_bytes: int = 8 << 30
    max_slots: int = 1 << 24
    pool: int = 1 << 22
    n: int = 1 << 20
    dim: int = 128
    load: float = 0.75
    batches: tuple[int, ...] = tuple(1 << b for b in (10, 12, 14, 16, 18, 22))
    hit_rates: tuple[float, ...] = (0.99, 0.95, 0.9, 0.5)
    loads: tuple[float, ...] = (0.5, 1.0)
    dims: tuple[int, ...] = (16, 32, 64, 128, 256)
    copy_bytes: int = 2 << 30
    sector_bytes: tuple[int, ...] = (1 << 28, 1 << 30, 1 << 32)
    small_keys: int = 2000
    small_rows: int = 630_000
    small_dim: int = 16
    n_tables: int = 26
    table_keys: tuple[int, ...] = (128, 4096)
    table_rows: int = 1 << 15

    def n_slots(self, rows: RowLayout) -> int:
        """Return how many rows a table of such rows has room for."""
        return min(self.max_slots, self.table_bytes // rows.stride_bytes)

    def within(self, free_bytes: int) -> Sizes:
        """Return the same for a device with so much memory, smaller where it is little.

        Three tables with what is beside them take some twelve times ``table_bytes``.
        """
        return replace(
            self,
            table_bytes=min(self.table_bytes, free_bytes // 16),
            pool=min(self.pool, free_bytes // 4 // 2048),
            copy_bytes=min(self.copy_bytes, free_bytes // 8),
            sector_bytes=tuple(n for n in self.sector_bytes if n <= free_bytes // 4),
        )


FULL = Sizes()
SMOKE = Sizes(
    table_bytes=28 * 80 * 128,
    max_slots=28 * 80,
    pool=512,
    n=256,
    dim=32,
    batches=(32,),
    hit_rates=(0.5,),
    loads=(1.0,),
    dims=(32,),
    copy_bytes=4096,
    sector_bytes=(4096,),
    small_keys=64,
    small_rows=300,
    small_dim=32,
    n_tables=3,
    table_keys=(16,),
    table_rows=40,
)

# Short rounds, many of them: slow drifts of the clocks touch all variants alike.
FULL_PLAN = Plan(rounds=25, slice_s=0.002, budget_s=1.0)
HOST_PLAN = Plan(rounds=25, slice_s=0.01, budget_s=3.0)
SMOKE_PLAN = Plan(rounds=1, slice_s=0, budget_s=0)

# Keys a second of the look-up at the centre, by dim.
RATE_GOALS = {128: 3.3e9, 64: 5e9, 32: 8e9, 16: 8e9}
GATHER_GOAL = 0.9  # of the fastest plain gather
INSERT_GOAL = 0.5  # of the look-up
CALL_GOAL_S = 15e-6  # a small lookup's time on the host
DONE_GOAL_S = 30e-6  # until it is done

CHECKS_S = 210.0  # of the whole run, for everything up to the checks


@dataclass
class Run:
    """What benchmarks are given, and what is left of the time.

    Parameters
    ----------
    smoke
        Whether everything is tiny.
    seconds_left
        Of the whole run.
    checks_left
        Of the checks.
    copy_rate
        Bytes a second that a copy reads and writes, once it is known.
    not_run
        What there was no time for, or no room, by its name.
    """

    device: Device
    libraries: Libraries
    sizes: Sizes
    plan: Plan
    host_plan: Plan
    sink: Sink
    smoke: bool
    seconds_left: Callable[[], float]
    checks_left: Callable[[], float]
    copy_rate: float = 0.0
    not_run: dict[str, str] = field(default_factory=dict)

    def within(self, name: str, points: Iterable[_T]) -> Iterator[_T]:
        """Yield points while there is time; note those that there is none for."""
        for point in points:
            if self.seconds_left() > 0:
                yield point
            else:
                self.not_run[f"{name}, {point}"] = "no time left"

    def write(self, line: Line) -> None:
        """Keep a result."""
        self.sink.write(line)
