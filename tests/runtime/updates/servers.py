"""Servers that follow a model's streams, and what they have to answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Producer
from numpy.typing import ArrayLike, NDArray

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import TierError
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.runtime.updates.stats import PartitionStats, StreamStats
from hps_numba.tiers.base import PersistentTier
from hps_numba.types import Keys, Position, Rows, StreamSpan
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, model, server_config
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for
from tests.support.wrappers import FailingTier

PATIENCE_S = 20.0
ITEMS = Table("items", dim=4, n_rows=0, default=-1.0)
NO_HOST = {"type": "disabled"}
NO_ROCKSDB = {"backend": "disabled"}

_NUMBERS = count()


class FailingDatabase(FailingTier, PersistentTier):
    """A persistent database that fails where it is told to."""

    def apply(self, tag: str, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        return int(self._call("apply", tag, keys, rows, span))

    def positions(self, tag: str) -> dict[int, Position]:
        found: dict[int, Position] = self._call("positions", tag)
        return found

    def seek(self, tag: str, positions: Mapping[int, Position]) -> None:
        self._call("seek", tag, positions)


def redis_of(cluster: RedisCluster, **options: Any) -> dict[str, Any]:
    """Return the settings of a volatile database in a cluster."""
    return {
        "type": "redis_cluster",
        "address": cluster.address,
        "num_partitions": 8,
        "num_node_connections": 2,
    } | options


class Site:
    """A model whose topics are in a broker, its producer, and a replay of its log.

    Parameters
    ----------
    root
        Where servers have their files.
    broker
        Where the topics are.
    tables
        The model's tables, of which no rows are loaded.
    partitions
        Of each topic.
    """

    def __init__(
        self,
        root: Path,
        broker: KafkaBroker,
        *,
        tables: tuple[Table, ...] = (ITEMS,),
        partitions: int = 2,
    ) -> None:
        self.root = root
        self.broker = broker
        self.tables = {table.name: table for table in tables}
        self.model = f"p{os.getpid()}m{next(_NUMBERS)}"
        self.replays: dict[str, dict[int, int]] = {name: {} for name in self.tables}
        self._producer: UpdateProducer | None = None
        for name in self.tables:
            broker.create_topic(self.topic(name), partitions)

    def topic(self, table: str = "items") -> str:
        return f"hps_et.{self.model}.{table}"

    def params(self, **options: Any) -> InferenceParams:
        """Return what serves the model."""
        tables = list(self.tables.values())
        nothing = {"sparse_model_files": [], "max_batchsize": 10_000}
        return model(
            self.root, tables, name=self.model, write=False, **nothing | options
        )

    def config(
        self,
        name: str = "a",
        *,
        source: Mapping[str, Any] | None = None,
        models: list[InferenceParams] | None = None,
        **options: Any,
    ) -> ParameterServerConfig:
        """Return a server's configuration; servers of a name share their files."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        update_source = {
            "type": "kafka_message_queue",
            "brokers": self.broker.bootstrap,
            "metadata_refresh_interval_ms": 200,
            "failure_backoff_ms": 5,
            **(source or {}),
        }
        return server_config(
            folder,
            [self.params()] if models is None else models,
            update_source=update_source,
            **options,
        )

    def server(self, name: str = "a", *, wrap_tier: Any = None, **options: Any) -> HPS:
        return HPS(self.config(name, **options), wrap_tier=wrap_tier)

    @property
    def producer(self) -> UpdateProducer:
        if self._producer is None:
            self._producer = UpdateProducer(self.broker.bootstrap, num_partitions=8)
        return self._producer

    def send(self, keys: ArrayLike, version: ArrayLike, table: str = "items") -> None:
        """Publish rows of a version; the broker has them when this returns."""
        array = np.asarray(keys)
        spec = self.tables[table]
        rows = versioned_rows(array, version, spec.dim)
        self.producer.send(self.model, table, array, rows)
        self.producer.flush()
        versions = np.broadcast_to(version, array.shape).tolist()
        self.replays[table].update(zip(array.tolist(), versions, strict=True))

    def delete(self, keys: ArrayLike, table: str = "items") -> None:
        """Publish deletions; the broker has them when this returns."""
        array = np.asarray(keys)
        self.producer.delete(self.model, table, array)
        self.producer.flush()
        self.replays[table].update(dict.fromkeys(array.tolist(), 0))

    def keys(self, table: str = "items") -> NDArray[np.int64]:
        """Return all keys of a table that anything was published of."""
        return np.array(list(self.replays[table]), np.int64)

    def expected(self, table: str = "items") -> NDArray[Any]:
        """Return the rows of ``keys`` after all that was published."""
        spec = self.tables[table]
        versions = np.array(list(self.replays[table].values()))
        rows = versioned_rows(self.keys(table), versions, spec.dim)
        rows[versions == 0] = spec.default
        return rows

    def equals(self, server: HPS, table: str = "items") -> bool:
        """Whether a server answers as a replay of the log does."""
        try:
            rows = server.lookup(self.keys(table), self.model, table)
        except TierError:
            return False  # a tier is not back yet
        return bool((np.asarray(rows) == self.expected(table)).all())

    def wait_equal(self, *servers: HPS, table: str = "items") -> None:
        """Wait until servers answer as a replay of the log does."""
        for server in servers:
            what = f"rows of {self.topic(table)}: {server.stats().updates}"
            wait_for(lambda s=server: self.equals(s, table), PATIENCE_S, what=what)

    def stream(self, server: HPS, table: str = "items") -> StreamStats:
        """Return a table's stream, once it is followed."""
        self.wait_followed(server, table)
        found = server.updates.stats().stream(self.model, table)
        assert found is not None
        return found

    def parts(self, server: HPS, table: str = "items") -> dict[int, PartitionStats]:
        """Return what a server tells of the partitions of a table's stream."""
        stream = server.updates.stats().stream(self.model, table)
        found = () if stream is None else stream.partitions
        return {part.partition: part for part in found}

    def wait_followed(self, server: HPS, table: str = "items") -> None:
        """Wait until a server knows a table's partitions."""
        wait_for(lambda: self.parts(server, table), PATIENCE_S, what="partitions")

    def produce(
        self,
        *values: bytes | None,
        table: str = "items",
        partition: int = 0,
        **rest: Any,
    ) -> None:
        """Send messages as they are, in order."""
        settings = {"bootstrap.servers": self.broker.bootstrap, "log_level": 0}
        producer = Producer(settings | {"message.max.bytes": 100_000_000})
        for value in values:
            producer.produce(self.topic(table), value, partition=partition, **rest)
        assert producer.flush(PATIENCE_S) == 0

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()


def letters(path: Path) -> list[dict[str, Any]]:
    """Return the messages in a dead-letter file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


NewSite = Callable[..., Site]
