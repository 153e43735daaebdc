"""A table in Redis as its layout describes it, read and written by redis-py alone."""

from __future__ import annotations

from types import TracebackType

import redis
from typing_extensions import Self

from hps_numba.config.enums import RedisLayout

MASK = (1 << 64) - 1


def partition_of(key: int, n_partitions: int) -> int:
    """Return the partition of a key as HugeCTR's hash gives it."""
    x = key & MASK
    x ^= _rotated(x, 25) ^ _rotated(x, 50)
    x = x * 0xA24BAED4963EE407 & MASK
    x ^= _rotated(x, 24) ^ _rotated(x, 49)
    x = x * 0x9FB21C651E98DF25 & MASK
    return (x ^ x >> 28) % n_partitions


def _rotated(x: int, n_bits: int) -> int:
    return (x >> n_bits | x << 64 - n_bits) & MASK


class StoredTable:
    """The keys of one table in a single server."""

    def __init__(
        self, address: str, tag: str, layout: RedisLayout, n_partitions: int
    ) -> None:
        host, port = address.split(":")
        self.client = redis.Redis(host=host, port=int(port))
        self._tag, self._layout, self._n_partitions = tag, layout, n_partitions

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def put(self, key: int, row: bytes) -> None:
        """Store one row."""
        prefix, raw = self._place(key)
        if self._layout is RedisLayout.HASHES:
            self.client.hset(prefix + b"v", raw, row)
        else:
            self.client.set(prefix + raw, row)

    def get(self, key: int) -> bytes | None:
        """Return one row."""
        prefix, raw = self._place(key)
        if self._layout is RedisLayout.HASHES:
            return self.client.hget(prefix + b"v", raw)
        return self.client.get(prefix + raw)

    def _place(self, key: int) -> tuple[bytes, bytes]:
        partition = partition_of(key, self._n_partitions)
        prefix = b"hps_et{%s/p%d}" % (self._tag.encode(), partition)
        return prefix, (key % (1 << 64)).to_bytes(8, "little")
