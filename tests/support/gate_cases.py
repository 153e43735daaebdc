"""The kernels and shapes that the compile gate looks at."""

from __future__ import annotations

from dataclasses import dataclass

from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.dump import dump_kernel
from hps_numba.kernels.cuda.evict import clear_kernel, evict_kernel
from hps_numba.kernels.cuda.insert import insert_kernel
from hps_numba.kernels.cuda.layout import Policy, RowLayout, widest
from hps_numba.kernels.cuda.pooled import pooled_query_kernel, pooled_scatter_kernel
from hps_numba.kernels.cuda.query import query_kernel
from hps_numba.kernels.cuda.scatter import scatter_kernel
from hps_numba.kernels.cuda.update import update_kernel

# Widths of every unit, rows of less than a warp, of a warp, and of many.
DIMS = (1, 3, 16, 32, 64, 128, 256, 1000)


@dataclass(frozen=True)
class Case:
    """A kernel, and how its rows move.

    Parameters
    ----------
    spec
        The kernel.
    load_bytes, store_bytes
        What a lane loads and stores of a row at once; 0 for a kernel without rows.
    units
        How many of these a lane has to move, which bounds what can be in flight.
    """

    spec: KernelSpec
    load_bytes: int = 0
    store_bytes: int = 0
    units: int = 0


def cases() -> list[Case]:
    """Return every kernel in the shapes that differ."""
    small = (
        *map(evict_kernel, (Policy.LRU, Policy.STATIC)),
        clear_kernel(),
        dump_kernel(),
    )
    found = [Case(spec) for spec in small]
    for rows in row_layouts():
        found.append(_reading(query_kernel(rows, Policy.LRU), rows))
        if rows.out == rows.stored:
            found.append(_writing(insert_kernel(rows, Policy.LRU), rows))
    for rows in (RowLayout(32), RowLayout(128, "float16", "float32"), RowLayout(3)):
        found += [
            _reading(scatter_kernel(rows), rows),
            _reading(pooled_query_kernel(rows, Policy.LRU), rows),
            _reading(pooled_scatter_kernel(rows), rows),
            _writing(update_kernel(rows, Policy.LRU), rows),
        ]
    rows = RowLayout(32)
    found += [
        _reading(query_kernel(rows, Policy.LFU), rows),
        _writing(insert_kernel(rows, Policy.LFU), rows),
        _reading(query_kernel(rows, Policy.LRU, touch=False), rows),
    ]
    for rows in (RowLayout(32), RowLayout(128, "float16", "float32"), RowLayout(3)):
        found += [
            _reading(query_kernel(rows, Policy.STATIC), rows),
            _reading(pooled_query_kernel(rows, Policy.STATIC), rows),
            _writing(insert_kernel(rows, Policy.STATIC), rows),
            _writing(update_kernel(rows, Policy.STATIC), rows),
        ]
    return found


def _reading(spec: KernelSpec, rows: RowLayout) -> Case:
    """A warp hands out 32 rows: a lane moves as many units as a row has."""
    return Case(spec, rows.load_bytes, rows.store_bytes, rows.units)


def _writing(spec: KernelSpec, rows: RowLayout) -> Case:
    """A warp keeps one row, as it came in."""
    n_bytes = widest(rows.row_bytes)
    return Case(spec, n_bytes, n_bytes, -(-rows.row_bytes // (32 * n_bytes)))


def row_layouts() -> list[RowLayout]:
    """Return every dimension of float32 rows, and of the others one of each unit."""
    return [
        RowLayout(dim, stored, out)
        for stored, out, dims in (
            ("float32", "float32", DIMS),
            ("float16", "float16", (1, 3, 32, 1000)),
            ("bfloat16", "bfloat16", (3, 128)),
            ("float16", "float32", (1, 64, 1000)),
            ("bfloat16", "float32", (3, 128)),
        )
        for dim in dims
    ]
