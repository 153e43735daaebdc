"""The first span of a stream, when it ends halfway through the tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import TierUnavailableError
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.tiers.base import Tier
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, model, server_config, versions
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

PATIENCE_S = 20.0


def without_redis(tier: Tier) -> Tier:
    """Let Redis refuse every span."""

    def refuse(*_: Any) -> int:
        raise TierUnavailableError("Redis is down", tier="redis")

    if tier.name == "redis":
        lasting: Any = tier
        lasting.apply = refuse
    return tier


def test_redis_gets_the_first_span_that_it_missed(
    tmp_path: Path, broker: KafkaBroker, topic: str
) -> None:
    broker.create_topic(topic)
    _, name, table = topic.split(".")
    keys = np.arange(50)
    with (
        RedisCluster(masters=3) as cluster,
        UpdateProducer(broker.bootstrap) as trainer,
    ):
        config = server_config(
            tmp_path,
            [model(tmp_path, [Table(table)], name=name)],
            volatile={
                "type": "redis_cluster",
                "address": cluster.address,
                "num_node_connections": 2,
            },
            update_source={"type": "kafka", "brokers": broker.bootstrap},
        )
        trainer.send(name, table, keys, versioned_rows(keys, 2, 4))
        trainer.flush()
        with HPS(config, wrap_tier=without_redis) as server:
            wait_for(
                lambda: any(s.retries for s in server.updates.stats().streams),
                PATIENCE_S,
                what="a failure",
            )
        with HPS(config) as server:
            assert server.updates.catch_up(PATIENCE_S)
            assert versions(server, keys, name=name) == [2] * keys.size
        cluster.flush()
        with HPS(config) as server:
            assert server.updates.catch_up(PATIENCE_S)
            assert versions(server, keys, name=name) == [2] * keys.size
