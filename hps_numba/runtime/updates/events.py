"""What a source of updates tells: messages and troubles."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


# Not frozen: that would cost half a microsecond for each message.
@dataclass(slots=True)
class Message:
    """A message of a stream partition.

    Parameters
    ----------
    topic, partition, offset
        Where it stands.
    timestamp_ms
        When it was produced or stored, in ms since 1970; None if the broker has none.
    key, value
        Its Kafka key, and its frame.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes | None


class TroubleKind(Enum):
    """What may happen to a source."""

    DISCONNECTED = "no broker answers"
    CONNECTED = "a broker answers again"
    OUT_OF_RANGE = "the next message is not there"
    UNKNOWN_TOPIC = "the topic is not there"
    DENIED = "access denied"
    FATAL = "fatal"
    OTHER = "error"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that happened, other than a message.

    Parameters
    ----------
    kind
        What.
    topic, partition
        Of the stream partition that it concerns, or ``""`` and -1.
    text
        For people.
    """

    kind: TroubleKind
    topic: str
    partition: int
    text: str
