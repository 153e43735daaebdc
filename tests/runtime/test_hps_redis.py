"""Servers over a Redis that they share."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import TierUnavailableError, UnknownTableError
from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows
from tests.runtime.deployments import (
    ITEMS,
    NOBODY,
    USERS,
    Table,
    Wraps,
    model,
    server_config,
    versions,
    write_table,
)
from tests.support.gates import StopPoints
from tests.support.redis_cluster import RedisCluster
from tests.support.wrappers import CountingTier, GatedTier

pytestmark = pytest.mark.service

TAG = "hps_et.wdl.items"
NO_ROCKSDB = {"backend": "disabled"}


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3) as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """Three masters, empty."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(params=["strings", "hashes"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Site:
    """Servers of one model over one cluster, each with a folder of its own."""

    def __init__(self, root: Path, cluster: RedisCluster, **volatile: Any) -> None:
        self.root = root
        self.params = model(root, [ITEMS, USERS])
        self._volatile = {
            "type": "redis_cluster",
            "address": cluster.address,
            "num_partitions": 8,
            "num_node_connections": 2,
        } | volatile

    def config(self, name: str = "a", *, alone: bool = False, **options: Any) -> Any:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        volatile = self._volatile | options.pop("volatile", {})
        persistent = NO_ROCKSDB if alone else options.pop("persistent", {})
        return server_config(
            folder, [self.params], volatile=volatile, persistent=persistent, **options
        )

    def rewrite(self, version: int, n_rows: int = ITEMS.n_rows) -> None:
        """Replace the files of the first table."""
        write_table(self.root / "wdl/items", ITEMS.keys[:n_rows], version)


@pytest.fixture
def site(tmp_path: Path, cluster: RedisCluster, layout: str) -> Site:
    return Site(tmp_path, cluster, redis_layout=layout)


def update(server: HPS, keys: list[int], version: int) -> None:
    server.update("wdl", 0, keys, versioned_rows(keys, version, ITEMS.dim))


def answers(server: HPS, key: int) -> bool:
    """Whether a key is served; its row must be right then."""
    try:
        assert versions(server, [key]) == [1]
    except TierUnavailableError:
        return False
    return True


