"""Where reading begins: from the stored position, or as the settings say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hps_numba.config import UpdateSourceParams
from hps_numba.errors import UpdateSourceError
from hps_numba.runtime.updates.beginning import begin_at
from hps_numba.runtime.updates.source import KafkaSource, TroubleKind
from hps_numba.types import Position
from tests.runtime.updates.streams import drain, fill, messages, numbers, trouble
from tests.support.kafka_broker import KafkaBroker

pytestmark = pytest.mark.service

NewSource = Callable[..., KafkaSource]
POLICIES = [("earliest", 0), ("latest", 10)]


def test_without_a_stored_position_all_is_read(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock)
    begin = source.begin(topic, 0, None)
    assert (begin.position, begin.reset) == (Position(0), False)
    assert [m.offset for m in messages(source, 10)] == list(range(10))


def test_without_a_stored_position_only_what_is_new_may_be_read(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock, initial_offset="latest")
    begin = source.begin(topic, 0, None)
    assert (begin.position, begin.reset) == (Position(10), False)
    fill(mock, topic, numbers(10, 12))
    assert [m.offset for m in messages(source, 2)] == [10, 11]


@pytest.mark.parametrize("stored", [Position(0), Position(4), Position(9, 7)])
@pytest.mark.parametrize("initial_offset", ["earliest", "latest"])
def test_a_stored_position_is_where_reading_goes_on(
    stored: Position, initial_offset: str, mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock, initial_offset=initial_offset)
    begin = source.begin(topic, 0, stored)
    assert (begin.position, begin.reset) == (stored, False)
    expected = list(range(stored.offset, 10))
    assert [m.offset for m in messages(source, len(expected))] == expected


def test_a_position_at_the_end_waits_for_the_next_message(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock)
    assert not source.begin(topic, 0, Position(10)).reset
    assert drain(source) == []
    fill(mock, topic, numbers(10, 11))
    assert [m.offset for m in messages(source, 1)] == [10]


# The rest of a message that was applied in part must be there: 10:1 needs offset 10.
@pytest.mark.parametrize("stored", [Position(11), Position(10, 1), Position(2**40)])
@pytest.mark.parametrize(("policy", "offset"), POLICIES)
def test_a_position_beyond_the_end_is_reset(
    stored: Position,
    policy: str,
    offset: int,
    mock: str,
    topic: str,
    new_source: NewSource,
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock, offset_reset=policy)
    begin = source.begin(topic, 0, stored)
    assert (begin.position, begin.reset) == (Position(offset), True)
    assert f"stored position {stored} is beyond the end, 10" in begin.reason
    assert "made anew" in begin.reason
    assert policy in begin.reason
    fill(mock, topic, numbers(10, 11))
    expected = list(range(offset, 11))
    assert [m.offset for m in messages(source, len(expected))] == expected


@pytest.mark.parametrize(("policy", "offset"), [("earliest", 4), ("latest", 10)])
def test_a_position_that_retention_removed_is_reset(
    policy: str,
    offset: int,
    mock: str,
    topic: str,
    new_source: NewSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock, offset_reset=policy)
    # No broker here removes messages: the answer of one that did.
    monkeypatch.setattr(source, "watermarks", lambda *_: (4, 10))
    begin = source.begin(topic, 0, Position(3, 5))
    assert (begin.position, begin.reset) == (Position(offset), True)
    assert "stored position 3:5 is gone; the first is 4" in begin.reason
    assert not source.begin(topic, 0, Position(4)).reset


@pytest.mark.parametrize(("low", "end"), [(0, 0), (5, 5), (3, 9)])
def test_every_position_is_kept_or_reset(low: int, end: int) -> None:
    params = UpdateSourceParams()

    def fetch(offset: int) -> int | None:
        assert offset >= low  # or the fetch itself would be out of range
        return end if offset <= end else None

    for offset in range(12):
        for record in (0, 4):
            stored = Position(offset, record)
            kept = low <= offset and offset + (record > 0) <= end
            for told in range(low, end + 1):  # a broker may tell an older end
                begin = begin_at(params, stored, low, told, fetch=fetch)
                assert begin.reset is not kept
                assert begin.position == (stored if kept else Position(low))


def test_a_lost_position_may_stop_the_partition(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    source = new_source(mock, offset_reset="stop")
    begin = source.begin(topic, 0, Position(11))
    assert (begin.position, begin.reset) == (None, True)
    assert "beyond the end" in begin.reason
    fill(mock, topic, numbers(10, 11))
    assert drain(source) == []
    source.assign(topic, 0, 9)  # as a person may decide
    assert [m.offset for m in messages(source, 2)] == [9, 10]


def test_beginning_again_reads_nothing_twice(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 100))
    source = new_source(mock)
    source.begin(topic, 0, None)
    messages(source, 3)
    assert not source.begin(topic, 0, Position(50)).reset
    assert [m.offset for m in messages(source, 50)] == list(range(50, 100))


def test_an_offset_that_is_gone_while_reading_is_told_and_begun_again(
    mock: str, topic: str, new_source: NewSource
) -> None:
    fill(mock, topic, numbers(0, 10))
    fill(mock, topic, numbers(0, 10), partition=1)
    source = new_source(mock)
    source.assign(topic, 0, 40)
    told = trouble(source)
    assert (told.kind, told.topic, told.partition) == (
        TroubleKind.OUT_OF_RANGE,
        topic,
        0,
    )
    assert source.begin(topic, 0, Position(40)).reset
    assert len(messages(source, 10)) == 10
    source.assign(topic, 1, 0)  # others are not concerned
    assert {m.partition for m in messages(source, 10)} == {1}


def test_a_broker_that_tells_an_old_end_is_not_believed(
    broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    broker.create_topic(topic)
    fill(broker.bootstrap, topic, numbers(0, 50))
    source = new_source(broker.bootstrap)
    for stored in (Position(49), Position(49, 3), Position(50)):
        begin = source.begin(topic, 0, stored)
        assert (begin.position, begin.reset) == (stored, False)
    fill(broker.bootstrap, topic, numbers(50, 51))
    assert [m.offset for m in messages(source, 1)] == [50]


@pytest.mark.parametrize(("policy", "offset"), POLICIES)
def test_a_topic_that_was_made_anew_is_noticed_without_help_of_the_broker(
    policy: str, offset: int, broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    broker.create_topic(topic)
    fill(broker.bootstrap, topic, numbers(0, 50))
    broker.create_topic(topic)
    fill(broker.bootstrap, topic, numbers(0, 10))
    source = new_source(broker.bootstrap, offset_reset=policy)
    for stored in (Position(10, 1), Position(11), Position(50)):
        begin = source.begin(topic, 0, stored)
        assert (begin.position, begin.reset) == (Position(offset), True)
        assert f"{stored} is beyond the end, 10" in begin.reason


def test_a_partition_that_is_not_there_has_no_beginning(
    broker: KafkaBroker, topic: str, new_source: NewSource
) -> None:
    broker.create_topic(topic, 2)
    source = new_source(broker.bootstrap)
    with pytest.raises(UpdateSourceError, match=r"the ends of .*\[2\]"):
        source.begin(topic, 2, None)
