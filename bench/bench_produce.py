"""Publishing rows: packed messages against a message for each row."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count

from confluent_kafka import Producer

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import Run
from bench.harness import Call, Setup, Variant
from bench.records import Result
from bench.redis_setups import meter
from bench.setups import shuffled_keys, spec
from bench.workloads import table_rows
from hps_numba.runtime.updates.frames import header
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.types import Keys, Rows
from tests.support.kafka_broker import KafkaBroker

PACKED = "UpdateProducer"
PLAIN = "a row a message"
READY_MADE = "a row a message, encoded before"
_PATIENCE_S = 60.0
_FLUSH_EVERY = 1000  # rows between calls that serve delivery reports


def stream_produce(run: Run) -> Iterator[Result]:
    """Compare packed messages with a message for each row, until all are delivered."""
    n_rows = run.sizes.produce_rows
    for dim in run.sizes.dims:
        keys = shuffled_keys(n_rows)
        rows = table_rows(keys, dim)
        frames = list(_frames(keys, rows))
        with KafkaBroker() as broker, ExitStack() as producers:
            topics = _Topics(broker, run.sizes.stream_partitions)
            setups = {
                PACKED: _packed(topics, producers, keys, rows),
                PLAIN: _plain(topics, partial(_frames, keys, rows)),
                READY_MADE: _plain(topics, partial(iter, frames)),
            }
            floor = defaults.STREAM_PRODUCE_AGAINST_PLAIN.get(dim)
            yield from compare(
                run,
                "stream_produce",
                [Variant(name, setup, n_rows) for name, setup in setups.items()],
                params={"dim": dim, "rows": n_rows},
                claims=[Claim(PACKED, PLAIN, floor), Claim(PACKED, READY_MADE)],
                meter=meter([broker.pid]),
            )


class _Topics:
    """An empty topic for each call: brokers keep what they got in memory."""

    def __init__(self, broker: KafkaBroker, partitions: int) -> None:
        self.broker = broker
        self._partitions = partitions
        self._numbers = count()
        self._last: str | None = None

    def fresh(self) -> str:
        """Return the name of a table whose topic is new; the last one is deleted."""
        if self._last is not None:
            self.broker.delete_topic(self._last)
        table = spec(1, name=f"produce{next(self._numbers)}")
        self._last = table.tag
        self.broker.create_topic(table.tag, self._partitions)
        return table.name


def _packed(topics: _Topics, producers: ExitStack, keys: Keys, rows: Rows) -> Setup:
    """Send all rows at once; the connection is there before."""
    model = spec(1).model

    def setup() -> Call:
        producers.close()
        table = topics.fresh()
        producer = producers.enter_context(UpdateProducer(topics.broker.bootstrap))
        producer.send(model, table, keys[:1], rows[:1])
        producer.flush()

        def call() -> None:
            producer.send(model, table, keys, rows)
            producer.flush()
            assert producer.stats().rows == len(keys) + 1

        return call

    return setup


def _plain(topics: _Topics, frames: Callable[[], Iterable[bytes]]) -> Setup:
    """Produce a message for each row, as a loop around confluent-kafka does."""

    def setup() -> Call:
        topic = spec(1, name=topics.fresh()).tag
        producer = Producer(
            {
                "bootstrap.servers": topics.broker.bootstrap,
                "enable.idempotence": True,
                "queue.buffering.max.messages": 1_000_000,
            }
        )
        producer.produce(topic, b"first")
        assert producer.flush(_PATIENCE_S) == 0

        def call() -> None:
            for number, frame in enumerate(frames()):
                producer.produce(topic, frame)
                if number % _FLUSH_EVERY == 0:
                    producer.poll(0)
            assert producer.flush(_PATIENCE_S) == 0

        return call

    return setup


def _frames(keys: Keys, rows: Rows) -> Iterator[bytes]:
    """Yield the frame of each row."""
    head = header(rows[:1].nbytes)
    pack = struct.Struct("<q").pack
    for key, row in zip(keys.tolist(), rows, strict=True):
        yield head + pack(key) + row.tobytes()


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (stream_produce,)
