"""Listing, counting and removing a table among others with names much like its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import ConfigError
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Rows, TableSpec
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer

DIM = 4
NAMES = ["a", "ab", "a/p1", "a*", "a?", "[ab]", "a\\", "a b", "ä", "b.a"]
KEYS = np.concatenate(
    [
        np.arange(-50, 50, dtype=np.int64),
        # Bytes that look like the ends of other names.
        np.frombuffer(b"}vvvvvvv/p0}vvvv/p1}....*[]?\\*[]sssssss}", "<i8"),
    ]
)
SPECS = [TableSpec("model", name, DIM) for name in NAMES]


@pytest.fixture(params=["server", "cluster"])
def servers(request: pytest.FixtureRequest) -> RedisServer | RedisCluster:
    found: RedisServer | RedisCluster = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=list(RedisLayout))
def tier(
    servers: RedisServer | RedisCluster, request: pytest.FixtureRequest
) -> Iterator[RedisTier]:
    """A tier with a table of each name, full of rows that have its number."""
    opened = RedisTier(
        RedisOptions(servers.address), num_partitions=3, layout=request.param
    )
    for number, spec in enumerate(SPECS):
        opened.open_table(spec)
        opened.insert(spec.tag, KEYS, rows(number))
    yield opened
    opened.close()


def rows(number: int, n_rows: int = KEYS.size) -> Rows:
    return np.full((n_rows, DIM), number, np.float32)


def listed(tier: RedisTier, spec: TableSpec, block_rows: int) -> dict[int, float]:
    """Return what ``iterate`` gives, which has each key once."""
    found: dict[int, float] = {}
    for block in tier.iterate(spec.tag, block_rows=block_rows):
        assert 0 < len(block) <= block_rows
        assert not found.keys() & set(block.keys.tolist())
        found |= dict(zip(block.keys.tolist(), block.rows[:, 0].tolist(), strict=True))
    return found


def test_each_table_lists_and_counts_its_own_rows(tier: RedisTier) -> None:
    for number, spec in enumerate(SPECS):
        assert listed(tier, spec, 7) == dict.fromkeys(KEYS.tolist(), float(number))
        assert tier.size(spec.tag) == KEYS.size
    assert tier.tables("model") == sorted(NAMES)
    assert tier.tables("mode") == []


def test_evicting_all_rows_leaves_those_of_other_tables(tier: RedisTier) -> None:
    gone, *others = SPECS
    assert tier.evict(gone.tag) == KEYS.size
    assert tier.evict(gone.tag) == 0
    assert tier.size(gone.tag) == 0
    assert listed(tier, gone, 50) == {}
    assert [tier.size(spec.tag) for spec in others] == [KEYS.size] * len(others)
    tier.insert(gone.tag, KEYS[:1], rows(9, 1))
    assert listed(tier, gone, 50) == {-50: 9.0}


def test_dropped_tables_leave_nothing_and_touch_nothing(
    tier: RedisTier, servers: RedisServer | RedisCluster
) -> None:
    client: Any = servers.client()
    others = [(n, spec) for n, spec in enumerate(SPECS) if n % 2]
    for spec in SPECS[::2]:
        tier.drop_table(spec.tag)
    assert tier.tables("model") == sorted(spec.name for _, spec in others)
    for number, spec in others:
        assert listed(tier, spec, 50) == dict.fromkeys(KEYS.tolist(), float(number))
    for _, spec in others:
        tier.drop_table(spec.tag)
    assert client.keys("*") == []


def test_a_load_replaces_rows_of_its_table_only(tier: RedisTier) -> None:
    for number, spec in enumerate(SPECS):
        if spec.name == "a":
            tier.load(spec.tag, [])
            assert listed(tier, spec, 50) == {}
        else:
            assert tier.size(spec.tag) == KEYS.size, number


def test_keys_that_a_scan_gives_twice_are_listed_once(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, hscan = redis.Redis.scan, redis.Redis.hscan

    def scan_twice(client: redis.Redis, *args: Any, **options: Any) -> Any:
        cursor, names = scan(client, *args, **options)
        return cursor, names + names[::-1]

    def hscan_twice(client: Any, *args: Any, **options: Any) -> Any:
        cursor, some = hscan(client, *args, **options)
        return cursor, [*some, *some]

    monkeypatch.setattr(redis.Redis, "scan", scan_twice)
    for kind in (redis.Redis, redis.RedisCluster):
        monkeypatch.setattr(kind, "hscan", hscan_twice)
    spec = SPECS[0]
    assert len(listed(tier, spec, 50)) == KEYS.size
    assert tier.size(spec.tag) == KEYS.size
    assert tier.evict(spec.tag) == KEYS.size


def test_many_rows_take_many_calls(server: RedisServer) -> None:
    spec, n_rows = SPECS[0], 20_000
    keys = np.arange(n_rows, dtype=np.int64) - n_rows // 2
    for layout in RedisLayout:
        server.client().flushall()
        tier = RedisTier(RedisOptions(server.address), layout=layout, num_partitions=2)
        tier.open_table(spec)
        tier.insert(spec.tag, keys, rows(1, n_rows))
        assert sorted(listed(tier, spec, 3000)) == keys.tolist()
        assert tier.size(spec.tag) == n_rows
        tier.close()


@pytest.mark.parametrize("name", ["a{b", "a}b", "{}"])
def test_names_with_braces_are_refused(server: RedisServer, name: str) -> None:
    tier = RedisTier(RedisOptions(server.address))
    with pytest.raises(ConfigError, match="a name has no braces"):
        tier.open_table(TableSpec("model", name, DIM))
    tier.close()


def test_two_tables_with_one_tag_are_refused(server: RedisServer) -> None:
    tier = RedisTier(RedisOptions(server.address))
    tier.open_table(TableSpec("model", "a.b", DIM))
    with pytest.raises(ConfigError, match=r"'a.b' of model 'model' in Redis"):
        tier.open_table(TableSpec("model.a", "b", DIM))
    tier.close()
