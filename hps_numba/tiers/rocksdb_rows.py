"""Reading and writing the rows of one column family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import compress
from time import monotonic
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import TierCorruptionError
from hps_numba.tiers.arguments import check_rows
from hps_numba.tiers.codec import decode_keys, decode_rows, encode_keys, encode_rows
from hps_numba.tiers.rocksdb_errors import NAME
from hps_numba.tiers.rocksdb_family import Batch, Family
from hps_numba.tiers.rocksdb_positions import pair_of
from hps_numba.types import Keys, Mask, Progress, RowBlock, Rows, StreamSpan, TableSpec

EncodedPairs: TypeAlias = Iterator[tuple[list[bytes], list[bytes] | None]]
"""Some keys at a time, and their rows; None removes them."""

PIECE_KEYS = 4096  # that are objects at a time; a fetch then looks at the clock
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
        pieces = [
            pool.submit(self._piece, piece) for piece in np.array_split(order, n_pieces)
        ]
        wait(pieces)  # also if one fails: they write to the caller's arrays
        return sum(piece.result() for piece in pieces)

    def _piece(self, positions: NDArray[np.int64]) -> int:
        if not positions.size or monotonic() > self.deadline:
            return 0
        keys = encode_keys(self.keys[positions])
        values = self.family.multi_get(keys)
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            known = [value is not None for value in values]
            positions, keys = positions[known], list(compress(keys, known))
        self.out[positions] = rows_of(self.spec, keys, present)
        self.found[positions] = True
        return len(present)


def rows_of(spec: TableSpec, keys: Sequence[bytes], values: Sequence[bytes]) -> Rows:
    """Return stored rows as an array (n, dim), read-only.

    Raises
    ------
    TierCorruptionError
        If one has another width than the rows of the table.
    """
    if not set(map(len, values)) <= {spec.row_bytes}:
        bad = next(i for i, row in enumerate(values) if len(row) != spec.row_bytes)
        raise TierCorruptionError(
            f"the row of key {decode_keys(keys[bad : bad + 1])[0]} has "
            f"{len(values[bad])} bytes; dim {spec.dim} of {spec.dtype.value} takes "
            f"{spec.row_bytes}: restore the database, or deploy the table with force",
            tier=NAME,
            tag=spec.tag,
        )
    return decode_rows(values, spec.dim, spec.numpy_dtype)


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


def encoded(blocks: Iterable[RowBlock]) -> EncodedPairs:
    """Yield the bytes of keys and rows, some at a time."""
    for block in blocks:
        for low in range(0, len(block), PIECE_KEYS):
            piece = slice(low, low + PIECE_KEYS)
            yield encode_keys(block.keys[piece]), encode_rows(block.rows[piece])


def encoded_span(
    keys: Keys, rows: Rows | None, order: NDArray[np.int64], span: StreamSpan
) -> EncodedPairs:
    """Yield a span's keys in this order, with rows if there are, and its position."""
    for low in range(0, keys.size, PIECE_KEYS):
        piece = order[low : low + PIECE_KEYS]
        yield (
            encode_keys(keys[piece]),
            None if rows is None else encode_rows(rows[piece]),
        )
    key, value = pair_of(span.partition, span.until)
    yield [key], [value]


def fill(batch: Batch, family: Family, keys: Keys, rows: Rows | None) -> None:
    """Add pairs, or without rows removals, to a batch."""
    if rows is None:
        batch.delete_all(family, encode_keys(keys))
    else:
        batch.put_all(family, encode_keys(keys), encode_rows(rows))
