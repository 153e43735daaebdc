"""Rows of 2 bytes and of 16 KB, one partition and a thousand, all kinds of keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.bodies import Work
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.layout import Layout
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import RowDtype, TableSpec
from tests.support.redis_servers import RedisServer

LIMITS = np.iinfo(np.int64)
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer({"proto-max-bulk-len": "5mb"}) as server:
        yield server


@pytest.mark.parametrize("layout", list(RedisLayout))
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("num_partitions", [1, 1000])
@pytest.mark.parametrize(("dim", "n_keys"), [(1, 4000), (4096, 1100)])
def test_rows_of_every_size_and_spread_come_back_whole(
    server: RedisServer,
    layout: RedisLayout,
    protocol: int,
    num_partitions: int,
    dim: int,
    n_keys: int,
) -> None:
    dtype = RowDtype.FLOAT16 if dim == 1 else RowDtype.FLOAT32
    spec = TableSpec("model", "table", dim, dtype)
    keys = np.arange(n_keys, dtype=np.int64)
    keys[:4] = LIMITS.min, LIMITS.min + 1, -1, LIMITS.max
    rows = np.random.default_rng(0).random((n_keys, dim)).astype(spec.numpy_dtype)
    options = RedisOptions(server.address, protocol=protocol, timeout_s=10.0)
    with closing(
        RedisTier(options, num_partitions=num_partitions, layout=layout)
    ) as tier:
        tier.open_table(spec)

        def assert_stored() -> None:
            for n in (n_keys, 1, 0):
                out, found = np.zeros_like(rows[:n]), np.zeros(n, np.bool_)
                assert tier.fetch(spec.tag, keys[:n], out, found) == n
                np.testing.assert_array_equal(out, rows[:n])

        tier.insert(spec.tag, keys, rows)
        assert_stored()
        assert tier.evict(spec.tag) == n_keys
        epoch = tier.epoch(spec.tag)
        assert tier.backfill(spec.tag, keys, rows, epoch) == n_keys
        assert_stored()
        assert sum(map(len, tier.iterate(spec.tag, block_rows=300))) == n_keys
        assert tier.size(spec.tag) == n_keys
        tier.drop_table(spec.tag)
        with server.client() as client:
            assert client.dbsize() == 0


@pytest.mark.parametrize(
    ("row_bytes", "rows_per_piece"),
    [(2, 1024), (4096, 1024), (16_384, 256), (3 * MIB, 1), (9 * MIB, 1)],
)
def test_a_server_is_not_kept_busy_by_one_piece_of_wide_rows(
    row_bytes: int, rows_per_piece: int
) -> None:
    n_keys = 2500
    spec = TableSpec("model", "table", dim=4)
    layout = Layout(spec, RedisLayout.STRINGS, n_partitions=2)
    table = RedisTable(layout, [0, 0], [[b"1", b""]] * 2, Overflow())
    order, bounds = np.arange(n_keys), np.array([0, 1100, n_keys])
    rows = np.broadcast_to(np.zeros(1, np.uint8), (n_keys, row_bytes))
    pieces = Work(table, order, rows, order, bounds).pieces()
    sizes = [high - low for _, low, high in pieces]
    assert max(sizes) == rows_per_piece
    covered = [(p, i) for p, low, high in pieces for i in range(low, high)]
    assert sorted(covered) == [(int(i >= 1100), i) for i in range(n_keys)]
    deleted = Work(table, order, None, order, bounds).pieces()
    assert max(high - low for _, low, high in deleted) == 1024
