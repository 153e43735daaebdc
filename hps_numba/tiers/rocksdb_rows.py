"""Reading and writing the rows of one column family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import TierCorruptionError
from hps_numba.tiers.arguments import check_rows
from hps_numba.tiers.codec import decode_rows, encode_keys, encode_rows
from hps_numba.tiers.rocksdb_store import NAME, Family
from hps_numba.types import Keys, Mask, Progress, RowBlock, Rows, TableSpec

PIECE_KEYS = 4096  # of a fetch, between two looks at the clock
_KEYS_PER_THREAD = 1024


@dataclass(frozen=True)
class Fetch:
    """One call of ``fetch``, to be run in pieces by several threads."""

    spec: TableSpec
    family: Family
    keys: Keys
    out: Rows
    found: Mask
    deadline: float

    def run(self, order: NDArray[np.int64], pool: Executor, threads: int) -> int:
        """Read the keys at the positions of ``order``; return how many were there."""
        n_keys = order.size
        n_pieces = max(
            -(-n_keys // PIECE_KEYS), min(threads, n_keys // _KEYS_PER_THREAD), 1
        )
        if n_pieces == 1:
            return self._piece(order)
        return sum(pool.map(self._piece, np.array_split(order, n_pieces)))

    def _piece(self, positions: NDArray[np.int64]) -> int:
        if not positions.size or monotonic() > self.deadline:
            return 0
        values = self.family.multi_get(encode_keys(self.keys[positions]))
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            positions = positions[[value is not None for value in values]]
        self._check_widths(present, positions)
        rows = decode_rows(present, self.spec.dim, self.spec.numpy_dtype)
        self.out[positions] = rows
        self.found[positions] = True
        return len(present)

    def _check_widths(self, rows: list[bytes], positions: NDArray[np.int64]) -> None:
        widths = set(map(len, rows))
        expected = self.spec.row_bytes
        if widths <= {expected}:
            return
        bad = next(i for i, row in enumerate(rows) if len(row) != expected)
        raise TierCorruptionError(
            f"the row of key {self.keys[positions[bad]]} has {len(rows[bad])} bytes; "
            f"dim {self.spec.dim} of {self.spec.dtype.value} takes {expected}; "
            f"deploy the table again with force",
            tier=NAME,
            tag=self.spec.tag,
        )


class CountedBlocks:
    """Blocks that are checked and counted as they pass by."""

    def __init__(
        self, spec: TableSpec, blocks: Iterable[RowBlock], progress: Progress | None
    ) -> None:
        self._spec = spec
        self._blocks = blocks
        self._progress = progress
        self.n_rows = 0

    def __iter__(self) -> Iterator[RowBlock]:
        for block in self._blocks:
            check_rows(self._spec, block.keys, block.rows)
            self.n_rows += len(block)
            if self._progress is not None:
                self._progress(len(block))
            yield block


def encoded(blocks: Iterable[RowBlock]) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Yield the bytes of keys and rows, block by block."""
    for block in blocks:
        if len(block):
            yield (
                encode_keys(np.ascontiguousarray(block.keys)),
                encode_rows(np.ascontiguousarray(block.rows)),
            )
