"""What lies in Redis, byte by byte, and that other programs read and write it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import ConfigError, TierCorruptionError
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, Mask, RowDtype, Rows, TableSpec
from tests.support.redis_servers import RedisServer

SPEC = TableSpec("wdl", "deep", 2)
MAX = (1 << 63) - 1
# Key, its partition of 16 by the hash rrxmrrxmsx_0, and its bytes.
PLACES = [
    (0, 0, b"\x00\x00\x00\x00\x00\x00\x00\x00"),
    (1, 3, b"\x01\x00\x00\x00\x00\x00\x00\x00"),
    (7, 7, b"\x07\x00\x00\x00\x00\x00\x00\x00"),
    (-1, 12, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    (123456789, 12, b"\x15\xcd\x5b\x07\x00\x00\x00\x00"),
    (1 << 40, 1, b"\x00\x00\x00\x00\x00\x01\x00\x00"),
    (-MAX - 1, 11, b"\x00\x00\x00\x00\x00\x00\x00\x80"),
    (MAX, 14, b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
]
KEYS = np.array([key for key, _, _ in PLACES], np.int64)
# 1.5 and -2 as they lie in memory.
ROW = {
    RowDtype.FLOAT32: b"\x00\x00\xc0\x3f\x00\x00\x00\xc0",
    RowDtype.FLOAT16: b"\x00\x3e\x00\xc0",
}

Open = Callable[..., RedisTier]


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return server.client()


@pytest.fixture
def open_tier(server: RedisServer) -> Iterator[Open]:
    """Open the table in a tier of its own, as another server would."""
    opened: list[RedisTier] = []

    def make(
        layout: RedisLayout, spec: TableSpec = SPEC, *, num_partitions: int = 16
    ) -> RedisTier:
        tier = RedisTier(
            RedisOptions(server.address), layout=layout, num_partitions=num_partitions
        )
        opened.append(tier)
        tier.open_table(spec)
        return tier

    yield make
    for tier in opened:
        tier.close()


def rows_for(spec: TableSpec, n_rows: int) -> Rows:
    return np.tile(np.array([1.5, -2.0], spec.numpy_dtype), (n_rows, 1))


def fetch(tier: RedisTier, spec: TableSpec, keys: Keys) -> tuple[Rows, Mask]:
    rows = np.zeros((keys.size, spec.dim), spec.numpy_dtype)
    found = np.zeros(keys.size, np.bool_)
    tier.fetch(spec.tag, keys, rows, found)
    return rows, found


def hashed(partition: int, kind: str = "v") -> bytes:
    return f"hps_et{{hps_et.wdl.deep/p{partition}}}{kind}".encode()


@pytest.mark.parametrize("dtype", list(RowDtype))
def test_strings_are_a_prefix_and_the_raw_key(
    open_tier: Open, client: redis.Redis, dtype: RowDtype
) -> None:
    spec = TableSpec("wdl", "deep", 2, dtype)
    tier = open_tier(RedisLayout.STRINGS, spec)
    tier.insert(spec.tag, KEYS, rows_for(spec, KEYS.size))
    names = {b"hps_et{hps_et.wdl.deep/p%d}%b" % (p, raw) for _, p, raw in PLACES}
    stamps = {hashed(p, "s") for p in range(16)}
    assert set(client.keys()) == names | stamps | {b"hps_et.tables"}
    assert {client.get(name) for name in names} == {ROW[dtype]}


@pytest.mark.parametrize("dtype", list(RowDtype))
def test_hashes_are_those_of_hugectr(
    open_tier: Open, client: redis.Redis, dtype: RowDtype
) -> None:
    spec = TableSpec("wdl", "deep", 2, dtype)
    tier = open_tier(RedisLayout.HASHES, spec)
    tier.insert(spec.tag, KEYS, rows_for(spec, KEYS.size))
    used = {p for _, p, _ in PLACES}
    stamps = {hashed(p, "s") for p in range(16)}
    assert set(client.keys()) == {hashed(p) for p in used} | stamps | {b"hps_et.tables"}
    for p in used:
        fields = {raw: ROW[dtype] for _, place, raw in PLACES if place == p}
        assert client.hgetall(hashed(p)) == fields


def test_what_hugectr_wrote_is_read(open_tier: Open, client: redis.Redis) -> None:
    for i, (_, p, raw) in enumerate(PLACES):
        client.hset(hashed(p), raw, struct.pack("<2f", i, -i))
        client.hset(hashed(p, "t"), raw, "3")  # number of uses
    tier = open_tier(RedisLayout.HASHES)
    rows, found = fetch(tier, SPEC, np.append(KEYS, [5, -5]))
    assert found.tolist() == [True] * len(PLACES) + [False] * 2
    assert rows[found].tolist() == [[i, -i] for i in range(len(PLACES))]
    assert tier.size(SPEC.tag) == len(PLACES)
    listed = np.concatenate([block.keys for block in tier.iterate(SPEC.tag)])
    assert sorted(listed.tolist()) == sorted(KEYS.tolist())


def test_hugectr_reads_what_was_written(open_tier: Open, client: redis.Redis) -> None:
    tier = open_tier(RedisLayout.HASHES)
    keys = np.arange(-3000, 3000, dtype=np.int64)
    rows = np.random.default_rng(0).random((keys.size, 2), np.float32)
    tier.insert(SPEC.tag, keys, rows)
    tier.delete(SPEC.tag, keys[::2].copy())
    raw = [key.tobytes() for key in keys]
    read = [client.hmget(hashed(p), raw) for p in range(16)]
    assert sum(client.hlen(hashed(p)) for p in range(16)) == keys.size // 2
    for i, values in enumerate(zip(*read, strict=True)):
        there = [value for value in values if value is not None]
        assert there == ([rows[i].tobytes()] if i % 2 else [])


def test_fields_of_four_bytes_are_not_listed(
    open_tier: Open, client: redis.Redis
) -> None:
    tier = open_tier(RedisLayout.HASHES)
    tier.insert(SPEC.tag, KEYS, rows_for(SPEC, KEYS.size))
    client.hset(hashed(0), b"\x01\x00\x00\x00", ROW[RowDtype.FLOAT32])
    (block,) = [b for b in tier.iterate(SPEC.tag) if 0 in b.keys]
    assert block.keys.tolist() == [0]


@pytest.mark.parametrize("layout", list(RedisLayout))
@pytest.mark.parametrize(
    ("spec", "num_partitions", "said"),
    [
        (SPEC, 8, "dim 2, float32, 8 partitions"),
        (TableSpec("wdl", "deep", 3), 16, "dim 3, float32, 16 partitions"),
        (TableSpec("wdl", "deep", 2, RowDtype.FLOAT16), 16, "dim 2, float16"),
    ],
)
def test_another_shape_is_refused_and_both_are_named(
    open_tier: Open,
    layout: RedisLayout,
    spec: TableSpec,
    num_partitions: int,
    said: str,
) -> None:
    open_tier(layout).insert(SPEC.tag, KEYS, rows_for(SPEC, KEYS.size))
    with pytest.raises(ConfigError) as raised:
        open_tier(layout, spec, num_partitions=num_partitions)
    assert (
        f"stored in Redis with dim 2, float32, 16 partitions, layout {layout.value}"
        in (str(raised.value))
    )
    assert f"cannot be opened with {said}" in str(raised.value)
    rows, found = fetch(open_tier(layout), SPEC, KEYS)
    assert found.all()
    assert rows.tolist() == [[1.5, -2.0]] * KEYS.size


@pytest.mark.parametrize("layout", list(RedisLayout))
def test_another_layout_is_refused_and_both_are_named(
    open_tier: Open, layout: RedisLayout
) -> None:
    open_tier(layout)
    (other,) = set(RedisLayout) - {layout}
    with pytest.raises(ConfigError) as raised:
        open_tier(other)
    assert f"layout {layout.value}; it cannot be" in str(raised.value)
    assert f"layout {other.value}. Drop the table first" in str(raised.value)


@pytest.mark.parametrize("layout", list(RedisLayout))
def test_a_dropped_table_may_have_another_shape(
    open_tier: Open, client: redis.Redis, layout: RedisLayout
) -> None:
    tier = open_tier(layout)
    tier.insert(SPEC.tag, KEYS, rows_for(SPEC, KEYS.size))
    tier.drop_table(SPEC.tag)
    assert client.keys() == []
    (other,) = set(RedisLayout) - {layout}
    spec = TableSpec("wdl", "deep", 5)
    again = open_tier(other, spec, num_partitions=3)
    rows = np.ones((KEYS.size, 5), np.float32)
    again.insert(spec.tag, KEYS, rows)
    np.testing.assert_array_equal(fetch(again, spec, KEYS)[0], rows)


@pytest.mark.parametrize("layout", list(RedisLayout))
def test_a_row_of_another_width_is_named(
    open_tier: Open, client: redis.Redis, layout: RedisLayout
) -> None:
    tier = open_tier(layout)
    tier.insert(SPEC.tag, KEYS, rows_for(SPEC, KEYS.size))
    _, p, raw = PLACES[2]
    if layout is RedisLayout.HASHES:
        client.hset(hashed(p), raw, b"twelve bytes")
    else:
        client.set(hashed(p, "") + raw, b"twelve bytes")
    with pytest.raises(TierCorruptionError, match="key 7 has 12 bytes"):
        fetch(tier, SPEC, KEYS)
