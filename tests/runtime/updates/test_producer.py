"""The producer against real brokers: every record, where it belongs, in order."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from time import monotonic

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from hps_numba import ClosedError, ConfigError
from hps_numba.errors import UpdateSourceError
from hps_numba.runtime.updates.outbox import Outbox, Parcel
from hps_numba.runtime.updates.producer import UpdateProducer
from tests.kernels.test_hashing import reference_hash
from tests.support.faulty_kafka import FaultyKafka
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

READ_TIMEOUT_S = 20.0
TOPIC = "hps_et.m.t"

# partition, whether it is a deletion, records of (key, row bytes)
Message = tuple[int, bool, list[tuple[int, bytes]]]


@pytest.fixture(scope="module")
def broker() -> Iterator[KafkaBroker]:
    with KafkaBroker() as started:
        yield started


@pytest.fixture
def topic(broker: KafkaBroker) -> str:
    broker.create_topic(TOPIC, 3)
    return TOPIC


def parsed(frame: bytes) -> list[tuple[int, bytes]]:
    """Read a frame record by record."""
    magic, size = struct.unpack_from("<4sI", frame)
    assert magic == b"HCTR"
    width = 8 + size
    assert (len(frame) - 8) % width == 0
    return [
        (struct.unpack_from("<q", frame, at)[0], frame[at + 8 : at + width])
        for at in range(8, len(frame), width)
    ]


def read(bootstrap: str, topic: str, n_records: int) -> list[Message]:
    """Return a topic's messages by partition, until ``n_records`` were read."""
    settings = {"bootstrap.servers": bootstrap, "group.id": "test", "log_level": 0}
    consumer = Consumer({**settings, "auto.offset.reset": "earliest"})
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
    messages: list[Message] = []

    def complete() -> bool:
        while (message := consumer.poll(0.1)) is not None:
            assert message.error() is None, message.error()
            assert message.key() in (None, b"delete")
            records = parsed(message.value())
            messages.append((message.partition(), message.key() is not None, records))
        return sum(len(each[2]) for each in messages) >= n_records

    wait_for(complete, READ_TIMEOUT_S, what=f"{n_records} records of {topic}")
    consumer.close()
    assert sum(len(each[2]) for each in messages) == n_records
    return sorted(messages, key=lambda each: each[0])  # stable: in order of offsets


def replay(messages: list[Message]) -> dict[int, bytes]:
    """The table after all messages."""
    table: dict[int, bytes] = {}
    for _, is_delete, records in messages:
        for key, row in records:
            if is_delete:
                assert row == b""
                table.pop(key, None)
            else:
                table[key] = row
    return table


def check_places(messages: list[Message], n_groups: int, n_partitions: int) -> None:
    for partition, _, records in messages:
        for key, _ in records:
            assert reference_hash(key) % n_groups % n_partitions == partition


def some_keys(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**63), 2**63, n)


def some_rows(n: int, dim: int = 4, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).random((n, dim), np.float32)


def test_every_row_arrives_once_in_the_partition_of_its_hash(
    broker: KafkaBroker, topic: str
) -> None:
    keys, rows = some_keys(5000), some_rows(5000)
    with UpdateProducer(broker.bootstrap) as producer:
        for start in range(0, 5000, 700):
            part = slice(start, start + 700)
            producer.send("m", "t", keys[part], rows[part])
    messages = read(broker.bootstrap, topic, 5000)
    check_places(messages, 8, 3)
    assert replay(messages) == {
        key: row.tobytes() for key, row in zip(keys.tolist(), rows, strict=True)
    }


def test_rows_and_deletions_of_a_key_keep_the_order_of_the_calls(
    broker: KafkaBroker, topic: str
) -> None:
    rng = np.random.default_rng(5)
    table: dict[int, bytes] = {}
    n_records = 0
    with UpdateProducer(broker.bootstrap, message_bytes=1000) as producer:
        for step in range(300):
            keys = rng.integers(0, 40, rng.integers(1, 30))
            n_records += len(keys)
            if rng.random() < 0.4:
                producer.delete("m", "t", keys)
                for key in keys.tolist():
                    table.pop(key, None)
            else:
                rows = some_rows(len(keys), seed=step)
                producer.send("m", "t", keys, rows)
                for key, row in zip(keys.tolist(), rows, strict=True):
                    table[key] = row.tobytes()
    assert replay(read(broker.bootstrap, topic, n_records)) == table


