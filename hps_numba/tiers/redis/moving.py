"""Writing to a slot while it is moved from one server to another.

Then the keys of one partition are on two servers, and no transaction has them all.
redis-py finds where each is; meanwhile a lease on their stamps refuses all backfills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.layout import KEY_BYTES, Bytes
from hps_numba.tiers.redis.scripts import LEASE_US, STAMP
from hps_numba.tiers.redis.table import RedisTable, Seen, buckets_to_stamp
from hps_numba.types import Keys


@dataclass(frozen=True)
class Moved:
    """What was written: what was seen of the partition, and how many were deleted."""

    seen: Seen
    removed: int


def write_moving(
    client: redis.Redis | redis.RedisCluster,
    table: RedisTable,
    partition: int,
    keys: Keys,
    rows: Bytes | None,
) -> Moved:
    """Put rows of one partition or (without rows) delete keys, one by one.

    Raises
    ------
    TierError
        If not all were written.
    """
    raw = keys.tobytes()
    names = [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]
    stamps, buckets = table.layout.stamps_key(partition), buckets_to_stamp(keys)
    with map_exceptions(table.spec.tag):
        client.eval(STAMP, 1, stamps, buckets, b"moving", LEASE_US)
        if rows is None:
            removed = _delete(client, table, partition, names)
        else:
            removed = 0
            _put(
                client,
                table,
                partition,
                dict(zip(names, map(bytes, rows), strict=True)),
            )
        seen: Seen = client.eval(STAMP, 1, stamps, buckets, b"", 0)
    return Moved(seen, removed)


def _put(
    client: redis.Redis | redis.RedisCluster,
    table: RedisTable,
    partition: int,
    rows: dict[Any, Any],
) -> None:
    layout, use = table.layout, table.use()
    if layout.has_hashes:
        client.hset(layout.rows_key(partition), mapping=rows)
    else:
        for name, row in rows.items():
            client.set(layout.row_key(partition, name), row)
    if use is not None:
        client.hset(layout.uses_key(partition), mapping=dict.fromkeys(rows, use))


def _delete(
    client: redis.Redis | redis.RedisCluster,
    table: RedisTable,
    partition: int,
    names: list[bytes],
) -> int:
    layout = table.layout
    if layout.has_hashes:
        removed = int(client.hdel(layout.rows_key(partition), *names))
    else:
        keys = [layout.row_key(partition, name) for name in names]
        removed = sum(int(client.delete(key)) for key in keys)
    if table.use() is not None:
        client.hdel(layout.uses_key(partition), *names)
    return removed
