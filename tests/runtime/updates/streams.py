"""Filling streams and reading them, for tests of sources."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from confluent_kafka import Producer

from hps_numba.runtime.updates.source import KafkaSource, Message, Trouble

PATIENCE_S = 20.0


def fill(
    address: str,
    topic: str,
    values: Iterable[bytes | None],
    *,
    partition: int = 0,
    **message: object,
) -> None:
    """Produce messages in order; returns when the broker has them."""
    producer = Producer({"bootstrap.servers": address, "log_level": 0})
    for value in values:
        producer.produce(topic, value, partition=partition, **message)
    assert producer.flush(PATIENCE_S) == 0


def numbers(first: int, last: int) -> list[bytes]:
    """Return values that tell the offset they should have."""
    return [b"%d" % i for i in range(first, last)]


def read(source: KafkaSource, n: int) -> list[Message | Trouble]:
    """Return the next ``n`` events."""
    events: list[Message | Trouble] = []
    deadline = monotonic() + PATIENCE_S
    while len(events) < n:
        assert monotonic() < deadline, f"{len(events)} of {n}: {events[-3:]}"
        event = source.poll(0.05)
        if event is not None:
            events.append(event)
    return events


def messages(source: KafkaSource, n: int) -> list[Message]:
    """Return the next ``n`` messages; anything else fails."""
    events = read(source, n)
    assert all(isinstance(event, Message) for event in events), events
    return [event for event in events if isinstance(event, Message)]


def trouble(source: KafkaSource) -> Trouble:
    """Return the next event, which is no message."""
    (event,) = read(source, 1)
    assert isinstance(event, Trouble), event
    return event


def drain(source: KafkaSource, quiet_s: float = 0.3) -> list[Message | Trouble]:
    """Return what comes until nothing has for a while."""
    events: list[Message | Trouble] = []
    while (event := source.poll(quiet_s)) is not None:
        events.append(event)
    return events
