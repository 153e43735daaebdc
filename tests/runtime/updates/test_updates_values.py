"""What is published is what lookups return: rows, versions, deletions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hps_numba.runtime.updates.frames import DELETE, encode
from hps_numba.types import Position
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table
from tests.runtime.updates.servers import (
    ITEMS,
    NO_HOST,
    NO_ROCKSDB,
    PATIENCE_S,
    NewSite,
    redis_of,
)
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

HALVES = Table("halves", dim=4, n_rows=0, default=-1.0, dtype="float16")
EDGES = np.array([-1, 0, 1, np.iinfo(np.int64).min, np.iinfo(np.int64).max])


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3) as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(params=["host+rocksdb", "host", "rocksdb", "redis", "redis+rocksdb"])
def databases(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the databases of a server."""
    names = str(request.param).split("+")
    options: dict[str, Any] = {}
    if "redis" in names:
        cluster = request.getfixturevalue("cluster")
        options["volatile"] = redis_of(cluster)
    elif "host" not in names:
        options["volatile"] = NO_HOST
    if "rocksdb" not in names:
        options["persistent"] = NO_ROCKSDB
    return options


def test_every_database_has_the_newest_rows_and_no_deleted_ones(
    databases: dict[str, Any], new_site: NewSite
) -> None:
    site = new_site()
    site.send(np.arange(3000), 1)
    with site.server(**databases) as server:
        site.send(np.arange(1000, 4000), 2)
        site.delete(np.arange(500, 1500))
        site.send(np.arange(600, 700), 3)
        site.delete(EDGES)
        site.send(EDGES, 4)
        site.delete([0, 77_777])
        site.wait_equal(server)
        assert server.updates.catch_up(PATIENCE_S)
        stream = site.stream(server)
        assert stream.rows == 3000 + 3000 + 100 + EDGES.size
        assert stream.deletes == 1000 + EDGES.size + 2
        assert not stream.skipped
        assert not stream.retries + stream.rewinds + stream.resets


def test_a_new_start_goes_on_where_the_databases_are(
    databases: dict[str, Any], new_site: NewSite
) -> None:
    site = new_site()
    lasts = databases.get("persistent") is not NO_ROCKSDB or "address" in (
        databases.get("volatile", {})
    )
    with site.server(**databases) as server:
        site.send(np.arange(3000), np.arange(3000) + 1)
        site.wait_equal(server)
    site.send(np.arange(2000, 5000), 2)
    site.delete(np.arange(100))
    with site.server(**databases) as server:
        site.wait_equal(server)
        assert server.updates.catch_up(PATIENCE_S)
        assert site.stream(server).rows == (3000 if lasts else 6000)
        assert site.stream(server).deletes == 100


def test_the_last_row_of_a_key_wins_inside_a_message(new_site: NewSite) -> None:
    site = new_site()
    keys = np.random.default_rng(3).integers(0, 50, 4000)
    with site.server() as server:
        site.send(keys, np.arange(4000) + 1)
        site.wait_equal(server)


def test_a_backlog_is_applied_as_one_burst(new_site: NewSite) -> None:
    site = new_site(partitions=1)
    keys = np.random.default_rng(4).integers(0, 20_000, 60_000)
    site.send(keys, np.arange(60_000) + 1)
    site.delete(np.arange(100))
    with site.server(source={"burst_rows": 10_000}) as server:
        site.wait_equal(server)
        assert site.stream(server).rows == 60_000
    with site.server() as server:  # from RocksDB alone
        assert server.updates.catch_up(PATIENCE_S)
        site.wait_equal(server)
        assert site.stream(server).rows == 0


def test_half_precision_takes_frames_of_either_width(new_site: NewSite) -> None:
    site = new_site(tables=(HALVES,))
    keys = np.arange(100)
    with site.server() as server:
        site.send(keys, 1, "halves")  # float32
        site.wait_equal(server, table="halves")
        halves = versioned_rows(keys[:50], 2, 4, np.float16)
        site.producer.send(site.model, "halves", keys[:50], halves)
        site.producer.flush()
        site.replays["halves"].update(dict.fromkeys(range(50), 2))
        site.wait_equal(server, table="halves")
        assert server.lookup(keys, site.model, "halves").dtype == np.float32


def test_keys_of_4_bytes_are_unsigned(new_site: NewSite) -> None:
    site = new_site()
    keys = np.array([0, 1, (1 << 32) - 1])
    with site.server(supportlonglong=False) as server:
        site.produce(encode(keys, versioned_rows(keys, 5, 4), key_bytes=4))
        site.produce(encode(keys[1:2], None, key_bytes=4), key=DELETE)
        site.replays["items"] = {0: 5, 1: 0, (1 << 32) - 1: 5}
        site.wait_equal(server)
        assert not site.stream(server).skipped


def test_tables_of_a_model_have_streams_of_their_own(new_site: NewSite) -> None:
    users = Table("users", dim=8, n_rows=0, default=0.5)
    site = new_site(tables=(ITEMS, users))
    with site.server() as server:
        site.send(np.arange(100), 1)
        site.send(np.arange(50, 200), 2, "users")
        site.delete([60], "users")
        site.wait_equal(server)
        site.wait_equal(server, table="users")
        assert (site.stream(server).rows, site.stream(server).deletes) == (100, 0)


def test_positions_are_one_past_the_last_message(new_site: NewSite) -> None:
    site = new_site(partitions=3)
    with site.server() as server:
        site.wait_followed(server)
        for version in range(1, 6):
            site.send(np.arange(30), version)
        site.wait_equal(server)
        assert server.updates.catch_up(PATIENCE_S)
        wait_for(
            lambda: all(part.lag == 0 for part in site.parts(server).values()),
            PATIENCE_S,
            what="no lag",
        )
        for part in site.parts(server).values():
            assert part.position == Position(part.end or -1)
            assert part.position.offset >= 5
