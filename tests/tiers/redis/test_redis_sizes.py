"""Rows take as much memory of a cluster as is estimated and documented."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hps_numba.config.enums import OverflowPolicy, RedisLayout
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.sizes import row_bytes
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import RowBlock, TableSpec
from tests.support.redis_cluster import RedisCluster

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
DIMS = (16, 32, 128)
LAYOUTS = (RedisLayout.STRINGS, RedisLayout.HASHES)
N_ROWS = 24 * 3072  # hash tables of keys and of rows are three quarters full


def used_bytes(cluster: RedisCluster) -> int:
    used = 0
    for node in cluster.nodes:
        with node.client() as client:
            used += client.info("memory")["used_memory"]
    return used


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noted", [False, True])
def test_a_row_takes_what_is_estimated(
    cluster: RedisCluster, layout: RedisLayout, noted: bool
) -> None:
    spec = TableSpec("wdl", "deep", 32)
    overflow = Overflow(OverflowPolicy.EVICT_OLDEST, margin=N_ROWS, target=0.9)
    keys = np.arange(N_ROWS)
    rows = np.zeros((N_ROWS, spec.dim), np.float32)
    before = used_bytes(cluster)
    with closing(
        RedisTier(
            RedisOptions(cluster.address),
            layout=layout,
            num_partitions=24,
            overflow=overflow if noted else Overflow(),
        )
    ) as tier:
        tier.open_table(spec)
        tier.load(spec.tag, [RowBlock(keys, rows)])
    each = (used_bytes(cluster) - before) / N_ROWS
    assert each == pytest.approx(row_bytes(spec, layout, notes_uses=noted), rel=0.08)


@pytest.mark.parametrize("noted", [False, True])
def test_the_page_has_the_estimates(noted: bool) -> None:
    told = [
        " / ".join(
            str(row_bytes(TableSpec("wdl", "deep", dim), layout, notes_uses=noted))
            for dim in DIMS
        )
        for layout in LAYOUTS
    ]
    head = "the same with" if noted else "bytes a row, dim 16 / 32 / 128"
    line = re.search(rf"^\| {head}.*$", PAGE, re.MULTILINE)
    assert line is not None
    assert [cell.strip() for cell in line[0].split("|")[2:4]] == told
