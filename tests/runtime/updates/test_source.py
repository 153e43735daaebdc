"""What a source of updates brings, in which order, and what it tells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from confluent_kafka import Producer, TopicPartition

from hps_numba.errors import UpdateSourceError
from hps_numba.runtime.updates.source import KafkaSource, Message, TroubleKind
from tests.runtime.updates.streams import (
    PATIENCE_S,
    drain,
    fill,
    messages,
    numbers,
    trouble,
)
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

NewSource = Callable[..., KafkaSource]
QUICK = {"socket.timeout.ms": 1200}


@pytest.fixture
def source(broker: KafkaBroker, new_source: NewSource) -> KafkaSource:
    return new_source(broker.bootstrap)


def test_topics_of_tables_are_found_with_their_partitions(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic, 3)
    broker.create_topic(f"other.{topic}")
    broker.create_topic(f"{topic}2")
    found = source.topics()
    assert found[topic] == (0, 1, 2)
    assert found[f"{topic}2"] == (0,)
    assert all(name.startswith("hps_et.") for name in found)


def test_a_message_comes_as_it_was_sent(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic, 2)
    fill(broker.bootstrap, topic, [b"frame"], partition=1, timestamp=1234)
    fill(broker.bootstrap, topic, [None], partition=1, key=b"delete", timestamp=99)
    fill(broker.bootstrap, topic, [b""], partition=1, key=b"", timestamp=2**40)
    source.assign(topic, 1, 0)
    assert messages(source, 3) == [
        Message(topic, 1, 0, 1234, None, b"frame"),
        Message(topic, 1, 1, 99, b"delete", None),
        Message(topic, 1, 2, 2**40, b"", b""),
    ]


def test_messages_of_any_size_keep_their_order_in_each_partition(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic, 4)
    rng = np.random.default_rng(5)
    sent: dict[int, list[bytes]] = {}
    for partition in range(4):
        sizes = rng.choice(
            [0, 1, 100, 20_000, 300_000], 60, p=[0.1, 0.4, 0.3, 0.1, 0.1]
        )
        sent[partition] = [rng.bytes(size) for size in sizes]
        fill(broker.bootstrap, topic, sent[partition], partition=partition)
        source.assign(topic, partition, 0)
    got: dict[int, list[bytes | None]] = {partition: [] for partition in range(4)}
    for message in messages(source, 240):
        assert message.offset == len(got[message.partition])
        got[message.partition].append(message.value)
    assert got == sent
    assert drain(source) == []


def test_messages_larger_than_all_buffers_come_too(
    broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    broker.create_topic(topic)
    large = np.random.default_rng(6).bytes(3 << 20)
    source = new_source(broker.bootstrap, receive_buffer_size=1024)
    producer = Producer(
        {"bootstrap.servers": broker.bootstrap, "message.max.bytes": 4 << 20}
    )
    for value in (b"before", large, b"after"):
        producer.produce(topic, value, partition=0)
    assert producer.flush(PATIENCE_S) == 0
    source.assign(topic, 0, 0)
    assert [m.value for m in messages(source, 3)] == [b"before", large, b"after"]


def test_polling_without_waiting_takes_all_that_has_arrived(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 1000))
    assert source.poll(0) is None
    source.assign(topic, 0, 0)
    first = messages(source, 1)
    wait_for(lambda: source.end(topic, 0) == 1000)
    offsets = [first[0].offset]
    while len(offsets) < 1000:
        event = source.poll(0)
        if isinstance(event, Message):
            offsets.append(event.offset)
    assert offsets == list(range(1000))


def test_two_sources_of_one_group_read_the_same(
    broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    broker.create_topic(topic)
    fill(broker.bootstrap, topic, numbers(0, 100))
    sources = [new_source(broker.bootstrap) for _ in range(2)]
    for source in sources:
        source.begin(topic, 0, None)
    for source in sources:
        assert [m.value for m in messages(source, 100)] == numbers(0, 100)


def test_seeking_goes_back_and_forth_and_leaves_nothing_behind(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 300))
    fill(mock, topic, numbers(0, 20), partition=1)
    source.assign(topic, 0, 0)
    for offset in (250, 0, 100, 100, 299):
        messages(source, 1)  # many more have been taken with it
        source.seek(topic, 0, offset)
        assert messages(source, 1)[0].offset == offset
    source.seek(topic, 0, 290)
    source.assign(topic, 1, 0)
    got = messages(source, 30)
    assert [m.offset for m in got if m.partition == 0] == list(range(290, 300))
    assert [m.offset for m in got if m.partition == 1] == list(range(20))


def test_seeking_goes_on_from_an_offset_out_of_range(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 10))
    source.assign(topic, 0, 11)
    assert trouble(source).kind is TroubleKind.OUT_OF_RANGE
    source.seek(topic, 0, 8)
    assert [m.offset for m in messages(source, 2)] == [8, 9]


def test_nothing_comes_of_a_partition_that_is_read_no_more(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 100))
    fill(mock, topic, numbers(0, 100), partition=1)
    source.assign(topic, 0, 0)
    source.assign(topic, 1, 0)
    messages(source, 3)
    source.unassign(topic, 0)
    source.unassign(topic, 0)
    assert {m.partition for m in drain(source) if isinstance(m, Message)} == {1}
    source.assign(topic, 0, 50)
    assert [m.offset for m in messages(source, 50)] == list(range(50, 100))


def test_a_partition_is_assigned_once(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 1))
    source.assign(topic, 0, 0)
    with pytest.raises(UpdateSourceError, match="already part of the current"):
        source.assign(topic, 0, 0)


def test_a_paused_partition_loses_and_repeats_nothing(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic, 2)
    values = [b"x" * 50_000 for _ in range(200)]  # more than is taken at once
    fill(broker.bootstrap, topic, values)
    fill(broker.bootstrap, topic, numbers(0, 5), partition=1)
    source.assign(topic, 0, 0)
    got = messages(source, 5)
    source.pause(topic, 0)
    late = drain(source)
    assert sum(len(m.value or b"") for m in late if isinstance(m, Message)) <= 2 << 20
    source.assign(topic, 1, 0)
    assert {m.partition for m in messages(source, 5)} == {1}
    source.resume(topic, 0)
    rest = messages(source, 200 - 5 - len(late))
    offsets = [m.offset for m in [*got, *late, *rest] if isinstance(m, Message)]
    assert offsets == list(range(200))


def test_the_end_is_known_from_the_last_fetch(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic)
    assert source.end(topic, 0) is None
    fill(broker.bootstrap, topic, numbers(0, 50))
    source.assign(topic, 0, 0)
    messages(source, 50)
    assert source.end(topic, 0) == 50
    fill(broker.bootstrap, topic, numbers(50, 60))
    messages(source, 10)
    assert source.end(topic, 0) == 60
    source.close()
    assert source.end(topic, 0) is None


def test_watermarks_are_those_of_the_broker(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 10))
    assert source.watermarks(topic, 0) == (0, 10)
    assert source.watermarks(topic, 3) == (0, 0)
    with pytest.raises(UpdateSourceError, match=r"the ends of .*\[9\].*UNKNOWN"):
        source.watermarks(topic, 9)


def test_the_real_end_is_known_where_the_watermark_is_old(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic, 2)
    assert source.real_end(topic, 0) == 0
    fill(broker.bootstrap, topic, numbers(0, 50))
    fill(broker.bootstrap, topic, numbers(50, 70))
    assert source.real_end(topic, 0) == 70
    assert source.real_end(topic, 1) == 0
    with pytest.raises(UpdateSourceError):
        source.real_end(topic, 2)


@pytest.mark.parametrize("largest", [1024, 2**64 - 1])
def test_sizes_and_times_of_any_length_are_taken(
    largest: int, mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 3))
    source = new_source(
        mock,
        receive_buffer_size=largest,
        metadata_refresh_interval_ms=max(largest, 10),
    )
    source.begin(topic, 0, None)
    assert [m.value for m in messages(source, 3)] == numbers(0, 3)


def test_a_time_has_an_offset(
    broker: KafkaBroker, topic: str, source: KafkaSource
) -> None:
    broker.create_topic(topic)
    for i, second in enumerate((10, 20, 30)):
        fill(broker.bootstrap, topic, numbers(i, i + 1), timestamp=second * 1000)
    found = [source.offset_at(topic, 0, t) for t in (1, 10_000, 10_001, 20_000, 30_000)]
    # Tansu answers with the first message whatever the time is.
    assert found == ([0, 0, 0, 0, 0] if broker.is_own else [0, 0, 1, 1, 2])


@pytest.mark.parametrize(("answer", "offset"), [(7, 7), (0, 0), (-1, 10)])
def test_the_offset_of_a_time_is_what_the_broker_says_or_the_end(
    answer: int,
    offset: int,
    mock: str,
    topic: str,
    new_source: NewSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 10))
    asked: list[TopicPartition] = []

    class Client:
        def offsets_for_times(
            self, times: list[TopicPartition], timeout: float
        ) -> list[TopicPartition]:
            asked.extend(times)
            assert timeout == source._timeout_s
            return [TopicPartition(topic, 0, answer)]

        def __getattr__(self, name: str) -> object:
            return getattr(client, name)

    client = source._consumer
    monkeypatch.setattr(source, "_consumer", Client())
    assert source.offset_at(topic, 0, 1234) == offset
    assert [(t.topic, t.partition, t.offset) for t in asked] == [(topic, 0, 1234)]
    monkeypatch.undo()
    # The mock cluster has no message of any time.
    assert source.offset_at(topic, 0, 1234) == 10
