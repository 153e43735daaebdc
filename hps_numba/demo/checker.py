"""Checks that every row that was returned is one that may be returned.

A lookup may return version v of a key if v is at least the newest version that was
acknowledged, or seen, before the lookup began, and at most the newest whose update has
begun. The row must be that version's, bit for bit, and ``found`` must tell whether it
is a version or the default row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hps_numba.demo.values import UNKNOWN, known_rows
from hps_numba.demo.workload import Positions, TableLoad
from hps_numba.types import Mask

Versions = NDArray[np.int32]

_MAX_EXAMPLES = 5


class VersionLedger:
    """The newest version of each of a table's ids that was begun, and acknowledged.

    Invariant: ``begun`` is raised before an update is sent and ``acknowledged`` after
    it returned, so whoever reads ``acknowledged`` before a lookup and ``begun`` after
    it has the bounds of what the lookup may return.

    Notes
    -----
    One thread writes. Others read without a lock: each number is the old or the new
    one, and an acknowledgement that a reader misses only makes its check milder.
    """

    def __init__(self, table: TableLoad) -> None:
        self.begun: Versions = table.trained.astype(np.int32)
        self.acknowledged: Versions = self.begun.copy()


@dataclass(frozen=True)
class Answer:
    """What a lookup returned for n ids of a table.

    Parameters
    ----------
    positions
        int32 (n,): where in the table's ids the keys are.
    rows
        float32 (n, dim).
    found
        bool (n,).
    """

    positions: Positions
    rows: NDArray[np.float32]
    found: Mask

    @classmethod
    def of(cls, positions: Positions, rows: NDArray[np.float32], found: Mask) -> Answer:
        """Flatten what was returned for positions of any shape S, rows S + (dim,)."""
        flat = positions.reshape(-1)
        return cls(flat, rows.reshape(len(flat), -1), found.reshape(-1))

    def __getitem__(self, selected: NDArray[np.int64] | slice) -> Answer:
        return Answer(
            self.positions[selected], self.rows[selected], self.found[selected]
        )

    def is_version(self, table: TableLoad, versions: Versions) -> Mask:
        """Return which rows and marks are exactly those of the given versions (n,)."""
        keys = table.ids[self.positions]
        expected = known_rows(
            table.salt, keys, versions, dim=table.dim, default=table.default
        )
        same = self.rows.view(np.uint32) == expected.view(np.uint32)
        matches: Mask = same.all(axis=1) & (self.found == (versions > UNKNOWN))
        return matches


@dataclass
class Tally:
    """How many rows were checked, and which were wrong."""

    rows: int = 0
    defaults: int = 0
    early: int = 0  # rows of an update that was not acknowledged when the lookup began
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def wrong_rows(self) -> int:
        """Number of rows that may not be returned."""
        return sum(self.wrong.values())

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.rows += other.rows
        self.defaults += other.defaults
        self.early += other.early
        self.wrong += other.wrong
        self.examples = (self.examples + other.examples)[:_MAX_EXAMPLES]


class RowChecker:
    """Checks the rows of one table, for one thread.

    Parameters
    ----------
    table
        The table.
    ledger
        What the updater noted.
    """

    def __init__(self, table: TableLoad, ledger: VersionLedger) -> None:
        self.tally = Tally()
        self._table = table
        self._ledger = ledger
        self._seen = np.zeros(len(table.ids), np.int32)  # newest version, per id

    def oldest(self, positions: Positions) -> Versions:
        """Return the oldest versions that a lookup that begins now may return.

        Positions may have any shape; the result is int32 (n,).
        """
        asked = positions.reshape(-1)
        return np.maximum(self._ledger.acknowledged[asked], self._seen[asked])

    def check(self, answer: Answer, oldest: Versions) -> int:
        """Check an answer and return the number of wrong rows.

        Parameters
        ----------
        answer
            What the lookup returned.
        oldest
            int32 (n,): what ``oldest`` returned before the lookup began.
        """
        self.tally.rows += len(answer.positions)
        self.tally.defaults += int(np.count_nonzero(~answer.found))
        suspects = np.flatnonzero(~answer.is_version(self._table, oldest))
        if not len(suspects):
            return 0
        early = self._accept_early(answer[suspects], oldest[suspects])
        wrong = suspects[~early]
        for row in wrong:
            self._note_wrong(answer[row : row + 1], int(oldest[row]))
        return len(wrong)

    def _accept_early(self, answer: Answer, oldest: Versions) -> Mask:
        """Return which rows are of a version that was begun but not acknowledged."""
        newest = self._ledger.begun[answer.positions]
        accepted = np.zeros(len(newest), np.bool_)
        for version in range(int(oldest.min()) + 1, int(newest.max()) + 1):
            matches = answer.is_version(self._table, np.full_like(newest, version))
            matches &= (oldest < version) & (version <= newest)
            np.maximum.at(self._seen, answer.positions[matches], version)
            accepted |= matches
        self.tally.early += int(np.count_nonzero(accepted))
        return accepted

    def _note_wrong(self, answer: Answer, oldest: int) -> None:
        """Count a wrong row and keep a few of them as examples."""
        position = int(answer.positions[0])
        newest = int(self._ledger.begun[position])
        kind = self._kind(answer, oldest, newest)
        self.tally.wrong[kind] += 1
        if len(self.tally.examples) < _MAX_EXAMPLES:
            self.tally.examples.append(
                f"table {self._table.name}, key {self._table.ids[position]}: {kind}; "
                f"versions {oldest} to {newest} are right; found={answer.found[0]}, "
                f"the row begins with {answer.rows[0, :3].tolist()}"
            )

    def _kind(self, answer: Answer, oldest: int, newest: int) -> str:
        """Name what is wrong with a row."""
        for version in range(UNKNOWN, newest + 2):
            known = np.array([version > UNKNOWN])
            marked = Answer(answer.positions, answer.rows, known)
            if marked.is_version(self._table, np.array([version], np.int32))[0]:
                return _kind_of_version(version, oldest, newest)
        return "not a row of this key"


def _kind_of_version(version: int, oldest: int, newest: int) -> str:
    if oldest <= version <= newest:
        return "found is wrong"
    if version == UNKNOWN:
        return "default row of a known key"
    return "stale version" if version < oldest else "version that was not sent"
