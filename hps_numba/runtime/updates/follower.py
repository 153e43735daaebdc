"""The stream partitions of a server: which are read, from where, and into what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import (
    CacheError,
    ClosedError,
    DeviceError,
    HPSError,
    StreamGapError,
    TierError,
    UnknownTableError,
    UpdateSourceError,
)
from hps_numba.runtime.failures import FailureLog
from hps_numba.runtime.updates import places
from hps_numba.runtime.updates.dead_letters import DeadLetters
from hps_numba.runtime.updates.partition import Following, Partition
from hps_numba.runtime.updates.source import KafkaSource, Message
from hps_numba.runtime.updates.stats import StreamState
from hps_numba.runtime.updates.subscriptions import Followed, Subscriptions
from hps_numba.types import Position

logger = logging.getLogger(__name__)

PartitionId: TypeAlias = tuple[str, int]
"""Topic and number."""

_PAUSED = "pause() was called"


class Pauses:
    """Which topics are paused, also of those that are not there yet."""

    def __init__(self) -> None:
        self._all = False
        self._else: dict[str, bool] = {}  # topics that were told apart since

    def tell(self, topic: str | None, *, paused: bool) -> None:
        """Note a topic, or all if None."""
        if topic is None:
            self._all = paused
            self._else.clear()
        else:
            self._else[topic] = paused

    def holds(self, topic: str) -> bool:
        """Whether a topic is paused."""
        return self._else.get(topic, self._all)


class Follower:
    """Reads stream partitions and applies them. Used by one thread.

    ``followed``, ``partitions`` and ``ends`` (offsets after the last messages, as far
    as known) are replaced, never changed, so that others may look at them.

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
        self._pauses = Pauses()
        self.followed = Followed({}, ())
        self.partitions: dict[PartitionId, Partition] = {}
        self.ends: dict[PartitionId, int] = {}

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
        failed: dict[str, TierError] = {}  # other tables may have other tiers
        for key in sorted(wanted.keys() - self.partitions.keys()):
            if key[0] not in failed:
                self._begin(key, wanted[key], failed)
        halted = [key for key, p in self.partitions.items() if not p.reads]
        asked = {key: self._source.watermarks(*key)[1] for key in halted}
        self.ends = {**self.ends, **asked}
        for error in failed.values():
            raise error

    def note_ends(self) -> None:
        """Note how far the partitions reach that are read."""
        reading = [key for key, p in self.partitions.items() if p.reads]
        seen = ((key, self._source.end(*key)) for key in reading)
        known = {key: end for key, end in seen if end is not None}
        self.ends = {k: e for k, e in self.ends.items() if k in self.partitions} | known

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

    def forget(self, key: PartitionId) -> None:
        """Let the next ``look`` decide where a partition goes on."""
        if key in self.partitions:
            self._drop(key)

    def pause(self, topic: str | None) -> None:
        """Apply nothing more of a topic, or of any, and of partitions to come."""
        self._pauses.tell(topic, paused=True)
        for key in self._of(topic):
            if self.partitions[key].state is not StreamState.STOPPED:
                self._halt(key, StreamState.PAUSED, _PAUSED)

    def resume(self, topic: str | None) -> None:
        """Go on with what was paused."""
        self._pauses.tell(topic, paused=False)
        for key in self._of(topic):
            partition = self.partitions[key]
            if partition.state is StreamState.PAUSED:
                partition.state, partition.reason = StreamState.READING, ""
                self._source.assign(*key, partition.pending.position.offset)

    def seek(
        self, topic: str, number: int | None, where: Callable[[str, int], int]
    ) -> None:
        """Let the tiers and the source go on from the offsets that ``where`` returns.

        Raises
        ------
        UpdateSourceError
            If there is no such partition, or ``where`` cannot tell.
        TierError
            If a tier cannot store the position.
        """
        self.look()
        keys = [key for key in self._of(topic) if number in (None, key[1])]
        if not keys:
            which = topic if number is None else f"{topic}[{number}]"
            raise UpdateSourceError(f"{which} is not followed, or is not there")
        positions = {key: Position(where(*key)) for key in keys}
        for key, position in positions.items():
            self._seek(key, position)

    def _seek(self, key: PartitionId, position: Position) -> None:
        partition = self.partitions[key]
        with partition.following.gate:
            partition.following.seek(key[1], position)
        self._source.unassign(*key)
        partition.pending.restart(position)
        if self._pauses.holds(key[0]):
            partition.state, partition.reason = StreamState.PAUSED, _PAUSED
        else:
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
            partition.recover()
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

    def _begin(
        self, key: PartitionId, following: Following, failed: dict[str, TierError]
    ) -> None:
        """Read a partition from where the tiers are, or note what failed."""
        topic, number = key
        try:
            with following.gate:
                place = places.begin(following, number, self._source)
        except TierError as exc:
            failed[topic] = exc
            return
        except (UnknownTableError, ClosedError):
            return  # the model was removed meanwhile
        backoff_s = self._params.failure_backoff_ms / 1e3
        position = place.position or Position(0)
        partition = Partition(following, number, position, backoff_s)
        self.partitions = {**self.partitions, key: partition}
        if place.position is None:
            self._halt(key, StreamState.STOPPED, place.reason)
        elif self._pauses.holds(topic):
            self._halt(key, StreamState.PAUSED, _PAUSED)

    def _of(self, topic: str | None) -> list[PartitionId]:
        return [key for key in self.partitions if topic in (None, key[0])]

    def _drop(self, key: PartitionId) -> None:
        partition = self.partitions[key]
        partition.following.reached[key[1]] = partition.pending.position
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
