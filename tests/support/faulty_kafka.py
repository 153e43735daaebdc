"""Brokers that refuse, stall and vanish on demand: librdkafka's mock cluster.

    with FaultyKafka(topics={"hps_et.model.table": 4}) as kafka:
        kafka.refuse_produce(KafkaError.MSG_SIZE_TOO_LARGE)
        Producer({"bootstrap.servers": kafka.bootstrap, ...})

The Python package shows of it what settings reach; the library itself has the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import confluent_kafka
from typing_extensions import Self

_PRODUCER = 0  # kind of client
_PRODUCE = 0  # kind of request
_BROKER = 1
_ERROR_BYTES = 512


def _library() -> ctypes.CDLL:
    """Return the librdkafka that confluent_kafka itself uses."""
    assert confluent_kafka.libversion()
    maps = Path("/proc/self/maps").read_text().splitlines()
    (path,) = {line.split()[-1] for line in maps if "librdkafka" in line}
    return ctypes.CDLL(path)


class FaultyKafka:
    """A mock cluster of one broker; a context manager.

    Parameters
    ----------
    topics
        Names, and how many partitions each has. Others are made when they are asked
        for, with 4.
    """

    def __init__(self, topics: Mapping[str, int]) -> None:
        self._library = library = _library()
        for name in ("conf_new", "new", "mock_cluster_new"):
            getattr(library, f"rd_kafka_{name}").restype = ctypes.c_void_p
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        conf = ctypes.c_void_p(library.rd_kafka_conf_new())
        size = ctypes.c_size_t(_ERROR_BYTES)
        client = library.rd_kafka_new(_PRODUCER, conf, error, size)
        assert client, error.value
        self._client = ctypes.c_void_p(client)
        self._cluster = ctypes.c_void_p(
            library.rd_kafka_mock_cluster_new(self._client, 1)
        )
        for topic, partitions in topics.items():
            self._call("topic_create", topic.encode(), partitions, 1)

    @property
    def bootstrap(self) -> str:
        """The broker's address."""
        found = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return bytes(found).decode()

    def refuse_produce(self, *errors: int) -> None:
        """Answer the next produce requests with these errors, one each."""
        array = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster,
            ctypes.c_int16(_PRODUCE),
            ctypes.c_size_t(len(errors)),
            array,
        )

    def refuse_topic(self, topic: str, error: int) -> None:
        """Answer questions about a topic with an error."""
        self._library.rd_kafka_mock_topic_set_error(
            self._cluster, topic.encode(), error
        )

    def hang_up(self) -> None:
        """Close all connections, and refuse new ones."""
        self._call("broker_set_down", _BROKER)

    def come_back(self) -> None:
        """Take connections again."""
        self._call("broker_set_up", _BROKER)

    def answer_after(self, delay_ms: int) -> None:
        """Delay all answers."""
        self._call("broker_set_rtt", _BROKER, delay_ms)

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, f"rd_kafka_mock_{name}")
        failed = function(self._cluster, *arguments)
        assert not failed, f"{name}: error {failed}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the cluster."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)
