"""Brokers and databases that fail while streams are followed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hps_numba.runtime.updates.stats import StreamState
from hps_numba.types import Position
from tests.runtime.deployments import Table
from tests.runtime.updates.servers import (
    ITEMS,
    NO_ROCKSDB,
    PATIENCE_S,
    FailingDatabase,
    NewSite,
    Site,
    redis_of,
)
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.fault

USERS = Table("users", dim=8, n_rows=0, default=0.5)
KEYS = np.arange(3000)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3) as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture
def cluster_of_its_own() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3) as made:
        yield made


class Breakable:
    """Wraps the persistent database of a server."""

    database: FailingDatabase

    def __call__(self, tier: Any) -> Any:
        if tier.name != "rocksdb":
            return tier
        self.database = FailingDatabase(tier)
        return self.database


class TestTiers:
    @pytest.mark.parametrize("late", [False, True])
    def test_a_database_that_fails_is_tried_again_and_nothing_comes_twice(
        self, new_site: NewSite, caplog: pytest.LogCaptureFixture, late: bool
    ) -> None:
        site, wraps = new_site(), Breakable()
        with site.server(wrap_tier=wraps) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            wraps.database.fail("apply", late=late)
            site.send(KEYS, 2)
            site.delete(KEYS[:100])
            wait_for(lambda: site.stream(server).retries >= 3, PATIENCE_S, what="tries")
            assert StreamState.RETRYING in {
                p.state for p in site.parts(server).values()
            }
            assert "was made to fail" in str(site.parts(server))
            assert not server.updates.catch_up(0.05)
            site.send(KEYS, 3)
            wraps.database.heal()
            site.wait_equal(server)
            assert server.updates.catch_up(PATIENCE_S)
            stream = site.stream(server)
            assert (stream.rows, stream.deletes) == (9000, 100)
            assert {p.state for p in stream.partitions} == {StreamState.READING}
        assert "update is tried again" in caplog.text

    def test_other_partitions_go_on_meanwhile(self, new_site: NewSite) -> None:
        site, wraps = new_site(tables=(ITEMS, USERS)), Breakable()
        with site.server(wrap_tier=wraps) as server:
            site.wait_followed(server)
            wraps.database.fail("apply", times=1)
            site.send(KEYS, 1)
            wait_for(lambda: site.stream(server).retries == 1, PATIENCE_S, what="try")
            site.send(KEYS, 2)
            site.send(KEYS, 3, "users")
            site.wait_equal(server, table="users")
            site.wait_equal(server)

    @pytest.mark.parametrize("then", ["pause", "seek", "away"])
    def test_what_is_done_to_a_partition_that_waits_for_a_tier_leaves_it_reading(
        self, new_site: NewSite, then: str
    ) -> None:
        site, wraps = new_site(partitions=1), Breakable()
        with site.server(wrap_tier=wraps) as server:
            site.wait_followed(server)
            wraps.database.fail("apply")
            site.send(KEYS, 1)
            wait_for(lambda: site.stream(server).retries >= 1, PATIENCE_S, what="tries")
            if then == "pause":
                server.updates.pause()
                wraps.database.heal()
                server.updates.resume()
            elif then == "seek":
                server.updates.seek(site.model, "items", offset=0)
                wraps.database.heal()
            else:
                server.updates.seek(site.model, "items", offset=10_000)  # nowhere
                wraps.database.heal()
            site.send(KEYS, 2)
            site.wait_equal(server)

    def test_a_server_closes_while_a_database_fails_for_ever(
        self, new_site: NewSite
    ) -> None:
        site, wraps = new_site(), Breakable()
        with site.server(wrap_tier=wraps) as server:
            site.wait_followed(server)
            wraps.database.fail("apply")
            site.send(KEYS, 1)
            wraps.database.wait_failed("apply")
        assert "hps-updates" not in {thread.name for thread in threading.enumerate()}
        with site.server() as server:
            site.wait_equal(server)

    def test_a_database_that_does_not_tell_its_position_is_asked_again(
        self, new_site: NewSite, caplog: pytest.LogCaptureFixture
    ) -> None:
        site, wraps = new_site(), Breakable()
        site.send(KEYS, 1)
        with site.server(
            wrap_tier=wraps, source={"initial_offset": "earliest"}
        ) as server:
            site.wait_equal(server)
            wraps.database.fail("positions")
            server.updates.seek(site.model, "items", offset=10_000)
            wraps.database.wait_failed("positions")
            wait_for(
                lambda: "topics are looked for again" in caplog.text,
                PATIENCE_S,
                what="warning",
            )
            wraps.database.heal()
            site.send(KEYS, 2)
            site.wait_equal(server)

    def test_a_seek_that_a_database_refuses_is_told_and_reading_goes_on(
        self, new_site: NewSite
    ) -> None:
        site, wraps = new_site(), Breakable()
        with site.server(wrap_tier=wraps) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            wraps.database.fail("seek", times=1)
            with pytest.raises(Exception, match="seek was made to fail"):
                server.updates.seek(site.model, "items", offset=0)
            site.send(KEYS, 2)
            site.wait_equal(server)


class TestRedis:
    def test_a_node_that_hangs_keeps_no_update_for_good(
        self, new_site: NewSite, cluster_of_its_own: RedisCluster
    ) -> None:
        site, cluster = new_site(), cluster_of_its_own
        node = cluster.masters[0]
        with site.server(volatile=redis_of(cluster)) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            node.pause()
            try:
                site.send(KEYS, 2)
                wait_for(lambda: site.stream(server).retries, PATIENCE_S, what="tries")
            finally:
                node.resume()
            site.send(KEYS, 3)
            site.wait_equal(server)

    def test_a_node_that_dies_and_comes_back_empty_takes_up_the_stream(
        self, new_site: NewSite, cluster_of_its_own: RedisCluster
    ) -> None:
        site, cluster = new_site(), cluster_of_its_own
        node = cluster.masters[0]
        with site.server(volatile=redis_of(cluster)) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            node.kill()
            site.send(KEYS, 2)
            wait_for(lambda: site.stream(server).retries, PATIENCE_S, what="tries")
            node.start()
            site.send(KEYS, 3)
            site.wait_equal(server)

    @pytest.mark.parametrize("persistent", [{}, NO_ROCKSDB])
    def test_redis_set_back_is_given_again_what_it_lost(
        self,
        new_site: NewSite,
        cluster: RedisCluster,
        persistent: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        site = new_site()
        volatile = redis_of(cluster)
        with site.server(volatile=volatile, persistent=persistent) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            before = snapshot(cluster)
            site.send(KEYS[:2000], 2)
            site.delete(KEYS[2000:2500])
            site.wait_equal(server)
            assert server.updates.catch_up(PATIENCE_S)
            restore(cluster, before)
            site.send([5], 9)
            site.send([5, 6, 7, 8, 9, 10, 11, 12], 10)  # in every partition
            site.wait_equal(server)
            wait_for(lambda: site.stream(server).rewinds, PATIENCE_S, what="rewind")
            assert "reading again from" in caplog.text
        with site.server(volatile=volatile, persistent=persistent) as server:
            site.wait_equal(server)

    def test_redis_that_is_emptied_takes_up_the_stream(
        self, new_site: NewSite, cluster: RedisCluster
    ) -> None:
        site = new_site()
        with site.server(volatile=redis_of(cluster)) as server:
            site.send(KEYS, 1)
            site.wait_equal(server)
            cluster.flush()
            site.send(KEYS[:100], 2)
            site.wait_equal(server)


def snapshot(cluster: RedisCluster) -> list[dict[bytes, bytes]]:
    """Return all keys of each master, as ``DUMP`` has them."""
    return [
        {key: node.client().dump(key) for key in node.client().scan_iter(count=10_000)}
        for node in cluster.masters
    ]


def restore(cluster: RedisCluster, before: list[dict[bytes, bytes]]) -> None:
    """Set the masters back."""
    for node, values in zip(cluster.masters, before, strict=True):
        client = node.client()
        client.flushall()
        for key, value in values.items():
            client.restore(key, 0, value)


class TestBroker:
    @pytest.mark.parametrize("policy", ["earliest", "latest", "stop"])
    def test_a_broker_that_comes_back_empty_is_noticed(
        self,
        new_site: NewSite,
        own_broker: KafkaBroker,
        caplog: pytest.LogCaptureFixture,
        policy: str,
    ) -> None:
        site = new_site(broker=own_broker, partitions=1)
        with site.server(source={"offset_reset": policy}) as server:
            for version in (1, 2, 3):
                site.send(KEYS, version)
            site.wait_equal(server)
            own_broker.stop()
            wait_for(
                lambda: not server.updates.stats().connected, PATIENCE_S, what="silence"
            )
            assert site.equals(server)
            own_broker.start()
            own_broker.create_topic(site.topic(), 1)
            wait_for(
                lambda: (
                    (s := server.updates.stats().stream(site.model, "items"))
                    and s.resets
                ),
                PATIENCE_S,
                what="reset",
            )
            assert "the topic was made anew" in caplog.text
            if policy == "stop":
                (part,) = site.parts(server).values()
                assert part.state is StreamState.STOPPED
                assert "beyond the end" in part.reason
                server.updates.seek(site.model, "items", offset=0)
            renewed(site)
            site.send(KEYS[:100], 4)
            site.wait_equal(server)
            assert server.updates.stats().connected
            assert site.parts(server)[0].position == Position(1)


def renewed(site: Site) -> None:
    """Let the site's producer begin anew, with a broker that knows nothing of it."""
    site.close()
    site._producer = None
