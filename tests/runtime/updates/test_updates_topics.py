"""Which topics are followed, into which databases, and when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ConfigError
from hps_numba.runtime.hps import HPS
from tests.runtime.deployments import Table
from tests.runtime.updates.servers import (
    ITEMS,
    NO_HOST,
    NO_ROCKSDB,
    PATIENCE_S,
    NewSite,
    Site,
)
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

USERS = Table("users", dim=8, n_rows=0, default=0.5)
KEYS = np.arange(200)


def where(site: Site, server: HPS, table: str = "items") -> set[str]:
    """Return the tiers that lookups of ``KEYS`` read."""
    return set(server.locate(site.model, table, KEYS))


@pytest.mark.parametrize("pattern", ["default", ".+", "model", "topic", "^model$"])
def test_a_filter_names_models_or_topics(new_site: NewSite, pattern: str) -> None:
    site = new_site()
    other = new_site()
    filters: dict[str, list[str]] = {
        ".+": [".+"],
        "model": [site.model],
        "topic": [rf"hps_et\.{site.model}\.items"],
        "^model$": [f"^{site.model}$"],
    }
    chosen: dict[str, Any] = {}
    if pattern != "default":
        chosen = {"update_filters": filters[pattern]}
    options: dict[str, Any] = {"volatile": chosen, "persistent": chosen}
    with site.server(**options) as server:
        site.send(KEYS, 1)
        other.send(KEYS, 1)
        site.wait_equal(server)
        unknown = server.updates.stats().unknown_topics
        assert (other.topic() in unknown) == (pattern in ("default", ".+"))
        assert site.topic() not in unknown


def test_what_only_the_persistent_database_follows_leaves_host_memory(
    new_site: NewSite,
) -> None:
    site = new_site()
    with site.server(volatile={"update_filters": []}) as server:
        server.update(site.model, "items", KEYS, np.zeros((KEYS.size, 4)))
        assert where(site, server) == {"host"}
        site.send(KEYS, 1)
        site.wait_equal(server)
        server.drain()
        site.send(KEYS, 2)
        site.wait_equal(server)
        site.delete(KEYS[:50])
        site.wait_equal(server)


def test_what_only_the_volatile_database_follows_is_not_persistent(
    new_site: NewSite,
) -> None:
    site = new_site()
    only_host = {"persistent": {"update_filters": ["another_model"]}}
    with site.server(**only_host) as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        assert where(site, server) == {"host"}
    with site.server(volatile=NO_HOST, source={"type": "null"}) as server:
        assert where(site, server) == {"default"}


def test_tables_may_be_followed_by_different_databases(new_site: NewSite) -> None:
    site = new_site(tables=(ITEMS, USERS))
    options: dict[str, Any] = {
        "volatile": {"update_filters": [rf"hps_et\.{site.model}\.items"]},
        "persistent": {"update_filters": [rf"hps_et\.{site.model}\.users"]},
    }
    with site.server(**options) as server:
        site.send(KEYS, 1)
        site.send(KEYS, 2, "users")
        site.wait_equal(server)
        site.wait_equal(server, table="users")
    with site.server(volatile=NO_HOST, source={"type": "null"}) as server:
        assert where(site, server) == {"default"}
        assert where(site, server, "users") == {"rocksdb"}


def test_a_topic_that_comes_later_is_picked_up(
    new_site: NewSite, broker: KafkaBroker
) -> None:
    site = new_site(partitions=1)
    broker.delete_topic(site.topic())
    with site.server() as server:
        assert server.updates.catch_up(PATIENCE_S)
        assert not site.parts(server)
        broker.create_topic(site.topic(), 1)
        site.send(KEYS, 1)
        site.wait_equal(server)


def test_models_come_and_go_with_their_streams(new_site: NewSite) -> None:
    site, late = new_site(), new_site()
    site.send(KEYS, 1)
    late.send(KEYS, 1)
    with site.server() as server:
        site.wait_equal(server)
        wait_for(
            lambda: late.topic() in server.updates.stats().unknown_topics,
            PATIENCE_S,
            what="unknown topic",
        )
        server.add_model(late.params())
        late.wait_equal(server)
        assert late.topic() not in server.updates.stats().unknown_topics
        server.remove_model(late.model)
        late.send(KEYS, 2)
        site.send(KEYS, 2)
        site.wait_equal(server)
        wait_for(lambda: not late.parts(server), PATIENCE_S, what="end of stream")
        server.add_model(late.params())
        late.wait_equal(server)
        assert late.stream(server).rows == KEYS.size  # not those of before
        server.remove_model(late.model, drop_tables=True)
        server.add_model(late.params())
        late.wait_equal(server)  # from the beginning of the stream


def test_a_read_only_database_does_not_follow(
    new_site: NewSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = new_site()
    with site.server(source={"type": "null"}) as server:
        server.update(site.model, "items", KEYS, np.zeros((KEYS.size, 4)))
    read_only: dict[str, Any] = {"read_only": True}
    with pytest.raises(ConfigError, match=r"set persistent_db.update_filters to \[\]"):
        site.server(persistent=read_only)
    with site.server(persistent=read_only | {"update_filters": []}) as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        assert where(site, server) == {"host"}
    assert "persistent_db is read-only" in caplog.text


def test_a_source_that_no_database_follows_is_refused(new_site: NewSite) -> None:
    site = new_site()
    none: dict[str, Any] = {"update_filters": []}
    with pytest.raises(ConfigError, match="update_filters of both databases are empty"):
        site.server(volatile=none, persistent=none)
    with pytest.raises(ConfigError, match="update_filters of both databases are empty"):
        site.server(volatile=none, persistent=NO_ROCKSDB)
