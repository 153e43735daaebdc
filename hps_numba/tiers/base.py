"""The contract of a storage tier.

``hps_numba.tiers.testing.TierContract`` tests it; a new tier is done when it passes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hps_numba.types import (
    Keys,
    Mask,
    Position,
    Progress,
    RowBlock,
    Rows,
    StreamSpan,
    TableSpec,
)

Epoch: TypeAlias = int | tuple[int, ...]
"""Update epoch of a table in one tier. Those of one tier object are of one kind and are
ordered; beyond that they mean something to that object alone."""


@dataclass(frozen=True)
class TierStats:
    """Counters of one table in one tier, since the table was opened."""

    rows: int  # may be an estimate where counting would read the whole table
    bytes: int  # memory or disk that the table's rows and index take
    evictions: int = 0  # rows that overflow handling removed
    refused_backfills: int = 0  # rows that were updated while they were being fetched
    dropped_rows: int = 0  # rows that found no room
    down: tuple[str, ...] = ()  # servers that do not answer now


class Tier(ABC):
    """Storage for many tables, below the GPU cache.

    Key arrays are int64, one-dimensional and contiguous, and hold each key once.
    Row arrays have the dtype and dim that the table was opened with, are C-contiguous,
    and are not kept: a tier copies what it stores. Every int64 is a valid key.

    All methods may be called from several threads at once, except that ``close`` waits
    for none of them. The tier serialises the writers of one table, in some order.

    Notes
    -----
    *No resurrection.* A lookup that found nothing here reads a lower tier and gives the
    rows to ``backfill``. Meanwhile the same keys may be updated. So a caller reads
    ``epoch`` before the lower tier, and ``backfill`` refuses every key that was written
    after that epoch or is held. A caller that changes several tiers holds the keys in
    the upper ones from before it writes the lowest until it has written them all. Holds
    of one table do not nest.
    """

    name: str
    """Short name, used in statistics and errors."""

    local: bool
    """Whether asking this tier costs less than asking what is in flight."""

    in_turn: bool = False
    """Whether it answers one chunk of a lookup after the other, however many ask."""

    @abstractmethod
    def open_table(self, spec: TableSpec, *, max_bytes: int | None = None) -> None:
        """Create the table, or open what an earlier process left.

        Parameters
        ----------
        spec
            The table. Opening it twice with an equal shape is harmless.
        max_bytes
            Most bytes that the table may take here, if the tier has a budget.

        Raises
        ------
        ConfigError
            If the tier holds the table with another dim or dtype, or ``max_bytes`` is
            too small for a single row.
        """

    @abstractmethod
    def fetch(
        self,
        tag: str,
        keys: Keys,
        out: Rows,
        found: Mask,
        *,
        budget_s: float = math.inf,
    ) -> int:
        """Copy the rows of known keys to ``out`` and mark them in ``found``.

        Entries of ``found`` that are already true are skipped. A missing key is not an
        error: its row of ``out`` is unspecified then. Keys may repeat here.

        Parameters
        ----------
        tag
            Tag of an open table.
        keys
            int64 (n,).
        out
            (n, dim), in the table's dtype.
        found
            bool (n,), read and written.
        budget_s
            Seconds that the call should stay below. Soft: what is not resolved in time
            stays unmarked.

        Returns
        -------
        int
            Number of entries that this call marked.

        Raises
        ------
        UnknownTableError
            If the table is not open.
        TierError
            If the tier cannot answer.
        """

    def fetch_and_tell(
        self, tag: str, keys: Keys, out: Rows, found: Mask, asked: Callable[[], None]
    ) -> int:
        """Fetch; a tier that answers in turn calls ``asked`` when it has asked for all.

        It works on what is left while the next one asks.
        """
        return self.fetch(tag, keys, out, found)

    @abstractmethod
    def insert(self, tag: str, keys: Keys, rows: Rows) -> None:
        """Store the newest rows of keys, replacing what is there."""

    @abstractmethod
    def delete(self, tag: str, keys: Keys) -> int:
        """Remove keys for good and return how many were there.

        Differs from ``evict`` in that a later ``backfill`` of these keys is refused.
        """

    @abstractmethod
    def load(
        self,
        tag: str,
        blocks: Iterable[RowBlock],
        *,
        progress: Progress | None = None,
    ) -> int:
        """Replace all rows of the table; of a repeated key the last row wins.

        Readers see the old rows or the new ones. Backfills begun before are refused.

        Returns
        -------
        int
            Number of rows given.
        """

    @abstractmethod
    def epoch(self, tag: str) -> Epoch:
        """Return the table's update epoch; it grows with every write. Cheap."""

    @abstractmethod
    def hold(self, tag: str, keys: Keys | None = None) -> AbstractContextManager[None]:
        """Refuse backfills of these keys (of all, if None) while the context lasts.

        Backfills that began before the context ends stay refused after it.
        """

    @abstractmethod
    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        """Store rows that a lower tier gave, unless their keys changed since ``epoch``.

        Returns
        -------
        int
            Number of rows stored.
        """

    def arrange(self, tag: str, keys: Keys) -> NDArray[np.int64] | None:
        """Return the order in which the tier answers these keys fastest, if any.

        Returns
        -------
        numpy.ndarray or None
            Every position of ``keys`` once; None if one order is as good as another.
        """
        return None

    @abstractmethod
    def evict(self, tag: str, keys: Keys | None = None) -> int:
        """Forget keys (all, if None); a lower tier may bring them back."""

    @abstractmethod
    def iterate(self, tag: str, *, block_rows: int = 65_536) -> Iterator[RowBlock]:
        """Yield the rows in blocks, each key at most once.

        Rows written while it runs may or may not be among them; each row is whole.
        """

    @abstractmethod
    def tables(self, model: str) -> list[str]:
        """Return the sorted names of the model's tables that are stored here."""

    @abstractmethod
    def size(self, tag: str) -> int:
        """Return the exact number of rows; may read the whole table."""

    @abstractmethod
    def stats(self, tag: str) -> TierStats:
        """Return the table's counters; cheap, and no error if the tier is down."""

    @abstractmethod
    def drop_table(self, tag: str) -> None:
        """Remove the table and its rows; unknown tables are ignored."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; the second call does nothing."""