def test_messages_are_filled_up_to_their_size_and_no_further(
    broker: KafkaBroker, topic: str
) -> None:
    with UpdateProducer(
        broker.bootstrap, message_bytes=4096, num_partitions=1, linger_ms=1e6
    ) as producer:
        for start in range(0, 3000, 50):
            keys = np.arange(start, start + 50)
            producer.send("m", "t", keys, some_rows(50, dim=8))
    sizes = [len(each[2]) for each in read(broker.bootstrap, topic, 3000)]
    full = (4096 - 128 - 8) // 40
    assert sizes[:-1] == [full] * (3000 // full)
    assert sizes[-1] == 3000 % full


def test_a_row_waits_for_others_no_longer_than_the_linger_time(
    broker: KafkaBroker, topic: str
) -> None:
    with UpdateProducer(broker.bootstrap, linger_ms=1) as producer:
        producer.send("m", "t", [1, 2, 3], some_rows(3))
        # Without a flush, and without another call.
        assert replay(read(broker.bootstrap, topic, 3)).keys() == {1, 2, 3}


def test_flush_returns_when_everything_was_acknowledged(
    broker: KafkaBroker, topic: str
) -> None:
    with UpdateProducer(broker.bootstrap, linger_ms=1e6) as producer:
        producer.send("m", "t", np.arange(100), some_rows(100))
        producer.delete("m", "t", np.arange(10))
        assert producer.stats().rows == 0
        producer.flush()
        stats = producer.stats()
        assert (stats.rows, stats.errors, stats.waiting) == (110, 0, 0)
        assert stats.messages == 6
        assert stats.bytes == 100 * 24 + 10 * 8 + 6 * 8
        producer.flush()
        assert producer.stats() == stats


def test_half_rows_travel_as_halves_and_other_numbers_as_float32(
    broker: KafkaBroker, topic: str
) -> None:
    with UpdateProducer(broker.bootstrap, num_partitions=1) as producer:
        producer.send("m", "t", [1], np.float16([[1.5, -2.0]]))
        producer.send("m", "t", np.uint8([2]), np.float64([[1.5, -2.0]]))
        producer.send("m", "t", [3], [[7, 8]])
        producer.send("m", "t", [], np.empty((0, 2), np.float32))
    assert replay(read(broker.bootstrap, topic, 3)) == {
        1: struct.pack("<2e", 1.5, -2.0),
        2: struct.pack("<2f", 1.5, -2.0),
        3: struct.pack("<2f", 7, 8),
    }


def test_a_large_send_with_strides_is_what_a_small_one_is(
    broker: KafkaBroker, topic: str
) -> None:
    wide = some_rows(70_000, dim=20)
    keys = np.arange(140_000)[::2]
    with UpdateProducer(broker.bootstrap, message_bytes=200_000) as producer:
        producer.send("m", "t", keys, wide[:, ::2])
    table = replay(read(broker.bootstrap, topic, 70_000))
    assert len(table) == 70_000
    assert all(
        table[key] == row.tobytes()
        for key, row in zip(keys.tolist(), wide[:, ::2], strict=True)
    )


def test_several_threads_may_send_at_once(broker: KafkaBroker, topic: str) -> None:
    with UpdateProducer(broker.bootstrap, message_bytes=2048) as producer:

        def publish(number: int) -> None:
            for version in range(50):
                keys = np.arange(number * 100, number * 100 + 20)
                rows = np.full((20, 2), version, np.float32)
                producer.send("m", "t", keys, rows)
                if version % 10 == 0:
                    producer.flush()

        threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    table = replay(read(broker.bootstrap, topic, 4 * 50 * 20))
    newest = struct.pack("<2f", 49, 49)
    assert len(table) == 80
    assert set(table.values()) == {newest}


def test_a_topic_that_is_not_there_is_made_by_brokers_that_do(
    broker: KafkaBroker,
) -> None:
    with UpdateProducer(broker.bootstrap) as producer:
        producer.send("m", "appears", [1], [[1.0]])
    assert len(read(broker.bootstrap, "hps_et.m.appears", 1)) == 1
    broker.delete_topic("hps_et.m.appears")


@pytest.mark.parametrize(
    ("keys", "rows", "error", "text"),
    [
        ([1, 2], [[1.0, 2.0]], ValueError, "rows of 2 keys have shape"),
        ([1], [1.0], ValueError, r"hps_et\.m\.t: rows of 1 keys have shape"),
        ([[1]], [[1.0]], ValueError, r"keys are \(n,\)"),
        ([1.5], [[1.0]], TypeError, "keys are integers"),
        ([1], [["x"]], TypeError, "rows are numbers"),
        ([1], np.empty((1, 0), np.float32), ValueError, "rows of 0 values"),
        ([1], np.zeros((1, 4000), np.float32), ValueError, "do not fit into messages"),
    ],
)
def test_keys_and_rows_that_do_not_fit_are_refused_before_they_leave(
    broker: KafkaBroker, topic: str, keys: object, rows: object, error: type, text: str
) -> None:
    with UpdateProducer(broker.bootstrap, message_bytes=16_000) as producer:
        with pytest.raises(error, match=text):
            producer.send("m", "t", keys, rows)
        producer.flush()
        assert producer.stats().messages == 0


def test_rows_of_another_dim_than_before_are_refused(
    broker: KafkaBroker, topic: str
) -> None:
    with UpdateProducer(broker.bootstrap) as producer:
        producer.send("m", "t", [1], [[1.0, 2.0]])
        with pytest.raises(ValueError, match=r"hps_et\.m\.t: .*\(1, 2\); got \(1, 3\)"):
            producer.send("m", "t", [1], [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("table", ["", "a b", "ä", "a/b", "x" * 300])
def test_a_table_that_cannot_be_a_topic_is_refused(
    broker: KafkaBroker, table: str
) -> None:
    with (
        UpdateProducer(broker.bootstrap) as producer,
        pytest.raises(ValueError, match="cannot be a Kafka topic"),
    ):
        producer.send("m", table, [1], [[1.0]])


def test_a_closed_producer_takes_nothing_and_closes_again(broker: KafkaBroker) -> None:
    producer = UpdateProducer(broker.bootstrap)
    producer.close()
    producer.close()
    with pytest.raises(ClosedError):
        producer.send("m", "t", [1], [[1.0]])
    with pytest.raises(ClosedError):
        producer.flush()


def test_an_exit_without_close_delivers_what_waits(
    broker: KafkaBroker, topic: str
) -> None:
    code = (
        "import sys; from hps_numba.runtime.updates.producer import UpdateProducer\n"
        "producer = UpdateProducer(sys.argv[1], linger_ms=1e6)\n"
        "producer.send('m', 't', [1, 2], [[1.0], [2.0]])\n"
    )
    subprocess.run([sys.executable, "-c", code, broker.bootstrap], check=True)
    assert replay(read(broker.bootstrap, topic, 2)).keys() == {1, 2}


def test_a_forked_process_must_have_a_producer_of_its_own(broker: KafkaBroker) -> None:
    code = (
        "import os, sys\n"
        "from hps_numba.errors import UpdateSourceError\n"
        "from hps_numba.runtime.updates.producer import UpdateProducer\n"
        "producer = UpdateProducer(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        producer.send('m', 't', [1], [[1.0]])\n"
        "    except UpdateSourceError as exc:\n"
        "        assert 'after the fork' in str(exc)\n"
        "        producer.close()\n"
        "        os._exit(17)\n"
        "_, status = os.wait()\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, broker.bootstrap], timeout=60
    )
    assert done.returncode == 17


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"no.such": 1}, 'No such configuration property: "no.such"'),
        ({"transactional.id": "x"}, "transactional.id is not for callers"),
        ({"bootstrap.servers": "x"}, "bootstrap.servers is not for callers"),
        ({"acks": 1}, "acks"),
        ({"enable.idempotence": False, "acks": 1}, "acks"),
        ({"enable.idempotence": True, "compression.type": "none!"}, "compression"),
    ],
)
def test_settings_that_cannot_be_are_named(
    settings: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        UpdateProducer("127.0.0.1:9", settings=settings)


def test_sizes_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="num_partitions=0"):
        UpdateProducer("127.0.0.1:9", num_partitions=0)
    with pytest.raises(ConfigError, match="queue_bytes=1000000"):
        UpdateProducer("127.0.0.1:9", queue_bytes=1_000_000)


