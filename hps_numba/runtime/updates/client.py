"""Clients of librdkafka for consuming: their settings, their errors, and a probe."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import ConfigError, UpdateSourceError

logger = logging.getLogger(__name__)

QUERY_TIMEOUT_S = 10.0  # unless socket.timeout.ms is configured
_MAX_BYTES = 1_000_000_000  # of librdkafka's settings
# With an hour, librdkafka 2.16 begins to fetch a second late. It is for leaders that
# move; new topics are looked for by whoever calls topics().
_MAX_REFRESH_MS = 300_000
_FETCH_BYTES = 1 << 20  # of one stream partition at a time, as librdkafka's default
# What librdkafka writes with each attempt to connect; troubles of a source tell once.
_REPEATED = frozenset({"ERROR", "FAIL", "REQTMOUT", "COMMITFAIL"})
_OUT_OF_RANGE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)


class ClientLog:
    """Brings what librdkafka writes to the log of this package, and keeps the last why.

    Its error callback does not tell of every failure to connect; its log does.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Why the last attempt to connect failed."""

    def log(self, level: int, text: str, facility: str, name: str, line: str) -> None:
        """Write a line; librdkafka calls it in a poll."""
        if facility == "FAIL":
            self.reason = line.partition("]: ")[2] or line
        level = logging.DEBUG if facility in _REPEATED else level
        logger.log(level, text, facility, name, line)


def consumer_settings(params: UpdateSourceParams, group: str) -> dict[str, Any]:
    """Return librdkafka's settings of a consumer that assigns by itself."""
    largest = min(params.receive_buffer_size + 1024, _MAX_BYTES)
    defaults = {
        "group.id": group,
        "client.id": group,
        "socket.timeout.ms": int(QUERY_TIMEOUT_S * 1e3),
        "socket.connection.setup.timeout.ms": int(QUERY_TIMEOUT_S / 2 * 1e3),
        "reconnect.backoff.max.ms": 1000,
        # No group is joined: it is how long a commit waits for a broker.
        "session.timeout.ms": 2000,
        "heartbeat.interval.ms": 1000,
        "topic.metadata.refresh.interval.ms": min(
            params.metadata_refresh_interval_ms, _MAX_REFRESH_MS
        ),
        "message.max.bytes": largest,
        "fetch.message.max.bytes": max(largest, _FETCH_BYTES),
        "fetch.max.bytes": max(largest, 16 << 20),
        # Not every broker ends a fetch that waits when a message comes; and until it
        # ends, it delays partitions that are assigned.
        "fetch.wait.max.ms": 20,
        # By default, a queue that was full is filled again a second later.
        "fetch.queue.backoff.ms": 10,
        "queued.max.messages.kbytes": 64 << 10,
    }
    own = {
        "bootstrap.servers": params.brokers.replace(";", ","),
        # Where to go on is what the tiers have stored, and never what a broker has.
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": False,
    }
    return {**defaults, **params.kafka.plain(), **own}


def new_consumer(
    settings: dict[str, Any], log: ClientLog, **callbacks: Any
) -> Consumer:
    """Return a consumer.

    Raises
    ------
    ConfigError
        If librdkafka refuses a setting.
    """
    try:
        return Consumer({**settings, **callbacks}, logger=log)
    except KafkaException as exc:
        error = exc.args[0]
        reason = error.str() if isinstance(error, KafkaError) else str(error)
        raise ConfigError(f"update_source.kafka: {reason}") from exc


def source_error(what: str, error: KafkaError, reason: str = "") -> UpdateSourceError:
    """Return the error of this package for one of librdkafka's."""
    text = f"{what}: {error.str()} ({error.name()})"
    return UpdateSourceError(f"{text}; {reason}" if reason else text)


def fetched_end(
    settings: dict[str, Any], topic: str, partition: int, offset: int, timeout_s: float
) -> int | None:
    """Return where a partition ends, as a fetch at ``offset`` tells; None if before.

    Brokers are asked for the end elsewhere, but some answer with an older one. Whoever
    fetches learns the truth: a message, the end, or that the offset is out of range.

    Raises
    ------
    UpdateSourceError
        If no fetch was answered in time.
    """
    # Not the source's own consumer: messages of other partitions would come as well.
    log = ClientLog()
    consumer = new_consumer({**settings, "fetch.wait.max.ms": 10}, log)
    where = TopicPartition(topic, partition, offset)
    deadline = monotonic() + timeout_s
    try:
        consumer.assign([where])
        while monotonic() < deadline:
            message = consumer.poll(0.01)
            error = None if message is None else message.error()
            if error is not None and error.code() in _OUT_OF_RANGE:
                return None
            if error is not None:
                log.reason = error.str()
            end = consumer.get_watermark_offsets(where, cached=True)[1]
            if end >= 0:
                return int(end)
    except KafkaException as exc:
        raise source_error(f"the end of {topic}[{partition}]", exc.args[0]) from exc
    finally:
        consumer.close()
    raise UpdateSourceError(
        f"the end of {topic}[{partition}] is not known after {timeout_s:g} s; "
        f"{log.reason}"
    )
