"""Sort blocks of rows by key in bounded memory.

Blocks are gathered into runs that fit in memory; each run is sorted, and of a repeated
key the last row stays. One run is the result. More are written to files and merged by
key range: the ranges are cut at sampled keys so that each fits in memory as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hps_numba.types import Keys, RowBlock

RUN_BYTES = 128 << 20
_KEY_BYTES = 8


def sorted_unique(
    blocks: Iterable[RowBlock], directory: Path, *, run_bytes: int = RUN_BYTES
) -> Iterator[RowBlock]:
    """Yield the rows in ascending key order, the last one of each key.

    Parameters
    ----------
    blocks
        In any order, keys repeating at will. A block is a copy or not kept.
    directory
        Where runs are written if one does not hold all rows; the caller removes it.
    run_bytes
        Bytes of keys and rows that are gathered before they are sorted.

    Notes
    -----
    Memory: about twice ``run_bytes``, and a block.
    """
    gathered: list[RowBlock] = []
    spilled: list[RowBlock] = []
    size = 0
    for block in blocks:
        size += block.keys.nbytes + block.rows.nbytes
        gathered.append(RowBlock(block.keys.copy(), block.rows.copy()))
        if size >= run_bytes:
            spilled.append(_spill(_sort(gathered), directory / f"run{len(spilled)}"))
            gathered, size = [], 0
    if gathered:
        spilled.append(_sort(gathered))
        del gathered
    if len(spilled) > 1:
        # Half, since the last run and the caller's block are in memory as well.
        yield from _merge(spilled, run_bytes // 2)
    else:
        yield from spilled


def check_ascending(blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
    """Yield the blocks as they are.

    Raises
    ------
    ValueError
        At the first key that is not greater than the one before it.
    """
    previous = None
    for block in blocks:
        keys = block.keys
        if len(keys):
            if previous is not None and keys[0] <= previous:
                raise ValueError(f"key {keys[0]} follows {previous}: not ascending")
            if not bool((keys[1:] > keys[:-1]).all()):
                where = int(np.argmin(keys[1:] > keys[:-1]))
                raise ValueError(
                    f"key {keys[where + 1]} follows {keys[where]}: not ascending"
                )
            previous = keys[-1]
        yield block


def _sort(blocks: list[RowBlock]) -> RowBlock:
    """Return one block in key order; of a repeated key the last row."""
    keys = np.concatenate([block.keys for block in blocks])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = ordered[1:] != ordered[:-1]
    chosen = order[last]
    places = np.full(len(keys), -1)
    places[chosen] = np.arange(len(chosen))
    rows = np.empty((len(chosen), *blocks[0].rows.shape[1:]), blocks[0].rows.dtype)
    for block in blocks:  # one by one: joined, they would be in memory twice
        there, places = np.split(places, [len(block)])
        rows[there[there >= 0]] = block.rows[there >= 0]
    return RowBlock(ordered[last], rows)


def _spill(run: RowBlock, path: Path) -> RowBlock:
    """Write a run to a file and return it memory-mapped."""
    with path.open("wb") as file:
        run.keys.tofile(file)
        run.rows.tofile(file)
    keys = np.memmap(path, np.int64, "r", shape=run.keys.shape)
    rows = np.memmap(path, run.rows.dtype, "r", run.keys.nbytes, run.rows.shape)
    return RowBlock(keys, rows)


def _merge(runs: list[RowBlock], run_bytes: int) -> Iterator[RowBlock]:
    row_bytes = _KEY_BYTES + runs[0].rows.itemsize * runs[0].rows.shape[1]
    starts = [0] * len(runs)
    for bound in [*_cuts(runs, max(1, run_bytes // row_bytes)), None]:
        parts = []
        for i, run in enumerate(runs):
            stop = len(run) if bound is None else int(np.searchsorted(run.keys, bound))
            part = slice(starts[i], stop)
            parts.append(RowBlock(run.keys[part], run.rows[part]))
            starts[i] = stop
        yield _sort(parts)


def _cuts(runs: list[RowBlock], rows: int) -> Keys:
    """Return ascending keys between which all runs together hold at most ``rows``.

    Between two cuts lie at most ``len(runs)`` samples, hence that many strides, and
    each run may add one more stride that it began before.
    """
    stride = max(1, rows // (2 * len(runs)))
    samples = np.sort(np.concatenate([run.keys[::stride] for run in runs]))
    cuts: Keys = np.unique(samples[len(runs) :: len(runs)])
    return cuts