class TestOneServer:
    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_every_row_is_served(self, site: Site, alone: bool) -> None:
        with HPS(site.config(alone=alone)) as server:
            for table in (ITEMS, USERS):
                rows = server.lookup(table.keys, "wdl", table.name)
                assert np.array_equal(rows, table.rows)
            assert server.locate("wdl", 0, [1, NOBODY]) == ["redis", "default"]
            redis = server.stats().table("wdl", "items").tiers[0]
            assert (redis.tier, redis.asked, redis.hits) == ("redis", 1000, 1000)

    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_rows_are_updated_and_deleted(self, site: Site, alone: bool) -> None:
        with HPS(site.config(alone=alone)) as server:
            update(server, [1, 5000, -7], 2)
            server.delete("wdl", 0, [3, 6000])
            assert versions(server, [0, 1, 3, 5000, -7]) == [1, 2, 0, 2, 2]
            update(server, [3], 4)
            assert versions(server, [3]) == [4]

    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_starting_again_undoes_no_updates(self, site: Site, alone: bool) -> None:
        config = site.config(alone=alone)
        with HPS(config) as server:
            update(server, [1, 5000], 2)
            server.delete("wdl", 0, [3])
        wraps = Wraps(CountingTier)
        with HPS(config, wrap_tier=wraps) as server:
            assert versions(server, [0, 1, 3, 5000]) == [1, 2, 0, 2]
            assert server.locate("wdl", 0, [1, 5000]) == ["redis"] * 2
        assert wraps.tiers["redis"].calls["load"] == 0

    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_changed_files_replace_the_table(self, site: Site, alone: bool) -> None:
        config = site.config(alone=alone)
        with HPS(config) as server:
            update(server, [1, 5000], 2)
        site.rewrite(3, n_rows=10)
        with HPS(config) as server:
            assert versions(server, [0, 1, 9, 10, 5000]) == [3, 3, 3, 0, 0]
            site.rewrite(4, n_rows=20)
            assert server.reload("wdl")
            assert versions(server, [0, 9, 19, 20]) == [4, 4, 4, 0]
            assert not server.reload("wdl")

    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_a_forced_reload_undoes_updates(self, site: Site, alone: bool) -> None:
        config = site.config(alone=alone)
        with HPS(config) as server:
            update(server, [1, 5000], 2)
        with HPS(config, force_reload=True) as server:
            assert versions(server, [0, 1, 5000]) == [1, 1, 0]

    def test_what_redis_lost_comes_from_the_database_with_updates(
        self, site: Site, cluster: RedisCluster
    ) -> None:
        config = site.config()
        with HPS(config) as server:
            update(server, [1, 5000], 2)
        cluster.flush()
        with HPS(config) as server:
            assert versions(server, [0, 1, 5000]) == [1, 2, 2]
            assert server.locate("wdl", 0, [0, 1, 5000]) == ["redis"] * 3

    def test_redis_can_begin_empty_and_keep_what_is_asked_for(self, site: Site) -> None:
        pure = {"initialize_after_startup": False}
        with HPS(site.config(volatile=pure)) as server:
            assert server.locate("wdl", 0, [1]) == ["rocksdb"]
            assert versions(server, [1, 7]) == [1, 1]
            server.drain()
            assert server.locate("wdl", 0, [1, 2, 7]) == ["redis", "rocksdb", "redis"]
        wraps = Wraps(CountingTier)
        with HPS(site.config(volatile=pure), wrap_tier=wraps) as server:
            assert server.locate("wdl", 0, [1, 2]) == ["redis", "rocksdb"]
            assert wraps.tiers["redis"].calls["load"] == 0
            site.rewrite(2)
            assert server.reload("wdl")
            assert server.locate("wdl", 0, [1, 2]) == ["rocksdb"] * 2
            assert versions(server, [1, 2]) == [2, 2]

    def test_a_refresh_brings_what_changed_beneath(self, site: Site) -> None:
        with HPS(site.config()) as server:
            database = server._stores.persistent
            assert database is not None
            keys = np.array([1, 2], np.int64)
            database.insert(TAG, keys, versioned_rows(keys, 5, ITEMS.dim))
            database.delete(TAG, np.array([3], np.int64))
            assert versions(server, [1, 2, 3]) == [1, 1, 1]
            assert server.refresh("wdl", "items", keys=[1]) == 0
            assert versions(server, [1, 2, 3]) == [5, 1, 1]
            server.drain()  # key 1 is in Redis again
            assert server.refresh() == ITEMS.n_rows - 1 + USERS.n_rows
            assert versions(server, [1, 2, 3, 4]) == [5, 5, 0, 1]

    def test_tables_longer_than_a_request_go_in_chunks(self, site: Site) -> None:
        events: list[tuple[str, int]] = []
        with HPS(site.config(volatile={"max_batch_size": 96})) as server:
            keys = np.random.default_rng(1).integers(-50, 1050, 2_000)
            session = server.session(
                "wdl", observer=lambda *event: events.append(event[:2])
            )
            found = np.zeros(2_000, np.bool_)
            rows = session.lookup("items", keys, found=found)
        known = (keys >= 0) & (keys < 1000)
        np.testing.assert_array_equal(found, known)
        np.testing.assert_array_equal(rows[known], ITEMS.rows[keys[known]])
        assert (rows[~known] == ITEMS.default).all()
        chunks = set(range(-(-2_000 // 96)))
        assert {n for stage, n in events if stage == "redis"} == chunks
        assert {n for stage, n in events if stage == "rocksdb"} == chunks


class TestSeveralServers:
    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_the_second_does_not_load_again(self, site: Site, alone: bool) -> None:
        with HPS(site.config("a", alone=alone)) as first:
            update(first, [1, 5000], 2)
            wraps = Wraps(CountingTier)
            with HPS(site.config("b", alone=alone), wrap_tier=wraps) as second:
                assert wraps.tiers["redis"].calls["load"] == 0
                assert versions(second, [0, 1, 5000]) == [1, 2, 2]

    @pytest.mark.parametrize("alone", [False, True], ids=["over RocksDB", "alone"])
    def test_each_sees_the_updates_of_the_other(self, site: Site, alone: bool) -> None:
        with (
            HPS(site.config("a", alone=alone)) as first,
            HPS(site.config("b", alone=alone)) as second,
        ):
            for version in range(2, 6):
                update(first, [1, 9000], version)
                assert versions(second, [1, 2, 9000]) == [version, 1, version]
                update(second, [2], version)
                assert versions(first, [1, 2, 9000]) == [version] * 3
                update(second, [2], 1)

    def test_a_backfill_of_one_does_not_undo_an_update_of_the_other(
        self, site: Site, cluster: RedisCluster
    ) -> None:
        """The second server reads the old row while the first one updates it."""
        stops = StopPoints()
        with (
            HPS(site.config("a")) as first,
            HPS(
                site.config("b"), wrap_tier=Wraps(lambda tier: GatedTier(tier, stops))
            ) as second,
        ):
            redis = first._stores.volatile
            assert redis is not None
            redis.evict(TAG, np.array([7], np.int64))
            stops.arm("rocksdb.fetch.done")
            seen: list[int] = []
            looking = threading.Thread(
                target=lambda: seen.extend(versions(second, [7]))
            )
            looking.start()
            stops.wait_held("rocksdb.fetch.done")
            update(first, [7], 2)
            redis.evict(TAG, np.array([7], np.int64))  # as overflow handling would
            stops.release("rocksdb.fetch.done")
            looking.join()
            second.drain()
            assert seen == [1]
            assert versions(first, [7]) == [2]
            assert second.stats().backfill.refused_rows == 1

    def test_those_who_start_together_load_once(self, site: Site) -> None:
        """The second one finds nothing, waits for its turn, and looks again."""
        stops = {name: StopPoints() for name in ("a", "b")}
        servers: dict[str, HPS] = {}

        def run(name: str) -> None:
            servers[name] = HPS(
                site.config(name, alone=True),
                wrap_tier=Wraps(lambda tier: GatedTier(tier, stops[name])),
            )

        threads = [threading.Thread(target=run, args=(name,)) for name in stops]
        stops["a"].arm("redis.load")
        stops["b"].arm("redis.loading")
        for thread, (name, point) in zip(
            threads, (("a", "redis.load"), ("b", "redis.loading")), strict=True
        ):
            thread.start()
            stops[name].wait_held(point)
        stops["b"].release("redis.loading")
        stops["a"].release("redis.load")
        for thread in threads:
            thread.join()
        with servers["a"], servers["b"]:
            assert stops["a"].passed("redis.load") == 2  # of two tables
            assert stops["b"].passed("redis.load") == 0
            for server in servers.values():
                assert versions(server, ITEMS.keys) == [1] * ITEMS.n_rows

    def test_other_files_replace_the_rows_for_all(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        with HPS(site.config("a")) as first:
            assert versions(first, [1]) == [1]
            site.rewrite(2)
            with HPS(site.config("b")) as second:
                assert versions(second, [1]) == [2]
                assert versions(first, [1]) == [2]
                warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
                assert [TAG in record.getMessage() for record in warned] == [True]
                update(second, [1], 3)
                assert first.reload("wdl")  # its RocksDB alone
                assert versions(first, [1, 2]) == [3, 2]

    def test_a_model_that_one_removes_is_still_served_by_the_other(
        self, site: Site
    ) -> None:
        with (
            HPS(site.config("a", alone=True)) as first,
            HPS(site.config("b", alone=True)) as second,
        ):
            update(first, [1], 2)
            first.remove_model("wdl")
            with pytest.raises(UnknownTableError):
                versions(first, [1])
            assert versions(second, [1, 2]) == [2, 1]
            update(second, [2], 3)
            first.add_model(site.params)
            assert versions(first, [1, 2]) == [2, 3]

    def test_dropping_a_models_tables_removes_its_rows(self, site: Site) -> None:
        config = site.config("a", alone=True)
        with HPS(config) as server:
            update(server, [1], 2)
            redis = server._stores.volatile
            assert redis is not None
            server.remove_model("wdl", drop_tables=True)
            assert redis.tables("wdl") == []
            server.add_model(site.params)
            assert versions(server, [0, 1]) == [1, 1]

    def test_a_start_that_fails_leaves_the_tables_of_others(self, site: Site) -> None:
        extra = Table("extra", dim=4, n_rows=50)
        params = model(site.root, [ITEMS, USERS, extra])
        bad = site.root / "wdl/extra/emb_vector"
        rows = np.fromfile(bad, np.float32)
        rows[3] = np.nan
        rows.tofile(bad)
        with HPS(site.config("a", alone=True)) as first:
            update(first, [1], 2)
            config = site.config("b", alone=True)
            refused = config.replace(models=[params.replace(non_finite="refuse")])
            with pytest.raises(Exception, match="extra"):
                HPS(refused)
            assert versions(first, [1, 2]) == [2, 1]
            redis = first._stores.volatile
            assert redis is not None
            assert redis.tables("wdl") == ["items", "users"]


class TestFailures:
    @pytest.fixture
    def cluster(self) -> Iterator[RedisCluster]:
        with RedisCluster(masters=3) as made:
            yield made

    def test_one_node_less_fails_its_keys_only(
        self, site: Site, cluster: RedisCluster
    ) -> None:
        with HPS(site.config()) as server:
            held = server.locate("wdl", 0, ITEMS.keys)
            assert set(held) == {"redis"}
            cluster.nodes[1].kill()
            with pytest.raises(TierUnavailableError, match="redis"):
                versions(server, ITEMS.keys)
            answered = sum(answers(server, key) for key in range(40))
            assert 0 < answered < 40
            use = server.stats().table("wdl", "items").tiers[0]
            assert use.failures == 40 - answered + 1

    def test_degraded_lookups_are_served_by_the_database(
        self, site: Site, cluster: RedisCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        with HPS(site.config(on_tier_failure="degrade")) as server:
            update(server, [1, 5000], 2)
            for node in cluster.nodes:
                node.kill()
            for _ in range(5):
                assert versions(server, [0, 1, 5000, 6000]) == [1, 2, 2, 0]
            server.drain()
            stats = server.stats()
            table = stats.table("wdl", "items")
            assert (table.degraded, table.errors) == (5, 0)
            assert [use.failures for use in table.tiers] == [5, 0]
            degraded = [
                r for r in caplog.records if "lookup degraded" in r.getMessage()
            ]
            assert len(degraded) == 1

    def test_servers_that_come_back_are_asked_again(
        self, site: Site, cluster: RedisCluster
    ) -> None:
        with HPS(site.config(on_tier_failure="degrade")) as server:
            node = cluster.nodes[0]
            node.pause()
            assert versions(server, ITEMS.keys) == [1] * ITEMS.n_rows
            assert server.stats().table("wdl", "items").degraded == 1
            node.resume()
            cluster.wait_for(lambda: not server._stores.volatile.down())
            assert versions(server, ITEMS.keys) == [1] * ITEMS.n_rows
            assert server.stats().table("wdl", "items").degraded == 1

    def test_updates_are_refused_while_a_server_is_down(
        self, site: Site, cluster: RedisCluster
    ) -> None:
        """Served rows stay those of before: nothing is half written."""
        with HPS(site.config(on_tier_failure="degrade")) as server:
            for node in cluster.nodes:
                node.kill()
            with pytest.raises(Exception, match="0 of 2 keys"):
                update(server, [1, 2], 2)
            assert versions(server, [1, 2]) == [1, 1]


def test_a_server_reads_its_json(tmp_path: Path, cluster: RedisCluster) -> None:
    model(tmp_path, [ITEMS])
    content = {
        "supportlonglong": True,
        "volatile_db": {
            "type": "redis_cluster",
            "address": cluster.address,
            "user_name": "default",
            "num_node_connections": 3,
            "redis_layout": "hashes",
            "redis_timeout_ms": 2000,
            "cache_missed_embeddings": True,
        },
        "persistent_db": {"type": "rocks_db", "path": str(tmp_path / "rocksdb")},
        "models": [
            {
                "model": "wdl",
                "sparse_files": [str(tmp_path / "wdl/items")],
                "embedding_table_names": ["items"],
                "embedding_vecsize_per_table": [4],
                "maxnum_catfeature_query_per_table_per_sample": [10],
                "default_value_for_each_table": [0.0],
                "deployed_device_list": [0],
                "max_batch_size": 100,
                "gpucache": False,
            }
        ],
    }
    file = tmp_path / "ps.json"
    file.write_text(json.dumps(content))
    for _ in range(2):
        with HPS.from_json(file) as server:
            rows = server.lookup(ITEMS.keys, "wdl", 0)
            assert np.array_equal(rows, ITEMS.rows)
    with cluster.client() as client:
        stored = client.hvals("hps_et.tables")
    assert [json.loads(entry)["num_partitions"] for entry in stored] == [16]
    assert [json.loads(entry)["layout"] for entry in stored] == ["hashes"]
