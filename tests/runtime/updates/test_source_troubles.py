"""Brokers that are gone, deny or do not understand, settings, commits and the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from confluent_kafka import Consumer, TopicPartition

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import ClosedError, ConfigError, UpdateSourceError
from hps_numba.runtime.updates.source import KafkaSource, TroubleKind
from hps_numba.types import Position
from tests.runtime.updates.streams import (
    PATIENCE_S,
    drain,
    fill,
    messages,
    numbers,
    read,
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


def test_offsets_are_committed_under_the_group(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    fill(mock, topic, numbers(0, 10), partition=1)
    source = new_source(mock, kafka={"group.id": "servers"})
    source.commit({})
    source.commit({(topic, 0): 7, (topic, 1): 3})
    watcher = Consumer({"bootstrap.servers": mock, "group.id": "servers"})
    where = [TopicPartition(topic, 0), TopicPartition(topic, 1)]

    def committed() -> bool:
        found = watcher.committed(where, timeout=PATIENCE_S)
        return [p.offset for p in found] == [7, 3]

    wait_for(committed, PATIENCE_S)
    watcher.close()
    # What is committed decides nothing.
    assert source.begin(topic, 0, None).position == Position(0)


def test_what_a_broker_refuses_to_commit_is_logged(
    own_broker: KafkaBroker,
    topic: str,
    new_source: NewSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own_broker.create_topic(topic)
    source = new_source(own_broker.bootstrap, kafka=QUICK)
    source.topics()
    own_broker.stop()
    source.commit({(topic, 0): 1})

    def told() -> bool:
        source.poll(0.05)
        return "offsets are not committed" in caplog.text

    wait_for(told, PATIENCE_S)


def test_a_silent_broker_is_an_error_that_says_so(new_source: NewSource) -> None:
    source = new_source("127.0.0.1:1;127.0.0.1:2", kafka=QUICK)
    with pytest.raises(UpdateSourceError) as caught:
        source.topics()
    assert "127.0.0.1:1;127.0.0.1:2 does not tell its topics" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    with pytest.raises(UpdateSourceError):
        source.begin("hps_et.m.t", 0, None)
    with pytest.raises(UpdateSourceError):
        source.offset_at("hps_et.m.t", 0, 1)


def test_a_broker_that_is_gone_is_told_once_and_so_is_its_return(
    own_broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    own_broker.create_topic(topic)
    fill(own_broker.bootstrap, topic, numbers(0, 50))
    source = new_source(own_broker.bootstrap, kafka=QUICK)
    source.begin(topic, 0, None)
    messages(source, 50)
    own_broker.stop()
    told = trouble(source)
    assert told.kind is TroubleKind.DISCONNECTED
    assert "brokers are down" in told.text
    with pytest.raises(UpdateSourceError):
        source.topics()
    assert drain(source, 1.0) == []  # not again with each attempt
    own_broker.start()
    own_broker.create_topic(topic)
    fill(own_broker.bootstrap, topic, numbers(0, 10))
    # The broker lost all it had: what comes next is not there, which it does not say.
    wait_for(lambda: topic in source.topics(), PATIENCE_S)
    back, lost = read(source, 2)
    assert (back.kind, lost.kind) == (TroubleKind.CONNECTED, TroubleKind.OUT_OF_RANGE)
    assert "ends at 10, before the next offset, 50" in lost.text
    begin = source.begin(topic, 0, Position(50))
    assert (begin.position, begin.reset) == (Position(0), True)
    assert [m.value for m in messages(source, 10)] == numbers(0, 10)
    own_broker.stop()
    assert trouble(source).kind is TroubleKind.DISCONNECTED


def test_a_topic_that_is_not_there_is_told(
    broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    source = new_source(
        broker.bootstrap, kafka={"topic.metadata.propagation.max.ms": 0}
    )
    source.assign(topic, 0, 0)
    told = trouble(source)
    assert (told.kind, told.topic) == (TroubleKind.UNKNOWN_TOPIC, topic)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no.such.setting": 1}, 'No such configuration property: "no.such.setting"'),
        ({"socket.timeout.ms": "soon"}, "socket.timeout.ms"),
        ({"security.protocol": "tcp"}, "security.protocol"),
        (
            {"security.protocol": "ssl", "ssl.ca.location": "/no/such/file"},
            "ssl.ca.location",
        ),
    ],
)
def test_a_setting_that_librdkafka_refuses_is_an_error_of_the_configuration(
    settings: dict[str, object], message: str
) -> None:
    params = UpdateSourceParams(type="kafka", kafka=settings)
    with pytest.raises(ConfigError, match=r"^update_source.kafka: ") as caught:
        KafkaSource(params, group="test")
    assert message in str(caught.value)


def test_settings_reach_librdkafka(broker: KafkaBroker, new_source: NewSource) -> None:
    settings = {"socket.keepalive.enable": True, "log.connection.close": False}
    assert new_source(broker.bootstrap, kafka=settings).topics() is not None


PLAIN = {
    "security.protocol": "sasl_plaintext",
    "sasl.mechanism": "PLAIN",
    "sasl.username": "server",
    "sasl.password": "hunter2",
}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"security.protocol": "ssl"}, "SSL"), (PLAIN, "SASL")],
)
def test_a_broker_that_speaks_otherwise_is_an_error_that_says_why(
    settings: dict[str, object],
    reason: str,
    mock: str,
    new_source: NewSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = new_source(mock, kafka={**settings, **QUICK})
    with pytest.raises(UpdateSourceError, match="does not tell its topics") as caught:
        source.topics()
    assert reason in str(caught.value)
    assert "hunter2" not in str(caught.value) + caplog.text


def test_a_broker_that_is_silent_about_tls_is_an_error_that_says_why(
    own_broker: KafkaBroker, new_source: NewSource
) -> None:
    settings = {
        "security.protocol": "ssl",
        "socket.timeout.ms": 2000,
        "socket.connection.setup.timeout.ms": 1000,
    }
    source = new_source(own_broker.bootstrap, kafka=settings)
    with pytest.raises(UpdateSourceError, match="timed out in state SSL_HANDSHAKE"):
        source.topics()


def test_a_denied_access_is_told_once(
    own_broker: KafkaBroker, new_source: NewSource
) -> None:
    source = new_source(own_broker.bootstrap, kafka={**PLAIN, **QUICK})
    told = {event.kind: event for event in read(source, 2)}
    assert set(told) == {TroubleKind.DISCONNECTED, TroubleKind.DENIED}
    assert "mechanism handshake failed" in told[TroubleKind.DENIED].text
    assert drain(source, 1.0) == []


def test_what_librdkafka_says_goes_to_the_log_of_the_package(
    new_source: NewSource,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    source = new_source("127.0.0.1:1")

    def told() -> bool:
        source.poll(0.05)
        return any("refused" in r.getMessage() for r in caplog.records)

    wait_for(told)
    said = [r for r in caplog.records if "refused" in r.getMessage()]
    assert {(r.name, r.levelno) for r in said} == {
        ("hps_numba.runtime.updates.client", logging.DEBUG)  # with each attempt
    }
    assert capfd.readouterr().err == ""


def test_a_closed_source_refuses_everything(
    mock: str, topic: str, new_source: NewSource
) -> None:
    source = new_source(mock)
    fill(mock, topic, numbers(0, 10))
    source.assign(topic, 0, 0)
    messages(source, 2)
    source.close()
    source.close()
    for call in (
        lambda: source.topics(),
        lambda: source.watermarks(topic, 0),
        lambda: source.offset_at(topic, 0, 0),
        lambda: source.begin(topic, 0, None),
        lambda: source.assign(topic, 0, 0),
        lambda: source.unassign(topic, 0),
        lambda: source.seek(topic, 0, 0),
        lambda: source.pause(topic, 0),
        lambda: source.resume(topic, 0),
        lambda: source.poll(0),
        lambda: source.commit({(topic, 0): 1}),
    ):
        with pytest.raises(ClosedError):
            call()


# A commit that no broker takes must not hold up the end; one in three was on its way.
@pytest.mark.parametrize("attempt", range(3))
def test_a_source_closes_when_the_broker_is_gone(
    attempt: int, own_broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    own_broker.create_topic(topic)
    fill(own_broker.bootstrap, topic, numbers(0, 10))
    source = new_source(own_broker.bootstrap, kafka=QUICK)
    source.begin(topic, 0, None)
    messages(source, 10)
    if attempt:
        source.commit({(topic, 0): 4})
        drain(source)
    source.commit({(topic, 0): 5})
    own_broker.stop()
    closing = threading.Thread(target=source.close)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()


def test_the_last_commit_arrives_before_the_end(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    watcher = Consumer({"bootstrap.servers": mock, "group.id": "test"})
    for offset in range(1, 10):
        source = new_source(mock)
        source.topics()
        source.commit({(topic, 0): offset})
        source.close()
        (found,) = watcher.committed([TopicPartition(topic, 0)], timeout=PATIENCE_S)
        assert found.offset == offset
    watcher.close()
