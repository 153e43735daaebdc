"""Updates that replicas have to confirm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest

from hps_numba.errors import TierTimeoutError
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, Position, RowBlock, Rows, StreamSpan, TableSpec
from tests.support.redis_servers import RedisServer, wait_for

SPEC = TableSpec("model", "table", 4)
STAMPS = f"hps_et{{{SPEC.tag}/p0}}s"
KEYS = np.arange(3000, dtype=np.int64)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer({"repl-diskless-sync-delay": "0"}) as server:
        yield server


@pytest.fixture(scope="module")
def shared_replica(shared_server: RedisServer) -> Iterator[RedisServer]:
    with RedisServer({"replicaof": f"127.0.0.1 {shared_server.port}"}) as replica:
        yield replica


@pytest.fixture
def replica(server: RedisServer, shared_replica: RedisServer) -> Iterator[RedisServer]:
    """A replica that follows ``server``."""
    client = server.client()
    client.set("written", 1)
    wait_for(lambda: client.wait(1, 1000) == 1, 20.0, what="replication")
    yield shared_replica
    shared_replica.resume()


@contextmanager
def opened(server: RedisServer) -> Iterator[RedisTier]:
    options = RedisOptions(server.address, timeout_s=2.0)
    with closing(RedisTier(options, num_partitions=2, wait_replicas=1)) as tier:
        tier.open_table(SPEC)
        yield tier


@pytest.fixture
def tier(server: RedisServer) -> Iterator[RedisTier]:
    with opened(server) as found:
        yield found


def rows(version: int, keys: Keys = KEYS) -> Rows:
    return np.full((keys.size, SPEC.dim), version, np.float32)


def version_of(tier: RedisTier, key: int) -> float:
    out, found = rows(-1, KEYS[:1]), np.zeros(1, np.bool_)
    tier.fetch(SPEC.tag, np.array([key], np.int64), out, found)
    assert found.all()
    return float(out[0, 0])


def test_an_update_is_on_the_replica_once_it_is_acknowledged(
    tier: RedisTier, replica: RedisServer
) -> None:
    there = replica.client()
    tier.insert(SPEC.tag, KEYS, rows(1))
    n_keys = len(there.keys(f"hps_et{{{SPEC.tag}/p*"))
    assert n_keys == KEYS.size + 2  # and the stamps
    assert tier.delete(SPEC.tag, KEYS) == KEYS.size
    assert len(there.keys(f"hps_et{{{SPEC.tag}/p*")) == 2


def test_an_update_that_no_replica_confirms_is_not_acknowledged(
    tier: RedisTier, replica: RedisServer
) -> None:
    tier.insert(SPEC.tag, KEYS, rows(1))
    before = tier.epoch(SPEC.tag)
    replica.pause()
    with pytest.raises(
        TierTimeoutError, match=r"0 replica\(s\) of server .* 1 have to"
    ):
        tier.insert(SPEC.tag, KEYS, rows(2))
    with pytest.raises(TierTimeoutError):
        tier.delete(SPEC.tag, KEYS[:5])
    with pytest.raises(TierTimeoutError):
        tier.load(SPEC.tag, [RowBlock(KEYS, rows(2))])
    # It may have happened: what was read before is not brought back.
    assert tier.backfill(SPEC.tag, KEYS, rows(1), before) == 0
    assert tier.down() == []
    assert version_of(tier, 7) == 2
    replica.resume()
    tier.insert(SPEC.tag, KEYS, rows(3))
    assert version_of(tier, 7) == 3


def test_backfills_and_evictions_wait_for_no_replica(
    tier: RedisTier, replica: RedisServer
) -> None:
    replica.pause()
    assert tier.backfill(SPEC.tag, KEYS, rows(1), tier.epoch(SPEC.tag)) == KEYS.size
    assert tier.evict(SPEC.tag, KEYS) == KEYS.size


def test_a_span_is_acknowledged_to_no_server_before_a_replica_has_it(
    tier: RedisTier, server: RedisServer, replica: RedisServer
) -> None:
    spans = [StreamSpan(0, Position(n), Position(n + 1)) for n in range(2)]
    assert tier.apply(SPEC.tag, KEYS, rows(1), spans[0]) == KEYS.size
    with opened(server) as other:
        replica.pause()
        for one in (tier, tier, other):  # of which the first writes it
            with pytest.raises(TierTimeoutError, match="1 have to"):
                one.apply(SPEC.tag, KEYS, rows(2), spans[1])
        replica.resume()
        assert other.apply(SPEC.tag, KEYS, rows(2), spans[1]) == 0
    assert replica.client().hget(STAMPS, "stream") == b" 0=2:0"