def test_a_lost_message_is_the_error_of_the_next_call_once() -> None:
    with FaultyKafka({TOPIC: 2}) as kafka, UpdateProducer(kafka.bootstrap) as producer:
        kafka.refuse_produce(KafkaError.POLICY_VIOLATION)
        producer.send("m", "t", [7], [[1.0]])
        wait_for(lambda: producer.stats().errors, what="the delivery report")
        with pytest.raises(UpdateSourceError) as caught:
            producer.send("m", "t", [8], [[1.0]])
        partition = reference_hash(7) % 8 % 2
        where = f"1 records of topic {TOPIC}, partition {partition},"
        assert where in str(caught.value)
        assert "Policy violation" in str(caught.value)
        producer.send("m", "t", [9], [[2.0]])
        producer.flush()
        stats = producer.stats()
        assert (stats.rows, stats.errors, stats.waiting) == (1, 1, 0)
        assert replay(read(kafka.bootstrap, TOPIC, 1)).keys() == {9}


def test_losses_are_raised_by_flush_and_by_close() -> None:
    with FaultyKafka({TOPIC: 1}) as kafka:
        producer = UpdateProducer(kafka.bootstrap)
        kafka.refuse_produce(KafkaError.POLICY_VIOLATION)
        producer.send("m", "t", np.arange(5), some_rows(5))
        with pytest.raises(UpdateSourceError, match="5 records"):
            producer.flush()
        producer.flush()
        kafka.refuse_produce(KafkaError.POLICY_VIOLATION)
        producer.send("m", "t", np.arange(6), some_rows(6))
        with pytest.raises(UpdateSourceError, match="6 records"):
            producer.close()
        producer.close()


