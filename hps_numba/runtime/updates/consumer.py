"""Applying update streams: from Kafka to every tier, in the order of the stream.

::

    poll -> decode -> pending, for each stream partition
                         |
                         v   as soon as no message waits, or enough have come
                      pieces -> Hierarchy.apply: RocksDB with the position,
                                                 the volatile database, caches

    a tier fails             that partition is read no further, and tried again
    a tier lost records      back to where it is; tiers that have them skip them
    records are gone         as offset_reset says

One thread does it all. Every server reads all partitions of its tables' topics: they
are not shared out, since each server has caches of its own. Where it begins is what its
databases have stored, not what Kafka has; offsets are committed for those who watch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, TypeVar

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import ClosedError, TierError, UpdateSourceError
from hps_numba.runtime.updates.dead_letters import DeadLetters
from hps_numba.runtime.updates.follower import Follower, PartitionId
from hps_numba.runtime.updates.source import KafkaSource, Trouble, TroubleKind
from hps_numba.runtime.updates.stats import UpdateStats
from hps_numba.runtime.updates.subscriptions import Subscriptions

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

POLL_S = 0.05  # for a first message; commands wait no longer
GATHER_S = 0.1  # for more of them
GATHER_BYTES = 64 << 20
REST_S = 0.02  # from applying to applying again, unless enough has come
COMMIT_S = 1.0
ENDS_S = 0.1  # between two looks at how far the partitions reach
LOOK_AGAIN_S = 1.0  # after a broker or a tier did not answer
_PATIENCE_S = 30.0
_ENDED = "the update streams are closed"


class UpdateConsumer:
    """Follows the update streams of a server's tables. Thread-safe.

    Parameters
    ----------
    params
        The configuration.
    source
        Where messages come from; closed with the consumer.
    subscriptions
        Which tables follow which topics.
    dead_letters
        Keep messages that cannot be applied; closed with the consumer.
    """

    def __init__(
        self,
        params: UpdateSourceParams,
        source: KafkaSource,
        subscriptions: Subscriptions,
        dead_letters: Sequence[DeadLetters],
    ) -> None:
        self._source = source
        self._dead_letters = dead_letters
        self._closing = threading.Event()
        self._follower = Follower(
            params, source, subscriptions, dead_letters, self._closing.is_set
        )
        self._look_every_s = params.metadata_refresh_interval_ms / 1e3
        self._look_s = 0.0  # when topics are looked for
        self._commit_every = params.max_commit_interval
        self._ends_s = self._commit_s = 0.0
        self._rest_s = 0.0  # until when messages are gathered rather than applied
        self._uncommitted = 0  # messages
        self._connected = False
        self._progress = threading.Condition()
        self._obeying = threading.Lock()
        self._ended = False  # this and what ended it: guarded by _obeying
        self._death: Exception | None = None
        self._commands: SimpleQueue[tuple[Callable[[], None], Future[Any]]]
        self._commands = SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, name="hps-updates", daemon=True
        )

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def look_soon(self) -> None:
        """Look for new topics and tables before it is time."""
        self._look_s = 0.0

    def pause(self, topic: str | None = None) -> None:
        """Apply nothing more of a topic (of any, if None) until ``resume``."""
        self._tell(lambda: self._follower.pause(topic))

    def resume(self, topic: str | None = None) -> None:
        """Go on where ``pause`` stopped."""
        self._tell(lambda: self._follower.resume(topic))

    def seek(
        self, topic: str, partition: int | None, where: Callable[[str, int], int]
    ) -> None:
        """Go on from the offsets that ``where`` returns for a topic and a partition."""
        self._tell(lambda: self._follower.seek(topic, partition, where))

    def catch_up(self, timeout_s: float) -> bool:
        """Wait until all that is in the streams now is applied; return whether it is.

        Raises
        ------
        UpdateSourceError
            If no broker tells what there is.
        TierError
            If a tier cannot tell how far it is.
        """
        deadline = monotonic() + timeout_s
        ends = self._tell(self._ends)

        def reached() -> bool:
            applied = self._follower.offsets()
            return self._ended or all(
                applied.get(key, -1) >= end for key, end in ends.items()
            )

        with self._progress:
            self._progress.wait_for(reached, max(deadline - monotonic(), 0.0))
            return reached() and not self._ended

    def stats(self) -> UpdateStats:
        """Return the counters."""
        # Not of the source: confluent-kafka lets a second thread wait for ever.
        followed, partitions = self._follower.followed, self._follower.partitions
        ends = self._follower.ends
        streams = []
        for topic, following in followed.tables.items():
            spec = following.table.spec
            parts = [
                partition.stats(ends.get(key))
                for key, partition in sorted(partitions.items())
                if key[0] == topic
            ]
            counters = following.counters
            streams.append(counters.snapshot(spec.model, spec.name, parts))
        return UpdateStats(self._connected, followed.unknown, tuple(streams))

    def close(self) -> None:
        """Finish the piece that is being applied, and end; twice does nothing."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)
        elif self._thread.ident is None:  # was never started
            self._end()

    def _tell(self, command: Callable[[], _T]) -> _T:
        """Let the thread do something; return its result, or raise what it raises."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as exc:
                future.set_exception(exc)

        with self._obeying:
            if self._ended:
                raise ClosedError(_ENDED) from self._death
            self._commands.put((run, future))
        return future.result()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._obey()
                if monotonic() >= self._look_s:
                    self._look()
                self._read()
                if self._follower.apply():
                    self._rest_s = monotonic() + REST_S
                    with self._progress:
                        self._progress.notify_all()
                self._note_ends()
                self._commit()
        except Exception as exc:
            logger.exception("the update thread died; nothing more is applied")
            self._death = exc
        finally:
            self._end()

    def _end(self) -> None:
        with self._obeying:
            self._ended = True
        while not self._commands.empty():
            self._commands.get()[1].set_exception(ClosedError(_ENDED))
        with self._progress:
            self._progress.notify_all()
        self._source.commit(self._follower.offsets())
        for keeper in self._dead_letters:
            keeper.close()
        self._source.close()

    def _obey(self) -> None:
        while True:
            try:
                run, _ = self._commands.get_nowait()
            except Empty:
                return
            run()

    def _look(self) -> None:
        """Look for topics; who cannot be asked now is asked again soon."""
        self._look_s = monotonic() + self._look_every_s
        try:
            self._follower.look()
            self._connected = True
        except (UpdateSourceError, TierError) as exc:
            self._connected &= not isinstance(exc, UpdateSourceError)
            self._look_s = min(self._look_s, monotonic() + LOOK_AGAIN_S)
            logger.warning("update_source: topics are looked for again: %s", exc)

    def _read(self) -> None:
        """Take messages up until none waits, or enough have come."""
        waiting = any(p.ready for p in self._follower.partitions.values())
        event = self._source.poll(0.0 if waiting else POLL_S)
        end_s, n_bytes = monotonic() + GATHER_S, 0
        while event is not None:
            if isinstance(event, Trouble):
                self._handle(event)
            else:
                self._follower.take(event)
                self._uncommitted += 1
                n_bytes += len(event.value or b"")
            if n_bytes >= GATHER_BYTES or monotonic() >= end_s:
                return
            # Applying a few rows costs lookups as much as applying some hundred.
            event = self._source.poll(max(self._rest_s - monotonic(), 0.0))

    def _handle(self, trouble: Trouble) -> None:
        if trouble.kind is TroubleKind.OUT_OF_RANGE:
            self._follower.forget((trouble.topic, trouble.partition))
            self._look_s = 0.0
        elif trouble.kind is TroubleKind.UNKNOWN_TOPIC:
            self._look_s = 0.0
        elif trouble.kind is TroubleKind.CONNECTED:
            self._connected = True
        else:
            self._connected &= trouble.kind is not TroubleKind.DISCONNECTED
            logger.warning("update_source: %s", trouble.text)

    def _ends(self) -> dict[PartitionId, int]:
        self._follower.look()
        # Some brokers tell an end that is older than what they have sent.
        return {
            key: max(self._source.watermarks(*key)[1], self._source.end(*key) or 0)
            for key in self._follower.partitions
        }

    def _note_ends(self) -> None:
        if monotonic() >= self._ends_s:
            self._ends_s = monotonic() + ENDS_S
            self._follower.note_ends()

    def _commit(self) -> None:
        """Tell the brokers how far this server is, once in a while."""
        due = monotonic() >= self._commit_s or self._uncommitted >= self._commit_every
        if due and self._uncommitted:
            self._source.commit(self._follower.offsets())
            self._commit_s, self._uncommitted = monotonic() + COMMIT_S, 0
