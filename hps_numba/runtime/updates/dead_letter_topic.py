"""A topic for messages that cannot be applied."""

from __future__ import annotations

import logging

from confluent_kafka import KafkaException, Producer

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import UpdateSourceError
from hps_numba.runtime.updates.dead_letters import Letter

logger = logging.getLogger(__name__)

_FLUSH_S = 10.0


class DeadLetterTopic:
    """Sends refused messages to a topic, as they came, with headers that say why.

    Headers are ``reason``, ``topic``, ``partition``, ``offset`` and ``timestamp_ms``.

    Parameters
    ----------
    params
        The configuration, with ``dead_letter_topic``.
    """

    def __init__(self, params: UpdateSourceParams) -> None:
        assert params.dead_letter_topic is not None
        self._topic = params.dead_letter_topic
        self._producer = Producer(
            {
                "message.max.bytes": 1_000_000_000,  # the broker has the last word
                **params.kafka.plain(),
                "bootstrap.servers": params.brokers.replace(";", ","),
                "enable.idempotence": True,
            }
        )

    def keep(self, letter: Letter, reason: str) -> None:
        """Send a message; if it is not delivered, the log says so."""
        where = f"table={letter.topic} partition={letter.partition}"
        headers = {
            "reason": reason,
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
            "timestamp_ms": str(letter.timestamp_ms),
        }

        def delivered(error: object, _: object) -> None:
            if error is not None:
                logger.error(
                    "%s offset=%d is not in topic %s: %s",
                    where,
                    letter.offset,
                    self._topic,
                    error,
                )

        try:
            self._producer.produce(
                self._topic,
                value=letter.value,
                key=letter.key,
                headers=list(headers.items()),
                on_delivery=delivered,
            )
            self._producer.poll(0)
        except (BufferError, KafkaException) as exc:
            raise UpdateSourceError(f"dead letter topic {self._topic}: {exc}") from exc

    def close(self) -> None:
        """Wait until all messages are delivered, for some seconds."""
        left = self._producer.flush(_FLUSH_S)
        if left:
            logger.error("%d messages are not in topic %s", left, self._topic)