def test_a_message_that_brokers_find_too_large_says_what_to_change() -> None:
    with FaultyKafka({TOPIC: 1}) as kafka, UpdateProducer(kafka.bootstrap) as producer:
        kafka.refuse_produce(KafkaError.MSG_SIZE_TOO_LARGE)
        producer.send("m", "t", [1], [[1.0]])
        with pytest.raises(UpdateSourceError, match="make message_bytes smaller"):
            producer.flush()


def test_a_message_too_large_for_the_settings_is_lost_aloud() -> None:
    settings = {"message.max.bytes": 2000}
    with (
        FaultyKafka({TOPIC: 1}) as kafka,
        UpdateProducer(kafka.bootstrap, settings=settings) as producer,
    ):
        producer.send("m", "t", np.arange(1000), some_rows(1000))
        with pytest.raises(UpdateSourceError, match=r"1000 records of .*message_bytes"):
            producer.flush()
        assert producer.stats().errors == 1000


def test_errors_that_pass_are_retried_without_loss_or_repetition() -> None:
    passing = [KafkaError.NOT_ENOUGH_REPLICAS, KafkaError.REQUEST_TIMED_OUT]
    with FaultyKafka({TOPIC: 1}) as kafka, UpdateProducer(kafka.bootstrap) as producer:
        kafka.refuse_produce(*passing)
        for version in range(20):
            producer.send("m", "t", [5], [[version]])
            producer.flush()
        messages = read(kafka.bootstrap, TOPIC, 20)
        versions = [struct.unpack("<f", row)[0] for _, _, [(_, row)] in messages]
        assert versions == list(range(20))


