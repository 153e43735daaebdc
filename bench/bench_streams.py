"""Update streams: reading, applying, how soon rows are seen, and what lookups pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition
from rocksdict import Options, Rdict

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import MIB, SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Result
from bench.servers import Served, following_server
from bench.setups import spec
from bench.stream_publisher import CLOCK_KEY, publisher, sent_at
from bench.workloads import table_rows
from hps_numba.config import UpdateSourceParams, UpdateSourceType
from hps_numba.runtime.updates.frames import decode, encode
from hps_numba.runtime.updates.pending import Arrived, Pending
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.runtime.updates.source import KafkaSource, Message
from hps_numba.types import Position, TableSpec
from tests.support.kafka_broker import KafkaBroker

CONSUME = "consume"
DECODE = "consume and decode"
OURS = "packed messages, exactly once"
NAIVE = "a row a message, put by put"
IDLE = "lookups, no updates"
FLOWING = "lookups, updates flow"
_PATIENCE_S = 120.0


def stream_decode(run: Run) -> Iterator[Result]:
    """Compare reading a stream with reading and decoding it."""
    for dim in run.sizes.dims:
        table = spec(dim)
        with _broker(run, table) as broker:
            n_messages = _publish_packed(run, broker, table)
            with closing(_source(broker)) as source:
                reads = {
                    CONSUME: lambda message: None,
                    DECODE: _decoder(table),
                }
                setups = {
                    name: _reading(source, table, n_messages, each)
                    for name, each in reads.items()
                }
                n_rows = _n_rows(run, table)
                yield from compare(
                    run,
                    "stream_decode",
                    [Variant(name, s, n_rows) for name, s in setups.items()],
                    params={"dim": dim, "rows": n_rows},
                    claims=[
                        Claim(DECODE, CONSUME, defaults.STREAM_DECODE_AGAINST_CONSUME)
                    ],
                )


def stream_apply(run: Run) -> Iterator[Result]:
    """Compare a server that follows with a loop of one put for each message."""
    for dim in run.sizes.dims:
        table = spec(dim)
        with _broker(run, table) as broker:
            _publish_packed(run, broker, table)
            n_naive = _n_rows(run, table) // 8
            _publish_rows(broker, "naive", table, n_naive)
            path = run.scratch / f"stream-{dim}"
            with (
                following_server(
                    table, path, broker.bootstrap, cache_bytes=64 * MIB
                ) as served,
                _naive(broker, run.scratch / f"naive-{dim}", n_naive) as naive,
            ):
                n_rows = _n_rows(run, table)
                ours = _applying(served, table, n_rows)
                keys = np.arange(min(n_rows, 1000))
                np.testing.assert_array_equal(
                    served.lookup(keys), table_rows(keys, dim)
                )
                yield from compare(
                    run,
                    "stream_apply",
                    [Variant(OURS, ours, n_rows), Variant(NAIVE, naive, n_naive)],
                    params={"dim": dim, "rows": n_rows},
                    claims=[
                        Claim(OURS, NAIVE, defaults.STREAM_APPLY_AGAINST_NAIVE.get(dim))
                    ],
                )


def stream_lookups(run: Run) -> Iterator[Result]:
    """Compare the p99 of lookups while updates flow with that while none do."""
    sizes = run.sizes
    table = spec(32 if 32 in sizes.dims else sizes.dims[0])
    n_keys = _n_rows(run, table)
    with _broker(run, table) as broker:
        _publish_packed(run, broker, table)
        path = run.scratch / "stream-lookups"
        with (
            following_server(
                table, path, broker.bootstrap, cache_bytes=256 * MIB
            ) as served,
            publisher(
                broker.bootstrap, table, n_keys, sizes.stream_rows_per_s
            ) as trainer,
        ):
            _applying(served, table, _n_rows(run, table))
            rng = np.random.default_rng(SEED)

            def phase(*, flows: bool) -> Callable[[], float]:
                trainer.tell("go" if flows else "halt")
                time.sleep(sizes.stream_phase_s / 8)

                def call() -> float:
                    return float(np.quantile(_latencies(run, served, rng), 0.99))

                return call

            yield from compare(
                run,
                "stream_lookups",
                [
                    Variant(IDLE, lambda: phase(flows=False), 1),
                    Variant(FLOWING, lambda: phase(flows=True), 1),
                ],
                params={
                    "dim": table.dim,
                    "keys": sizes.stream_lookup_keys,
                    "rows per s": sizes.stream_rows_per_s,
                },
                claims=[
                    Claim(
                        FLOWING,
                        IDLE,
                        defaults.STREAM_LOOKUP_P99_AGAINST_IDLE,
                        "at_most",
                    )
                ],
            )


def stream_staleness(run: Run) -> Iterator[Result]:
    """Time from sending a row to the first lookup that sees it."""
    sizes = run.sizes
    table = spec(32 if 32 in sizes.dims else sizes.dims[0])
    with _broker(run, table) as broker:
        path = run.scratch / "stream-staleness"
        with (
            following_server(
                table, path, broker.bootstrap, cache_bytes=256 * MIB
            ) as served,
            publisher(
                broker.bootstrap, table, sizes.stream_rows, sizes.stream_rows_per_s
            ) as trainer,
        ):
            trainer.tell("go")
            ages: list[float] = []

            def setup() -> Call:
                def call() -> float:
                    if not ages:
                        ages.extend(_ages(run, served))
                    return ages.pop()

                return call

            yield from compare(
                run,
                "stream_staleness",
                [Variant("from send to lookup", setup, 1)],
                params={
                    "dim": table.dim,
                    "rows per s": sizes.stream_rows_per_s,
                    **{
                        f"bound of {name}": bound
                        for name, bound in defaults.STREAM_STALENESS_S.items()
                    },
                },
            )


@contextmanager
def _broker(run: Run, table: TableSpec) -> Iterator[KafkaBroker]:
    with KafkaBroker() as broker:
        broker.create_topic(table.tag, run.sizes.stream_partitions)
        yield broker


def _source(broker: KafkaBroker) -> KafkaSource:
    params = UpdateSourceParams(
        type=UpdateSourceType.KAFKA_MESSAGE_QUEUE,
        brokers=broker.bootstrap,
        receive_buffer_size=8 * MIB,
    )
    return KafkaSource(params, group="bench")


def _n_rows(run: Run, table: TableSpec) -> int:
    """Return how many rows are of about the same bytes in tables of any dim."""
    return run.sizes.stream_rows * min(run.sizes.dims) // table.dim


def _publish_packed(run: Run, broker: KafkaBroker, table: TableSpec) -> int:
    """Publish a row of each key, and return in how many messages."""
    keys = np.random.default_rng(SEED).permutation(_n_rows(run, table))
    with UpdateProducer(broker.bootstrap) as producer:
        producer.send(table.model, table.name, keys, table_rows(keys, table.dim))
        producer.flush()
        return producer.stats().messages


def _publish_rows(
    broker: KafkaBroker, topic: str, table: TableSpec, n_rows: int
) -> None:
    """Publish a message for each row."""
    broker.create_topic(topic, 1)
    producer = Producer(
        {
            "bootstrap.servers": broker.bootstrap,
            "queue.buffering.max.messages": 10_000_000,
        }
    )
    keys = np.random.default_rng(SEED).permutation(n_rows)
    for key in range(n_rows):
        row = table_rows(keys[key : key + 1], table.dim)
        producer.produce(topic, encode(keys[key : key + 1], row))
    assert producer.flush(_PATIENCE_S) == 0


def _reading(
    source: KafkaSource,
    table: TableSpec,
    n_messages: int,
    each: Callable[[Message], object],
) -> Setup:
    """Time reading all messages of a topic from its beginning."""

    def setup() -> Call:
        partitions = source.topics()[table.tag]

        def call() -> None:
            for partition in partitions:
                source.seek(table.tag, partition, 0)
            left = n_messages
            while left:
                message = source.poll(1.0)
                if isinstance(message, Message):
                    each(message)
                    left -= 1

        return call

    return setup


def _decoder(table: TableSpec) -> Callable[[Message], object]:
    """Return what makes contiguous keys and rows of a message, ready to be applied."""

    def each(message: Message) -> object:
        records = decode(message.value, is_delete=False, value_sizes=(table.row_bytes,))
        pending = Pending(table, 0, Position(0))
        pending.add(Arrived(message.offset, message.timestamp_ms, records))
        return list(pending.pieces(1 << 30, 0))

    return each


def _applying(served: Served, table: TableSpec, n_rows: int) -> Setup:
    """Time a server that applies its whole stream again."""
    updates = served.server.updates

    def applied() -> int:
        stream = updates.stats().stream(table.model, table.name)
        return stream.rows if stream else 0

    def setup() -> Call:
        def call() -> None:
            end = applied() + n_rows
            updates.seek(table.model, table.name, offset=0)
            while applied() < end:
                time.sleep(0.001)

        return call

    deadline = time.monotonic() + _PATIENCE_S
    while applied() < n_rows:
        assert time.monotonic() < deadline, "the stream was not applied"
        time.sleep(0.01)
    return setup


@contextmanager
def _naive(broker: KafkaBroker, path: Path, n_rows: int) -> Iterator[Setup]:
    """Time one poll and one put for each row."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker.bootstrap,
            "group.id": "naive",
            # As ours, since this broker does not wake a fetch that waits.
            "fetch.wait.max.ms": 20,
            "fetch.queue.backoff.ms": 10,
        }
    )
    options = Options(raw_mode=True)
    database = Rdict(str(path), options)

    def setup() -> Call:
        def call() -> None:
            consumer.assign([TopicPartition("naive", 0, 0)])
            left = n_rows
            while left:
                message = consumer.poll(1.0)
                if message is not None and message.error() is None:
                    value = message.value()
                    assert value is not None
                    database.put(value[8:16], value[16:])
                    left -= 1

        return call

    try:
        yield setup
    finally:
        consumer.close()
        database.close()


def _latencies(run: Run, served: Served, rng: np.random.Generator) -> list[float]:
    """Return what lookups took that followed each other for the time of a phase."""
    latencies = []
    end_s = time.perf_counter() + run.sizes.stream_phase_s
    while (begin_s := time.perf_counter()) < end_s:
        keys = rng.integers(0, run.sizes.stream_rows, run.sizes.stream_lookup_keys)
        begin_s = time.perf_counter()
        served.lookup(keys)
        latencies.append(time.perf_counter() - begin_s)
        time.sleep(0.001)  # as between requests; never in the time that is measured
    return latencies


def _ages(run: Run, served: Served) -> list[float]:
    """Return how old rows were when a lookup first saw them."""
    clock, last = np.array([CLOCK_KEY]), 0.0
    ages: list[float] = []
    end_s = time.monotonic() + run.sizes.stream_phase_s
    while time.monotonic() < end_s or not ages:
        sent_s = sent_at(served.lookup(clock)[0])
        if sent_s != last and sent_s:
            ages.append(time.time() - sent_s)
            last = sent_s
        time.sleep(0.0005)
    return ages


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (
    stream_decode,
    stream_apply,
    stream_lookups,
    stream_staleness,
)
