"""Kafka as a source of updates: stream partitions assigned by hand, read by one thread.

Groups are not balanced: every server reads all partitions of its tables. Where it goes
on is told with each assignment; what Kafka has stored is never asked for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any

from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import ClosedError, UpdateSourceError
from hps_numba.runtime.updates.beginning import Begin, begin_at
from hps_numba.runtime.updates.client import (
    ClientLog,
    consumer_settings,
    fetched_end,
    new_consumer,
    source_error,
)
from hps_numba.runtime.updates.events import Message, Trouble, TroubleKind
from hps_numba.types import TAG_PREFIX, Position

__all__ = ["Begin", "KafkaSource", "Message", "Trouble", "TroubleKind"]

logger = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 20  # taken from librdkafka's queue at once, about
_BATCH_MESSAGES = 256
_WATCH_S = 1.0  # between two looks at whether a partition has become shorter
_HEAR_S = 0.05
_LAST_COMMIT_S = 1.0
_KINDS = {
    KafkaError._ALL_BROKERS_DOWN: TroubleKind.DISCONNECTED,
    KafkaError._AUTO_OFFSET_RESET: TroubleKind.OUT_OF_RANGE,
    KafkaError.OFFSET_OUT_OF_RANGE: TroubleKind.OUT_OF_RANGE,
    KafkaError.UNKNOWN_TOPIC_OR_PART: TroubleKind.UNKNOWN_TOPIC,
    KafkaError.UNKNOWN_TOPIC_ID: TroubleKind.UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_TOPIC: TroubleKind.UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION: TroubleKind.UNKNOWN_TOPIC,
    KafkaError._AUTHENTICATION: TroubleKind.DENIED,
    KafkaError.SASL_AUTHENTICATION_FAILED: TroubleKind.DENIED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: TroubleKind.DENIED,
    KafkaError.GROUP_AUTHORIZATION_FAILED: TroubleKind.DENIED,
}

_PartitionId = tuple[str, int]  # topic and number


class KafkaSource:
    """Reads stream partitions. For one thread.

    Parameters
    ----------
    params
        The configuration.
    group
        Kafka's consumer group, under which offsets are committed for those who watch;
        ``group.id`` of the configuration goes first.

    Raises
    ------
    ConfigError
        If librdkafka refuses a setting.

    Notes
    -----
    Whatever asks the brokers raises ``UpdateSourceError`` when none answers within
    ``socket.timeout.ms``, and every method ``ClosedError`` after ``close``.
    """

    def __init__(self, params: UpdateSourceParams, *, group: str) -> None:
        self._params = params
        self._settings = consumer_settings(params, group)
        self._log = ClientLog()
        self._consumer: Any = new_consumer(
            self._settings, self._log, error_cb=self._failed, on_commit=self._committed
        )
        self._timeout_s = float(self._settings["socket.timeout.ms"]) / 1e3
        self._ready: deque[Any] = deque()
        self._troubles: deque[Trouble] = deque()
        self._next: dict[_PartitionId, int] = {}  # what is read, and the next offset
        self._watch_s = 0.0
        self._told: set[TroubleKind] = set()  # since a broker answered
        self._n_commits = 0  # on their way
        self._closed = False

    def topics(self) -> dict[str, tuple[int, ...]]:
        """Return the topics of tables, each with its partitions."""
        try:
            found = self._open().list_topics(timeout=self._timeout_s).topics
        except KafkaException as exc:
            self._hear()
            what = f"{self._params.brokers} does not tell its topics"
            raise source_error(what, exc.args[0], self._log.reason) from exc
        self._answered()
        return {
            name: tuple(sorted(topic.partitions))
            for name, topic in found.items()
            if name.startswith(f"{TAG_PREFIX}.") and topic.error is None
        }

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        """Return the offset of the first message, and the one after the last.

        A broker may know a partition longer than it tells here; see ``real_end``.
        """
        where = TopicPartition(topic, partition)
        try:
            found = self._open().get_watermark_offsets(where, timeout=self._timeout_s)
        except KafkaException as exc:
            what = f"the ends of {topic}[{partition}]"
            raise source_error(what, exc.args[0], self._log.reason) from exc
        if found is None:
            raise UpdateSourceError(
                f"the ends of {topic}[{partition}] are not known after "
                f"{self._timeout_s:g} s; {self._log.reason}"
            )
        return int(found[0]), int(found[1])

    def end(self, topic: str, partition: int) -> int | None:
        """Return the offset after the last message as of the last fetch, or None.

        Asks nobody. None also after ``close``.
        """
        if self._closed:
            return None
        where = TopicPartition(topic, partition)
        end = self._consumer.get_watermark_offsets(where, cached=True)[1]
        return int(end) if end >= 0 else None

    def real_end(self, topic: str, partition: int) -> int:
        """Return the offset after the last message, as a fetch tells.

        That takes a connection of its own, some 10 ms, and is never an older end.
        """
        low, end = self.watermarks(topic, partition)
        at = max(end - 1, low)
        found = fetched_end(self._settings, topic, partition, at, self._timeout_s)
        return end if found is None else found

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        """Return the first offset of that time or later; the end if there is none."""
        where = TopicPartition(topic, partition, timestamp_ms)
        try:
            (found,) = self._open().offsets_for_times([where], timeout=self._timeout_s)
        except KafkaException as exc:
            what = f"the offset of a time in {topic}[{partition}]"
            raise source_error(what, exc.args[0], self._log.reason) from exc
        if found.error is not None:
            raise source_error(f"the offset of a time in {found}", found.error)
        if found.offset >= 0:
            return int(found.offset)
        return self.watermarks(topic, partition)[1]

    def begin(self, topic: str, partition: int, stored: Position | None) -> Begin:
        """Read a partition from a stored position, or from where the settings say.

        Notes
        -----
        A stored position is lost if retention removed what comes next, or if the
        partition ends before it: then the topic was made anew. The latter is confirmed
        by a fetch, since the end that a broker tells may be an older one. A topic that
        was made anew and has grown past the position is not told from the old one.
        """
        low, end = self.watermarks(topic, partition)

        def fetch(offset: int) -> int | None:
            where = (topic, partition, offset)
            return fetched_end(self._settings, *where, self._timeout_s)

        begin = begin_at(self._params, stored, low, end, fetch=fetch)
        self.unassign(topic, partition)
        if begin.position is not None:
            self.assign(topic, partition, begin.position.offset)
        return begin

    def assign(self, topic: str, partition: int, offset: int) -> None:
        """Read a partition, which is not read yet, from an offset on."""
        consumer = self._open()
        where = TopicPartition(topic, partition, offset)
        try:
            consumer.incremental_assign([where])
            consumer.resume([where])  # librdkafka remembers a pause across assignments
        except KafkaException as exc:
            raise source_error(f"reading {topic}[{partition}]", exc.args[0]) from exc
        self._next[topic, partition] = offset

    def unassign(self, topic: str, partition: int) -> None:
        """Read a partition no more; nothing of it comes later. Twice does nothing."""
        consumer = self._open()
        if self._next.pop((topic, partition), None) is None:
            return
        self._forget(topic, partition)
        consumer.incremental_unassign([TopicPartition(topic, partition)])

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Go on with another offset; messages before the call come no more."""
        # An assignment anew, since librdkafka seeks nowhere from out of range.
        self.unassign(topic, partition)
        self.assign(topic, partition, offset)

    def pause(self, topic: str, partition: int) -> None:
        """Fetch no more of a partition; about 1 MiB of messages may still come."""
        self._open().pause([TopicPartition(topic, partition)])

    def resume(self, topic: str, partition: int) -> None:
        """Go on where ``pause`` stopped."""
        self._open().resume([TopicPartition(topic, partition)])

    def poll(self, timeout_s: float) -> Message | Trouble | None:
        """Return what comes next, or None if nothing does in time.

        With 0 it returns what has arrived already and waits for nothing.
        """
        if not self._ready:
            self._take(timeout_s)
        while self._ready:
            message = self._ready.popleft()
            error = message.error()
            if error is not None:
                return self._trouble(error, message.topic(), message.partition())
            return self._message(message)
        if self._troubles:
            return self._troubles.popleft()
        return None

    def commit(self, offsets: Mapping[_PartitionId, int]) -> None:
        """Tell the brokers the next offsets, without waiting; errors are logged."""
        if not offsets:
            return
        what = [TopicPartition(*key, offset) for key, offset in offsets.items()]
        try:
            self._open().commit(offsets=what, asynchronous=True)
            self._n_commits += 1
        except KafkaException as exc:
            logger.warning("offsets are not committed: %s", exc.args[0].str())

    def close(self) -> None:
        """Disconnect, once commits have arrived or did not in a second.

        Twice does nothing.
        """
        deadline = monotonic() + _LAST_COMMIT_S
        while self._n_commits and not self._closed and monotonic() < deadline:
            self._consumer.poll(_LAST_COMMIT_S / 100)
        self._ready.clear()
        self._next.clear()
        self._closed = True
        # Its own close() leaves the group, where we are not, and waits for commits as
        # long as no broker takes them, be it forever. Its end does neither.
        self._consumer = None

    def _open(self) -> Any:
        if self._closed:
            raise ClosedError("the update source is closed")
        return self._consumer

    def _take(self, timeout_s: float) -> None:
        """Move what waits in librdkafka's queue to ours, up to a limit."""
        consumer = self._open()
        first = consumer.poll(timeout_s)
        if first is None:
            self._watch()
            return
        self._answered()
        self._ready.append(first)
        size = len(first) if first.error() is None else _BATCH_BYTES
        n_more = min(_BATCH_BYTES // max(size, 1), _BATCH_MESSAGES) - 1
        if n_more > 0:
            # One call for many takes the interpreter's lock once, and waits for none.
            self._ready.extend(consumer.consume(n_more, 0))

    def _message(self, message: Any) -> Message:
        topic, partition = message.topic(), message.partition()
        offset = message.offset()
        self._next[topic, partition] = offset + 1
        kind, timestamp_ms = message.timestamp()
        return Message(
            topic,
            partition,
            offset,
            None if kind == TIMESTAMP_NOT_AVAILABLE else timestamp_ms,
            message.key(),
            message.value(),
        )

    def _forget(self, topic: str, partition: int) -> None:
        """Drop what was taken of a partition and has not come yet."""
        self._ready = deque(
            m for m in self._ready if m.topic() != topic or m.partition() != partition
        )
        self._troubles = deque(
            t for t in self._troubles if t.topic != topic or t.partition != partition
        )

    def _trouble(
        self, error: KafkaError, topic: str | None = "", partition: int | None = -1
    ) -> Trouble:
        kind = _KINDS.get(error.code(), TroubleKind.OTHER)
        if error.fatal():
            kind = TroubleKind.FATAL
        text = f"{error.str()} ({error.name()})"
        if self._log.reason and kind is TroubleKind.DISCONNECTED:
            text += f"; {self._log.reason}"
        return Trouble(kind, topic or "", -1 if partition is None else partition, text)

    def _failed(self, error: KafkaError) -> None:
        """Note an error of a broker or of the client; librdkafka calls it in a poll."""
        text = error.str()
        of = (key for key in self._next if text.startswith(f"{key[0]} [{key[1]}]"))
        trouble = self._trouble(error, *next(of, ("", -1)))
        if trouble.kind is TroubleKind.OTHER:
            return  # of one broker or connection; librdkafka tries again by itself
        if trouble.kind in (TroubleKind.DISCONNECTED, TroubleKind.DENIED):
            if trouble.kind in self._told:
                return
            self._told.add(trouble.kind)
        self._troubles.append(trouble)

    def _answered(self) -> None:
        self._log.reason = ""
        if TroubleKind.DISCONNECTED in self._told:
            connected = TroubleKind.CONNECTED
            self._troubles.append(Trouble(connected, "", -1, connected.value))
        self._told.clear()

    def _committed(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        """Note the end of a commit; librdkafka calls it in a poll."""
        self._n_commits -= 1
        if error is not None:
            logger.warning("offsets are not committed: %s", error.str())

    def _hear(self) -> None:
        """Let librdkafka tell why nobody answers, as long as no messages come too."""
        deadline = monotonic() + _HEAR_S
        while not self._next and monotonic() < deadline:
            self._consumer.poll(_HEAR_S / 10)  # each serves one callback

    def _watch(self) -> None:
        """Notice partitions that end before what is to be read next.

        Kafka says that such an offset is out of range; other brokers say nothing.
        """
        now_s = monotonic()
        if now_s < self._watch_s:
            return
        self._watch_s = now_s + _WATCH_S
        for (topic, partition), offset in self._next.items():
            end = self.end(topic, partition)
            if end is not None and end < offset:
                text = f"the partition ends at {end}, before the next offset, {offset}"
                trouble = Trouble(TroubleKind.OUT_OF_RANGE, topic, partition, text)
                self._troubles.append(trouble)
