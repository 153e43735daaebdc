"""Sends new versions of rows while the requests are replayed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hps_numba.demo.checker import Answer, Tally, VersionLedger, Versions
from hps_numba.demo.deployment import TRAINED_VERSION
from hps_numba.demo.values import UNKNOWN, known_rows
from hps_numba.demo.workload import Positions, TableLoad, Workload

if TYPE_CHECKING:
    from hps_numba.runtime.hps import HPS

ROUNDS = 4
"""New versions that each updated row gets."""

_BATCH_ROWS = 128


@dataclass(frozen=True)
class UpdateBatch:
    """Rows of one table that get a new version in one call."""

    table: TableLoad
    positions: Positions
    versions: Versions


@dataclass(frozen=True)
class UpdateRecord:
    """Times of one update: when it was sent, and how long until two events.

    ``acknowledged_s`` ends when the update returns, ``visible_s`` when a lookup that
    was sent right after that has returned the new rows: an upper bound of the
    staleness.
    """

    sent_s: float
    acknowledged_s: float
    visible_s: float
    n_rows: int


def plan_updates(workload: Workload, share: float, seed: int) -> list[UpdateBatch]:
    """Choose rows by how often they are asked for, and deal them out in batches.

    Rows that the model was not trained on may be among them: their first version makes
    them known.
    """
    rng = np.random.default_rng(seed)
    chosen = [(table, _choose(table, share, rng)) for table in workload.tables]
    plan: list[UpdateBatch] = []
    for number in range(1, ROUNDS + 1):
        batches = [
            batch
            for table, positions in chosen
            for batch in _deal(table, rng.permutation(positions), number)
        ]
        plan += [batches[i] for i in rng.permutation(len(batches))]
    return plan


def _choose(table: TableLoad, share: float, rng: np.random.Generator) -> Positions:
    """Return distinct positions; a row that is asked more often is likelier."""
    uses = np.bincount(table.positions.reshape(-1), minlength=len(table.ids))
    n_rows = round(share * np.count_nonzero(uses))
    chosen = rng.choice(len(uses), n_rows, replace=False, p=uses / uses.sum())
    return chosen.astype(np.int32)


def _deal(table: TableLoad, positions: Positions, number: int) -> list[UpdateBatch]:
    first = np.where(table.trained[positions], TRAINED_VERSION, UNKNOWN)
    versions = (first + number).astype(np.int32)
    return [
        UpdateBatch(
            table, positions[i : i + _BATCH_ROWS], versions[i : i + _BATCH_ROWS]
        )
        for i in range(0, len(positions), _BATCH_ROWS)
    ]


def _rows(batch: UpdateBatch) -> NDArray[np.float32]:
    table = batch.table
    keys = table.ids[batch.positions]
    return known_rows(
        table.salt, keys, batch.versions, dim=table.dim, default=table.default
    )


class Updater:
    """A thread that sends a plan, spread evenly over the replay.

    Parameters
    ----------
    server
        The server that is updated.
    workload
        Names the model.
    ledgers
        Per table, where versions are noted.
    plan
        The batches, in the order in which they are sent.

    Notes
    -----
    The replay calls ``advance``; leaving the context waits for the thread. Both raise
    what ended it, if anything did. ``tally`` and ``records`` belong to the thread until
    the context is left.
    """

    def __init__(
        self,
        server: HPS,
        workload: Workload,
        *,
        ledgers: Mapping[str, VersionLedger],
        plan: list[UpdateBatch],
    ) -> None:
        self.tally = Tally()
        self.records: list[UpdateRecord] = []
        self._server = server
        self._model = workload.model
        self._session = server.session(workload.model)
        self._ledgers = ledgers
        self._plan = plan
        self._changed = threading.Condition()
        self._share = 0.0  # guarded by _changed
        self._stopped = False  # guarded by _changed
        self._failure: BaseException | None = None  # set when the thread ends
        self._thread = threading.Thread(target=self._run, name="hps-demo-updater")

    def __enter__(self) -> Updater:
        self._thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self._changed:
            self._stopped = failed is not None
            self._share = 1.0
            self._changed.notify()
        self._thread.join()
        if self._failure is not None and failed is None:
            raise self._failure

    def advance(self, share: float) -> None:
        """Tell how much of the replay is done; batches up to there are sent.

        Raises what ended the thread, if anything did.
        """
        if self._failure is not None:
            raise self._failure
        with self._changed:
            self._share = share
            self._changed.notify()

    def _run(self) -> None:
        try:
            for number, batch in enumerate(self._plan):
                rows = _rows(batch)  # ready before the replay gets there
                if not self._reached(number / len(self._plan)):
                    return
                self._send(batch, rows)
        except BaseException as exc:  # __exit__ raises it in the caller's thread
            self._failure = exc

    def _reached(self, share: float) -> bool:
        """Wait until the replay is that far; return False if it was broken off."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._share >= share)
            return not self._stopped

    def _send(self, batch: UpdateBatch, rows: NDArray[np.float32]) -> None:
        """Send one batch, look it up again, and check that it is there."""
        table, ledger = batch.table, self._ledgers[batch.table.name]
        keys = table.ids[batch.positions]
        found = np.zeros(len(keys), np.bool_)
        ledger.begun[batch.positions] = batch.versions
        sent = monotonic()
        self._server.update(self._model, table.name, keys, rows)
        acknowledged = monotonic()
        ledger.acknowledged[batch.positions] = batch.versions
        seen = self._session.lookup(table.name, keys, found=found)
        visible = monotonic()
        self.records.append(
            UpdateRecord(sent, acknowledged - sent, visible - sent, len(keys))
        )
        self._check(batch, Answer(batch.positions, seen, found))

    def _check(self, batch: UpdateBatch, answer: Answer) -> None:
        right = answer.is_version(batch.table, batch.versions)
        self.tally.rows += len(right)
        n_wrong = int(np.count_nonzero(~right))
        if n_wrong:
            self.tally.wrong["acknowledged update is not visible"] += n_wrong