def test_brokers_that_come_back_get_everything_in_order() -> None:
    with FaultyKafka({TOPIC: 1}) as kafka, UpdateProducer(kafka.bootstrap) as producer:
        producer.send("m", "t", [5], [[0]])
        producer.flush()
        kafka.hang_up()
        for version in range(1, 20):
            producer.send("m", "t", [5], [[version]])
        kafka.come_back()
        producer.flush()
        rows = [
            row
            for _, _, records in read(kafka.bootstrap, TOPIC, 20)
            for _, row in records
        ]
        assert [struct.unpack("<f", row)[0] for row in rows] == list(range(20))


def test_sends_wait_for_brokers_that_do_not_keep_up_and_then_fail() -> None:
    with FaultyKafka({TOPIC: 1}) as kafka:
        producer = UpdateProducer(
            kafka.bootstrap, message_bytes=20_000, queue_bytes=100_000, timeout_s=0.5
        )
        producer.send("m", "t", [1], some_rows(1, dim=100))
        producer.flush()
        kafka.answer_after(60_000)
        with pytest.raises(UpdateSourceError, match="queue is full"):
            producer.send("m", "t", np.arange(10_000), some_rows(10_000, dim=100))
        assert producer.stats().waiting * 408 <= 100_000
        kafka.answer_after(0)
        with pytest.raises(UpdateSourceError):
            producer.close()


def test_no_more_messages_of_a_partition_wait_than_can_be_in_flight() -> None:
    """With more, librdkafka is busy without doing anything."""
    settings = {"enable.idempotence": True, "linger.ms": 0}
    first, second = (Parcel(TOPIC, n, b"frame", 1, False) for n in (0, 1))
    with FaultyKafka({TOPIC: 2}) as kafka:
        outbox = Outbox(kafka.bootstrap, settings)
        assert outbox.partitions(TOPIC, 5.0) == 2
        kafka.answer_after(60_000)
        assert [outbox.try_put(first) for _ in range(8)] == [True] * 5 + [False] * 3
        assert outbox.try_put(second)
        assert outbox.stats().waiting == 6
        kafka.answer_after(0)
        kafka.hang_up()  # the delayed answers are not waited for
        kafka.come_back()
        outbox.put(first, monotonic() + READ_TIMEOUT_S)
        outbox.flush(monotonic() + READ_TIMEOUT_S)
        assert outbox.stats().rows == 7


def test_what_waits_to_fill_up_is_bounded_over_all_tables() -> None:
    topics = {f"hps_et.m.t{number}": 1 for number in range(10)}
    with FaultyKafka(topics) as kafka:
        with UpdateProducer(
            kafka.bootstrap, message_bytes=20_000, queue_bytes=100_000, linger_ms=1e6
        ) as producer:
            for number in range(10):
                rows = some_rows(100, dim=28)  # 12,000 bytes with their keys
                producer.send("m", f"t{number}", np.arange(100), rows)
            waiting = 10 * 100 - 50_000 // 120
            wait_for(lambda: producer.stats().rows >= waiting, what="acknowledgements")
        for topic in topics:
            assert len(replay(read(kafka.bootstrap, topic, 100))) == 100


def test_a_topic_that_does_not_appear_says_how_to_create_it() -> None:
    unknown = KafkaError.UNKNOWN_TOPIC_OR_PART
    with (
        FaultyKafka({TOPIC: 1}) as kafka,
        UpdateProducer(kafka.bootstrap, timeout_s=0.5) as producer,
    ):
        kafka.refuse_topic(TOPIC, unknown)
        with pytest.raises(UpdateSourceError, match=r"--create --topic hps_et\.m\.t "):
            producer.send("m", "t", [1], [[1.0]])


def test_brokers_that_are_not_there_are_named_with_the_reason() -> None:
    with (
        UpdateProducer("127.0.0.1:9", timeout_s=0.5) as producer,
        pytest.raises(UpdateSourceError, match=r"127\.0\.0\.1:9.*refused"),
    ):
        producer.send("m", "t", [1], [[1.0]])
