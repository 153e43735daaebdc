"""Two servers with databases of their own, and one Redis that they share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hps_numba.runtime.hps import HPS
from hps_numba.types import Position
from tests.oracle import versions_in
from tests.runtime.updates.servers import (
    NO_ROCKSDB,
    PATIENCE_S,
    NewSite,
    Site,
    redis_of,
)
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

KEYS = np.arange(2000)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3) as made:
        yield made


@pytest.fixture
def shared(shared_cluster: RedisCluster) -> dict[str, Any]:
    """Return servers' settings of the cluster, which is empty."""
    shared_cluster.flush()
    return {"volatile": redis_of(shared_cluster)}


def versions(site: Site, server: HPS, keys: Any = KEYS) -> Any:
    return versions_in(keys, np.asarray(server.lookup(keys, site.model, "items")))


def places(site: Site, server: HPS) -> dict[int, Position]:
    """Return how far a server is."""
    return {n: part.position for n, part in site.parts(server).items()}


def test_a_server_that_lags_writes_nothing_older(
    new_site: NewSite, shared: dict[str, Any]
) -> None:
    site = new_site()
    source = {"burst_rows": 0}
    with (
        site.server("ahead", source=source, **shared) as ahead,
        site.server("behind", source=source, **shared) as behind,
        HPS(
            site.config(
                "reader", source={"type": "null"}, persistent=NO_ROCKSDB, **shared
            )
        ) as redis,
    ):
        site.send(KEYS, 1)
        site.wait_equal(ahead, behind, redis)
        behind.updates.pause()
        for version in range(2, 8):
            site.send(KEYS, version)
        site.delete(KEYS[:500])
        site.wait_equal(ahead)
        assert ahead.updates.catch_up(PATIENCE_S)
        seen = [versions(site, behind)]
        behind.updates.resume()

        def alike() -> bool:
            assert site.equals(redis)  # never an older row, and none that was deleted
            assert site.equals(ahead)
            seen.append(versions(site, behind))
            return places(site, behind) == places(site, ahead)

        wait_for(alike, PATIENCE_S, what="the end of the lag")
        site.wait_equal(ahead, behind, redis)
        # What a server acknowledged itself it does not take back.
        for before, after in pairwise(seen):
            both = (before > 0) & (after > 0)
            assert (after[both] >= before[both]).all()
        site.send(KEYS, 9)
        site.wait_equal(ahead, behind, redis)
    with site.server("behind", volatile={"type": "disabled"}) as alone:
        assert alone.updates.catch_up(PATIENCE_S)
        assert site.stream(alone).rows == 0  # its own database has it all
        site.wait_equal(alone)


def test_both_write_at_once_and_end_alike(
    new_site: NewSite, shared: dict[str, Any]
) -> None:
    site = new_site()
    random = np.random.default_rng(11)
    with (
        site.server("a", **shared) as a,
        site.server("b", source={"burst_rows": 0}, **shared) as b,
    ):
        newest = 0
        for version in range(1, 31):
            site.send(random.integers(0, 500, 200), version)
            if version % 5 == 0:
                site.delete(random.integers(0, 500, 20))
            for server in (a, b):
                seen = int(versions(site, server, np.arange(500)).max())
                assert seen <= version
                newest = max(newest, seen)
        site.wait_equal(a, b)
        assert newest > 0


def test_a_new_server_reads_all_and_moves_nothing_back(
    new_site: NewSite, shared: dict[str, Any]
) -> None:
    site = new_site(partitions=1)
    with site.server("old", **shared) as old:
        for version in range(1, 6):
            site.send(KEYS, version)
        site.wait_equal(old)
        with site.server("new", **shared) as new:

            def caught_up() -> bool:
                assert site.equals(old)
                return places(site, new) == places(site, old)

            wait_for(caught_up, PATIENCE_S, what="all of the stream")
            assert site.stream(new).rows == 5 * KEYS.size
            assert not site.stream(new).resets
            site.wait_equal(old, new)


def test_a_new_server_from_the_latest_on_leaves_redis_where_it_is(
    new_site: NewSite, shared: dict[str, Any]
) -> None:
    site = new_site(partitions=1)
    latest = {"initial_offset": "latest"}
    with site.server("old", **shared) as old:
        site.send(KEYS, 1)
        site.wait_equal(old)
        old.updates.pause()
        site.send(KEYS, 2)  # Redis lacks it, and gets it from the new one
        with site.server("new", source=latest, **shared) as new:
            site.wait_equal(new)
        old.updates.resume()
        site.wait_equal(old)


def test_the_latest_is_where_a_server_first_looked(new_site: NewSite) -> None:
    site = new_site(partitions=1)
    latest = {"initial_offset": "latest"}
    site.send(KEYS, 1)
    with site.server(source=latest) as server:
        site.wait_followed(server)
        assert site.parts(server)[0].position == Position(1)
    site.replays["items"].clear()
    site.send(KEYS[:100], 2)  # while no server runs
    with site.server(source=latest) as server:
        site.wait_equal(server)
        assert site.stream(server).rows == 100


@pytest.mark.fault
def test_a_topic_made_anew_is_noticed_by_the_server_that_comes_later(
    new_site: NewSite,
    own_broker: KafkaBroker,
    shared: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = new_site(broker=own_broker, partitions=1)
    with site.server("a", **shared) as a, site.server("b", **shared) as b:
        for version in range(1, 6):
            site.send(KEYS, version)
        site.wait_equal(a, b)
        assert a.updates.catch_up(PATIENCE_S)
        assert b.updates.catch_up(PATIENCE_S)
    own_broker.stop()
    own_broker.start()
    own_broker.create_topic(site.topic(), 1)
    site.close()
    site._producer = None
    with site.server("a", **shared) as a:
        wait_for(lambda: site.stream(a).resets, PATIENCE_S, what="reset")
        site.send(KEYS, 6)
        site.send(KEYS, 7)
        site.wait_equal(a)
        # Redis is in the new topic, and the server's own database in the old one.
        with site.server("b", **shared) as b:

            def caught_up() -> bool:
                assert site.equals(a)
                return places(site, b) == places(site, a)

            wait_for(caught_up, PATIENCE_S, what="all of the new topic")
            assert site.stream(b).resets == 1
            assert "tier=rocksdb" in caplog.text
            site.send(KEYS[:1000], 8)
            site.wait_equal(a, b)
    with site.server("b", volatile={"type": "disabled"}) as alone:
        site.wait_equal(alone)
