"""The rights that the documentation gives to an account are enough, and no more."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.exceptions import NoPermissionError

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import ConfigError, TierUnavailableError
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import OverflowPolicy, Position, RowBlock, StreamSpan, TableSpec
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer

SPEC = TableSpec("model", "table", 8)
KEYS = np.arange(5_000, dtype=np.int64)
ROWS = np.random.default_rng(0).random((KEYS.size, SPEC.dim), dtype=np.float32)


PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


def documented(pattern: str) -> list[str]:
    """Return the words of a command in docs/operations.md."""
    match = re.search(pattern, PAGE.replace("\\\n", " "))
    assert match is not None
    return shlex.split(match[1])


def documented_rights() -> list[str]:
    """Return the arguments of ACL SETUSER in docs/operations.md."""
    return documented(r"redis-cli -p \$port (ACL SETUSER hps .*)\n")


def documented_settings() -> dict[str, str]:
    """Return the lines of redis.conf that docs/operations.md gives to a server."""
    words = documented(r"redis-server --port \$port --dir \S+ --daemonize yes (.*)\n")
    names = [name.removeprefix("--") for name in words[::2]]
    return dict(zip(names, words[1::2], strict=True))


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    made = RedisCluster(masters=3, config=documented_settings())
    for node in made.nodes:
        (node.folder / "users.acl").touch()
    with made:
        yield made


@pytest.mark.parametrize("layout", list(RedisLayout))
def test_the_documented_account_can_do_all_that_a_tier_does(
    cluster: RedisCluster, layout: RedisLayout, caplog: pytest.LogCaptureFixture
) -> None:
    for node in cluster.masters:
        with node.client() as client:
            client.execute_command(*documented_rights())
    tier = RedisTier(
        RedisOptions(cluster.address, user="hps", password="secret"),
        layout=layout,
        num_partitions=8,
        overflow=Overflow(OverflowPolicy.EVICT_OLDEST, margin=600, target=0.9),
    )
    tier.open_table(SPEC)
    with tier.loading(SPEC.tag):
        tier.load(SPEC.tag, [RowBlock(KEYS, ROWS)], fingerprint={"of": "files"})
    tier.insert(SPEC.tag, KEYS[:10], ROWS[:10])
    tier.backfill(SPEC.tag, KEYS[20:30], ROWS[20:30], tier.epoch(SPEC.tag))
    rows, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
    tier.fetch(SPEC.tag, KEYS, rows, found)
    np.testing.assert_array_equal(rows[found], ROWS[found])
    tier.seek(SPEC.tag, {0: Position(0)})
    spans = [StreamSpan(0, Position(n), Position(n + 1)) for n in range(2)]
    assert tier.apply(SPEC.tag, KEYS[:10], ROWS[:10], spans[0]) == 10
    assert tier.apply(SPEC.tag, KEYS[:10], None, spans[1]) == 10
    assert tier.positions(SPEC.tag) == {0: Position(2)}
    assert tier.delete(SPEC.tag, KEYS) == np.count_nonzero(found) - 10
    assert tier.stats(SPEC.tag).rows == tier.size(SPEC.tag) == 0
    assert tier.tables("model") == ["table"]
    tier.drop_table(SPEC.tag)
    tier.close()
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_the_documented_account_reaches_nothing_else(cluster: RedisCluster) -> None:
    master = cluster.masters[0]
    with master.client() as client:
        client.execute_command(*documented_rights())
    account = redis.Redis(port=master.port, username="hps", password="secret")
    with account, pytest.raises(NoPermissionError):
        account.get("elsewhere")
    with account, pytest.raises(NoPermissionError):
        account.flushall()


def test_the_documented_account_is_there_after_a_restart(cluster: RedisCluster) -> None:
    for node in cluster.masters:
        with node.client() as client:
            client.execute_command(*documented_rights())
            client.execute_command(*documented(r"redis-cli -p \$port (ACL SAVE)\n"))
    options = RedisOptions(cluster.address, user="hps", password="secret")
    with closing(RedisTier(options, num_partitions=8)) as tier:
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, KEYS, ROWS)
    restarted = cluster.masters[0]
    restarted.kill()
    restarted.start()
    cluster.wait_until_stable()
    with closing(RedisTier(options, num_partitions=8)) as tier:
        tier.open_table(SPEC)
        rows, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
        tier.fetch(SPEC.tag, KEYS, rows, found)
    assert found.all()
    np.testing.assert_array_equal(rows, ROWS)


def test_an_account_without_a_right_is_told_which(cluster: RedisCluster) -> None:
    rights = [word for word in documented_rights() if word != "+eval"]
    for node in cluster.masters:
        with node.client() as client:
            client.execute_command(*rights, "-eval")
    tier = RedisTier(RedisOptions(cluster.address, user="hps", password="secret"))
    with pytest.raises(ConfigError, match=r"the configured user lacks a right .*eval"):
        tier.open_table(SPEC)
    tier.close()


def test_an_account_that_is_refused_later_makes_the_tier_unavailable() -> None:
    with (
        RedisServer({"requirepass": "first"}, password="first") as server,
        closing(RedisTier(RedisOptions(server.address, password="first"))) as tier,
    ):
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, KEYS, ROWS)
        with server.client() as client:
            client.config_set("requirepass", "second")
            client.client_kill_filter(_type="normal", skipme=True)
        rows, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
        span = StreamSpan(0, Position(0), Position(1))
        for call in (
            lambda: tier.fetch(SPEC.tag, KEYS, rows, found),
            lambda: tier.insert(SPEC.tag, KEYS, ROWS),
            lambda: tier.backfill(SPEC.tag, KEYS, ROWS, tier.epoch(SPEC.tag)),
            lambda: tier.delete(SPEC.tag, KEYS),
            lambda: tier.apply(SPEC.tag, KEYS, ROWS, span),
            lambda: tier.positions(SPEC.tag),
            lambda: tier.seek(SPEC.tag, {0: Position(1)}),
            lambda: tier.evict(SPEC.tag),
            lambda: tier.size(SPEC.tag),
            lambda: next(tier.iterate(SPEC.tag)),
            lambda: tier.load(SPEC.tag, []),
            lambda: tier.fingerprint(SPEC.tag),
        ):
            with pytest.raises(TierUnavailableError, match="was refused") as caught:
                call()
            assert "first" not in str(caught.value)
            assert SPEC.tag in str(caught.value)
        for call in (lambda: tier.size(SPEC.tag), lambda: tier.evict(SPEC.tag)):
            with pytest.raises(TierUnavailableError, match=server.address):
                call()
        assert tier.stats(SPEC.tag).down == ()
        assert not found.any()
