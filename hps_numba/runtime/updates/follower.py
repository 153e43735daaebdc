"""The stream partitions of a server: which are read, from where, and into what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import (
    CacheError,
    DeviceError,
    HPSError,
    StreamGapError,
    TierError,
    UpdateSourceError,
)
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.updates.dead_letters import DeadLetters
from hps_numba.runtime.updates.partition import Following, Partition
from hps_numba.runtime.updates.source import KafkaSource, Message
from hps_numba.runtime.updates.stats import StreamState
from hps_numba.runtime.updates.subscriptions import Followed, Subscriptions
from hps_numba.types import Position

logger = logging.getLogger(__name__)

PartitionId: TypeAlias = tuple[str, int]
"""Topic and number."""


class Follower:
    """Reads stream partitions and applies them. Used by one thread.

    ``followed`` and ``partitions`` are replaced, never changed, so that others may look
    at them.

    Parameters
    ----------
    params
        The configuration.
    source
        Where messages come from.
    subscriptions
        Which tables follow which topics.
    dead_letters
        Keep messages that cannot be applied.
    stop
        Tells whether nothing more is to be applied.
    """

    def __init__(
        self,
        params: UpdateSourceParams,
        source: KafkaSource,
        subscriptions: Subscriptions,
        dead_letters: Sequence[DeadLetters],
        stop: Callable[[], bool],
    ) -> None:
        self._params = params
        self._source = source
        self._subscriptions = subscriptions
        self._dead_letters = dead_letters
        self._stop = stop
        self._failures = FailureLog(logger)
        self.followed = Followed({}, ())
        self.partitions: dict[PartitionId, Partition] = {}

    def look(self) -> None:
        """Follow the topics that are there, for the tables that are served.

        Raises
        ------
        UpdateSourceError
            If no broker answers.
        TierError
            If a tier cannot tell how far it is. What was found before is followed.
        """
        topics = self._source.topics()
        followed = self._subscriptions.of(topics)
        for topic in set(followed.unknown) - set(self.followed.unknown):
            logger.warning("topic=%s is followed by no table that is served", topic)
        self.followed = followed
        wanted = {
            (topic, number): following
            for topic, following in followed.tables.items()
            for number in topics[topic]
        }
        for key, partition in list(self.partitions.items()):
            if wanted.get(key) is not partition.following:
                self._drop(key)
        for key, following in wanted.items():
            if key not in self.partitions:
                self._begin(key, following)

    def take(self, message: Message) -> None:
        """Take a message up; what cannot be applied is counted and kept elsewhere."""
        partition = self.partitions.get((message.topic, message.partition))
        if partition is not None and partition.reads:
            partition.take(message, self._refuse)

    def apply(self) -> int:
        """Apply what waits, if it may be applied now; return how many tried."""
        ready = [(key, p) for key, p in self.partitions.items() if p.ready]
        for key, partition in ready:
            if not self._stop():
                self._apply(key, partition)
        return len(ready)

    def restart(self, key: PartitionId) -> None:
        """Decide again where a partition goes on: messages before that are gone."""
        partition = self.partitions.get(key)
        if partition is not None:
            self._drop(key)
            self._begin(key, partition.following)

    def pause(self, key: PartitionId) -> None:
        """Apply nothing more of a partition."""
        partition = self.partitions[key]
        if partition.state is not StreamState.STOPPED:
            self._halt(key, StreamState.PAUSED, "pause() was called")

    def resume(self, key: PartitionId) -> None:
        """Go on with a partition that was paused."""
        partition = self.partitions[key]
        if partition.state is StreamState.PAUSED:
            partition.state, partition.reason = StreamState.READING, ""
            self._source.assign(*key, partition.pending.position.offset)

    def seek(self, key: PartitionId, position: Position) -> None:
        """Let the tiers and the source go on from a position."""
        partition = self.partitions[key]
        paused = partition.state is StreamState.PAUSED
        self._source.unassign(*key)
        partition.following.seek(key[1], position)
        partition.pending.restart(position)
        if not paused:
            partition.state, partition.reason = StreamState.READING, ""
            self._source.assign(*key, position.offset)

    def offsets(self) -> dict[PartitionId, int]:
        """Return the offset of the first message that is not applied, of each."""
        return {
            key: partition.pending.position.offset
            for key, partition in self.partitions.items()
        }

    def _refuse(self, message: Message, reason: str) -> None:
        where = f"table={message.topic} partition={message.partition}"
        logger.warning("%s offset=%d skipped: %s", where, message.offset, reason)
        for keeper in self._dead_letters:
            _keep(keeper, message, reason)

    def _apply(self, key: PartitionId, partition: Partition) -> None:
        topic = key[0]
        try:
            partition.apply(self._params.burst_rows, self._stop)
        except StreamGapError as gap:
            position = partition.rewind(gap)
            logger.warning("table=%s %s; reading again from %s", topic, gap, position)
            self._source.seek(*key, position.offset)
        except (TierError, CacheError, DeviceError) as exc:
            if partition.state is not StreamState.RETRYING:
                self._source.pause(*key)
            partition.fail(exc)
            self._failures.report("update is tried again", topic, exc)
        except HPSError as exc:  # the model was removed
            logger.info("table=%s is followed no more: %s", topic, exc)
            self._drop(key)
        except Exception as exc:
            logger.exception("table=%s partition=%d stopped", *key)
            self._halt(key, StreamState.STOPPED, f"{type(exc).__name__}: {exc}")
        else:
            if partition.recover():
                self._source.resume(*key)

    def _begin(self, key: PartitionId, following: Following) -> None:
        """Read a partition from where the tiers are."""
        topic, number = key
        following.tell_lower_positions()
        begin = self._source.begin(topic, number, following.stored(number))
        if begin.reset:
            following.counters.add(resets=1)
            logger.error("table=%s partition=%d: %s", topic, number, begin.reason)
            if begin.position is not None:
                following.seek(number, begin.position)
        backoff_s = self._params.failure_backoff_ms / 1e3
        position = begin.position or Position(0)
        partition = Partition(following, number, position, backoff_s)
        self.partitions = {**self.partitions, key: partition}
        if begin.position is None:
            self._halt(key, StreamState.STOPPED, begin.reason)

    def _drop(self, key: PartitionId) -> None:
        self.partitions = {k: p for k, p in self.partitions.items() if k != key}
        self._source.unassign(*key)

    def _halt(self, key: PartitionId, state: StreamState, reason: str) -> None:
        """Read a partition no further; what was read of it is read again."""
        partition = self.partitions[key]
        partition.state, partition.reason = state, reason
        partition.pending.restart(partition.pending.position)
        self._source.unassign(*key)


def _keep(keeper: DeadLetters, message: Message, reason: str) -> None:
    try:
        keeper.keep(message, reason)
    except (OSError, UpdateSourceError) as exc:
        logger.error("a dead letter is lost: %s", exc)
