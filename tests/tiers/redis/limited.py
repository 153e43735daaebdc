"""Tables whose partitions have a margin, written and used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import redis

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import OverflowPolicy, TableSpec
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.stored import partition_of

SPEC = TableSpec("model", "table", dim=4)
TAG = SPEC.tag
LAYOUTS = list(RedisLayout)
POLICIES = list(OverflowPolicy)
LEAST_USED = OverflowPolicy.EVICT_LEAST_USED
OLDEST = OverflowPolicy.EVICT_OLDEST
RANDOM = OverflowPolicy.EVICT_RANDOM
NO_KEYS: set[int] = set()


@contextmanager
def one_table(
    where: RedisServer | RedisCluster,
    layout: RedisLayout,
    overflow: Overflow,
    *,
    num_partitions: int = 1,
) -> Iterator[RedisTier]:
    options = RedisOptions(where.address, timeout_s=5.0)
    tier = RedisTier(
        options, num_partitions=num_partitions, layout=layout, overflow=overflow
    )
    with closing(tier):
        tier.open_table(SPEC)
        yield tier


def rows_of(keys) -> np.ndarray:
    return np.add.outer(np.asarray(keys), [0, 0.25, 0.5, 0.75]).astype(np.float32)


def insert(tier: RedisTier, keys) -> None:
    keys = np.asarray(keys, np.int64)
    tier.insert(TAG, keys, rows_of(keys))


def use(tier: RedisTier, keys, times: int = 1) -> None:
    """Look keys up, all of which are there."""
    keys = np.asarray(keys, np.int64)
    for _ in range(times):
        out, found = np.empty((keys.size, 4), np.float32), np.zeros(keys.size, np.bool_)
        assert tier.fetch(TAG, keys, out, found) == keys.size
        np.testing.assert_array_equal(out, rows_of(keys))
    tier.drain()


def keys_in(tier: RedisTier) -> set[int]:
    """Return the keys; their rows are right."""
    found: list[int] = []
    for block in tier.iterate(TAG):
        np.testing.assert_array_equal(block.rows, rows_of(block.keys))
        found += block.keys.tolist()
    assert len(found) == len(set(found))
    return set(found)


def sizes(tier: RedisTier, num_partitions: int) -> list[int]:
    counts = Counter(partition_of(key, num_partitions) for key in keys_in(tier))
    return [counts[p] for p in range(num_partitions)]


def raw(key: int) -> bytes:
    return key.to_bytes(8, "little", signed=True)


def prefix(partition: int = 0, tag: str = TAG) -> bytes:
    return b"hps_et{%s/p%d}" % (tag.encode(), partition)


def uses_in(
    client: redis.Redis, partition: int = 0, tag: str = TAG
) -> dict[int, bytes]:
    """Return what is noted of each key."""
    noted = client.hgetall(prefix(partition, tag) + b"t")
    return {int.from_bytes(k, "little", signed=True): v for k, v in noted.items()}


def write_beneath(
    client: redis.Redis,
    layout: RedisLayout,
    keys: range | np.ndarray,
    uses: list[bytes] | None,
) -> None:
    """Write rows of partition 0, and what is noted of them, as another program does."""
    pipe = client.pipeline(transaction=False)
    for i, key in enumerate(np.asarray(keys).tolist()):
        if layout is RedisLayout.HASHES:
            pipe.hset(prefix() + b"v", raw(key), rows_of([key]).tobytes())
        else:
            pipe.set(prefix() + raw(key), rows_of([key]).tobytes())
        if uses is not None:
            pipe.hset(prefix() + b"t", raw(key), uses[i])
    pipe.execute()
