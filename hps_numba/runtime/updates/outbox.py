"""Messages on their way to the brokers: waited for, counted, and missed if lost."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

try:
    from confluent_kafka import KafkaError, KafkaException, Message, Producer
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        'publishing updates needs confluent-kafka; pip install "hps-numba[kafka]"',
        name=exc.name,
    ) from exc

from hps_numba.errors import ConfigError, UpdateSourceError
from hps_numba.runtime.updates.frames import DELETE

logger = logging.getLogger(__name__)

_CREATION_S = 5.0  # how long a broker may take to create a topic by itself
_POLL_S = 0.05
# Of a partition, as many as librdkafka has in flight if it is idempotent. While more
# wait for their turn, it keeps a core busy, which is measured at 5 times the CPU.
_MOST_WAITING = 5


@dataclass(frozen=True)
class Parcel:
    """One message: a frame, and where it goes."""

    topic: str
    partition: int
    frame: bytes
    n_records: int
    is_delete: bool


@dataclass(frozen=True)
class _Sent:
    """What is remembered of a parcel until its delivery is reported."""

    topic: str
    partition: int
    n_records: int
    n_bytes: int


@dataclass(frozen=True)
class ProducerStats:
    """What became of rows and deletions that were sent.

    Parameters
    ----------
    rows, messages, bytes
        Acknowledged by the brokers: records, messages, and bytes of frames.
    errors
        Records that were not delivered; an error told of them.
    waiting
        Records that neither happened to yet.
    """

    rows: int
    messages: int
    bytes: int
    errors: int
    waiting: int


class Outbox:
    """Kafka's producer, whose delivery reports are kept until somebody hears them.

    Parameters
    ----------
    brokers
        ``host:port``, separated by commas.
    settings
        Of librdkafka.

    Notes
    -----
    Thread-safe. Messages of one partition arrive in the order in which they were put.
    """

    def __init__(self, brokers: str, settings: Mapping[str, Any]) -> None:
        self._brokers = brokers
        self._lock = threading.Lock()
        # Guarded by _lock. Parcels by number, oldest first, and how many by partition.
        self._waiting: dict[int, _Sent] = {}
        self._n_waiting: Counter[tuple[str, int]] = Counter()
        self._n_put = 0
        self._failures: Counter[tuple[str, int, str]] = Counter()
        self._rows = self._messages = self._bytes = self._errors = 0
        self._trouble = ""  # what librdkafka said last of its connections
        config = {**settings, "bootstrap.servers": brokers, "error_cb": self._hear}
        try:
            self._producer = Producer(config, logger=logger)
        except KafkaException as exc:
            raise ConfigError(f"Kafka settings: {exc.args[0].str()}") from exc

    def partitions(self, topic: str, timeout_s: float) -> int:
        """Return how many partitions a topic has; brokers may create it for that.

        Raises
        ------
        UpdateSourceError
            If no broker answers, or the topic is not there and does not appear.
        """
        timeout_s = min(timeout_s, _CREATION_S)
        deadline = monotonic() + timeout_s
        while True:
            try:
                found = self._producer.list_topics(topic, timeout=timeout_s)
            except KafkaException as exc:
                self._producer.poll(0)
                raise self._error("brokers do not answer", exc.args[0]) from exc
            metadata = found.topics[topic]
            if metadata.partitions and metadata.error is None:
                return len(metadata.partitions)
            if monotonic() > deadline:
                raise UpdateSourceError(
                    f"topic {topic} is not there ({metadata.error}), and the brokers "
                    f"at {self._brokers} do not create it by themselves; do so: "
                    f"kafka-topics.sh --bootstrap-server {self._brokers} --create "
                    f"--topic {topic} --partitions 8"
                )
            self._producer.poll(_POLL_S)

    def put(self, parcel: Parcel, deadline: float) -> None:
        """Hand over a message, as soon as the queue has room for it.

        Raises
        ------
        UpdateSourceError
            If there is no room until ``deadline``, or the message cannot be sent; it
            counts as lost in the second case only.
        """
        while not self.try_put(parcel):
            if monotonic() >= deadline:
                raise self._error("the queue is full, and brokers do not empty it")
            self._producer.poll(_POLL_S)

    def try_put(self, parcel: Parcel) -> bool:
        """Hand over a message if there is room for it; raises as ``put``.

        There is, unless too many of its partition wait already.
        """
        with self._lock:
            if self._n_waiting[parcel.topic, parcel.partition] >= _MOST_WAITING:
                return False
            self._n_waiting[parcel.topic, parcel.partition] += 1
            number = self._n_put
            self._n_put += 1
            self._waiting[number] = _Sent(
                parcel.topic, parcel.partition, parcel.n_records, len(parcel.frame)
            )
        try:
            self._producer.produce(
                parcel.topic,
                value=parcel.frame,
                key=DELETE if parcel.is_delete else None,
                partition=parcel.partition,
                on_delivery=partial(self._deliver, number),
            )
        except BufferError:
            with self._lock:
                self._take_locked(number)
            return False
        except KafkaException as exc:
            self._lose(number, exc.args[0])
        self._producer.poll(0)
        return True

    def wait(self) -> None:
        """Wait a moment, shorter if a delivery report comes."""
        self._producer.poll(_POLL_S)

    def flush(self, deadline: float) -> None:
        """Wait until everything put so far was delivered, or was lost.

        Raises
        ------
        UpdateSourceError
            If that is not so at ``deadline``.
        """
        last = self._n_put - 1
        while self._oldest() <= last:
            if monotonic() >= deadline:
                n_waiting = self.stats().waiting
                raise self._error(f"{n_waiting} records are not acknowledged yet")
            self._producer.poll(_POLL_S)

    def give_up(self) -> int:
        """Discard what is not delivered, and return how many records were lost."""
        self._producer.purge()
        while self._producer.poll(_POLL_S):
            pass  # each message is reported
        with self._lock:
            return self._failures.total()

    def raise_losses(self) -> None:
        """Tell of messages that were lost since the last call.

        Raises
        ------
        UpdateSourceError
            With topic, partition, reason and number of records of each.
        """
        self._producer.poll(0)
        with self._lock:
            lost, self._failures = self._failures, Counter()
        if lost:
            raise UpdateSourceError(
                "; ".join(
                    f"{n_records} records of topic {topic}, partition {partition}, "
                    f"were not delivered: {reason}"
                    for (topic, partition, reason), n_records in lost.items()
                )
            )

    def stats(self) -> ProducerStats:
        """Return what was acknowledged and lost so far."""
        self._producer.poll(0)
        with self._lock:
            return ProducerStats(
                self._rows,
                self._messages,
                self._bytes,
                self._errors,
                sum(sent.n_records for sent in self._waiting.values()),
            )

    def _oldest(self) -> int:
        with self._lock:
            return next(iter(self._waiting), self._n_put)

    def _deliver(self, number: int, error: KafkaError | None, _: Message) -> None:
        """Note what librdkafka reports of a message; called inside its ``poll``."""
        if error is not None:
            self._lose(number, error)
            return
        with self._lock:
            sent = self._take_locked(number)
            self._rows += sent.n_records
            self._messages += 1
            self._bytes += sent.n_bytes

    def _lose(self, number: int, error: KafkaError) -> None:
        reason = _reason(error)
        with self._lock:
            sent = self._take_locked(number)
            self._errors += sent.n_records
            self._failures[sent.topic, sent.partition, reason] += sent.n_records
        logger.warning(
            "topic=%s partition=%d lost_records=%d reason=%s",
            sent.topic,
            sent.partition,
            sent.n_records,
            reason,
        )

    def _take_locked(self, number: int) -> _Sent:
        """Return what waits no longer."""
        sent = self._waiting.pop(number)
        self._n_waiting[sent.topic, sent.partition] -= 1
        return sent

    def _hear(self, error: KafkaError) -> None:
        self._trouble = error.str()

    def _error(
        self, problem: str, error: KafkaError | None = None
    ) -> UpdateSourceError:
        """Return an error that says what is known of the brokers."""
        reasons = [self._brokers, error.str() if error else "", self._trouble]
        return UpdateSourceError(f"{problem}: {': '.join(filter(None, reasons))}")


def _reason(error: KafkaError) -> str:
    if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
        return (
            f"{error.str()}; make message_bytes smaller, or message.max.bytes of the "
            f"brokers larger (max.message.bytes of the topic)"
        )
    if error.fatal():
        return f"{error.str()}; this producer cannot go on, make a new one"
    return error.str()
