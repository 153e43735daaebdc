"""Listing the keys of a table, and counting them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import redis

from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.layout import KEY_BYTES, Layout
from hps_numba.tiers.redis.topology import Node, Topology
from hps_numba.types import TAG_PREFIX, Keys

_PER_CALL = 4096
_SAMPLES = 64  # of a server's keys, to estimate how many are a table's
_GLOB = b"\\*?[]"


Step = Callable[[], None]
"""Called after each of the many calls to a server that a list takes."""


def keys_of(
    topology: Topology, layout: Layout, step: Step = lambda: None
) -> Iterator[Keys]:
    """Yield the keys of a table, each once: partition by partition, if rows are fields.

    Of rows that are strings all keys are listed before the first are yielded, 8 bytes
    each.
    """
    with map_exceptions(layout.spec.tag):
        if layout.has_hashes:
            for partition in range(layout.n_partitions):
                yield _fields(topology.client, layout.rows_key(partition), step)
        else:
            listed = [_strings(node, layout, step) for node in topology.masters()]
            yield np.unique(np.concatenate(listed))


def all_keys(topology: Topology, layout: Layout, step: Step = lambda: None) -> Keys:
    """Return the keys of a table, each once."""
    return np.concatenate(list(keys_of(topology, layout, step)))


def count(topology: Topology, layout: Layout) -> int:
    """Return the exact number of rows."""
    if not layout.has_hashes:
        return sum(keys.size for keys in keys_of(topology, layout))
    with map_exceptions(layout.spec.tag):
        return sum(
            int(topology.client.hlen(layout.rows_key(p)))
            for p in range(layout.n_partitions)
        )


def estimate(topology: Topology, layout: Layout) -> int:
    """Return about how many rows there are, from a sample of each server's keys."""
    if layout.has_hashes:
        return count(topology, layout)
    total = 0.0
    for node in topology.masters():
        pipe = redis.Redis(connection_pool=node.pool).pipeline(transaction=False)
        pipe.dbsize()
        for _ in range(_SAMPLES):
            pipe.randomkey()
        with map_exceptions(layout.spec.tag, node=node.name):
            size, *names = pipe.execute()
        mine = sum(_is_row(name, layout) for name in names if name is not None)
        total += size * mine / _SAMPLES
    return round(total)


def _fields(client: redis.Redis | redis.RedisCluster, name: bytes, step: Step) -> Keys:
    fields: set[bytes] = set()
    cursor: int = 0
    some: Any
    while True:
        cursor, some = client.hscan(name, cursor, count=_PER_CALL)
        # HugeCTR has 4-byte keys as well, in tables of its own.
        fields.update(name for name in some if len(name) == KEY_BYTES)
        step()
        if cursor == 0:
            break
    return np.frombuffer(b"".join(fields), "<i8").astype(np.int64)


def _strings(node: Node, layout: Layout, step: Step) -> Keys:
    server = redis.Redis(connection_pool=node.pool)
    stem = f"{TAG_PREFIX}{{{layout.spec.tag}/p".encode()
    pattern = b"".join(b"\\%c" % c if c in _GLOB else b"%c" % c for c in stem) + b"*"
    found: list[bytes] = []
    cursor: int = 0
    names: Any
    while True:
        with map_exceptions(layout.spec.tag, node=node.name):
            cursor, names = server.scan(cursor, match=pattern, count=_PER_CALL)
        found.append(b"".join(n[-KEY_BYTES:] for n in names if _is_row(n, layout)))
        step()
        if cursor == 0:
            break
    return np.frombuffer(b"".join(found), "<i8").astype(np.int64)


def _is_row(name: bytes, layout: Layout) -> bool:
    """Whether a key names a row of the table: a prefix and 8 bytes."""
    stem = name[:-KEY_BYTES]
    return stem in layout.known_prefixes