class LastingTier(Tier):
    """A tier that outlives the process, and remembers where its rows came from."""

    @abstractmethod
    def load(
        self,
        tag: str,
        blocks: Iterable[RowBlock],
        *,
        progress: Progress | None = None,
        ascending: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> int:
        """Replace all rows of the table at once, as ``Tier.load``.

        Parameters
        ----------
        tag, blocks, progress
            As for ``Tier.load``.
        ascending
            The keys ascend over all blocks and none repeats.
        fingerprint
            Describes the origin of the rows, as JSON; stored with them.
        """

    @abstractmethod
    def fingerprint(self, tag: str) -> dict[str, Any] | None:
        """Return what the last ``load`` of the table was given, or None."""

    @abstractmethod
    def apply(self, tag: str, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        """Write what a span of the table's update stream brings, exactly once.

        Rows and position change together, at once for readers or in parts; a process
        that is killed leaves the tier at ``span.since``, at ``span.until``, or, where
        the tier has parts, each of them at one of the two.

        Parameters
        ----------
        tag
            Tag of an open table.
        keys
            int64 (n,), each key once; n may be 0.
        rows
            (n, dim), the newest rows of the keys in the span; None if the span deletes
            them.
        span
            What it is.

        Returns
        -------
        int
            Keys that were written. Those that are missing had been written by this
            span or a later one.

        Raises
        ------
        StreamGapError
            If records between the tier's position and ``span.since`` are missing;
            nothing is written then. A tier without a position begins anywhere.
        TierError
            If it cannot be written; the call may be repeated.
        """

    @abstractmethod
    def positions(self, tag: str) -> dict[int, Position]:
        """Return how far each partition of the table's update stream was applied."""

    @abstractmethod
    def seek(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Set positions, forwards or backwards; rows stay as they are."""

    def begin_stream(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Set the positions of partitions of the stream that have none.

        To be called before the first ``apply``: a tier that was not reached by it, or
        only in parts, is known to lack it then.
        """
        known = self.positions(tag)
        self.seek(tag, {p: at for p, at in positions.items() if p not in known})

    def lower_positions(self, tag: str, positions: Mapping[int, Position]) -> None:
        """Note how far the tier below has the table's update stream.

        To be called when the table was opened and is about to follow the stream; from
        then on ``apply`` and ``seek`` tell. A tier that several processes share takes
        backfills only from those whose tier below lacks nothing that it has itself.
        """
        return  # a tier of one process is never ahead of what backfills it

    def loading(self, tag: str) -> AbstractContextManager[None]:
        """Keep other processes from loading the table while the context lasts.

        Who waited for another process looks at ``fingerprint`` again: the other one may
        have loaded the same files. A tier of one process has nobody to wait for.
        """
        return nullcontext()


class PersistentTier(LastingTier):
    """A lasting tier that only this process writes."""

    read_only: bool
    """Whether every write is refused."""

    @abstractmethod
    def untouched(self, tag: str) -> bool:
        """Return whether the table holds just the rows of its last ``load``."""
