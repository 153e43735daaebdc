"""Streams reach the rows in GPU caches, where they are, and put no others there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hps_numba.runtime.hps import HPS
from tests.runtime.deployments import Table, versions
from tests.runtime.gpu.cached import cached_versions
from tests.runtime.gpu.gpu_servers import gpu_server
from tests.runtime.updates.servers import PATIENCE_S, NewSite, Site
from tests.support.redis_servers import wait_for

pytestmark = [pytest.mark.device, pytest.mark.service]

# A cache has a place for half of the rows; lookups answer from it what it has.
ITEMS = Table("items", dim=4, n_rows=300, version=1, default=-1.0)
HALVES = Table("halves", dim=4, n_rows=120, version=5, default=-3.0, dtype="float16")


def following(site: Site, root: Path) -> HPS:
    source = {"type": "kafka", "brokers": site.broker.bootstrap}
    return gpu_server(
        root,
        list(site.tables.values()),
        model_name=site.model,
        server={"update_source": source},
    )


def cached(site: Site, server: HPS, table: str = "items") -> dict[int, int]:
    return cached_versions(server, table, model=site.model)


def wait_applied(
    site: Site, server: HPS, table: str, *, rows: int, deletes: int = 0
) -> None:
    """Wait until so many records are everywhere, also in the cache."""

    def applied() -> bool:
        stream = site.stream(server, table)
        return (stream.rows, stream.deletes) == (rows, deletes)

    wait_for(applied, PATIENCE_S, what="records that are applied")


@pytest.mark.parametrize("table", [ITEMS, HALVES])
def test_cached_rows_are_replaced_and_no_others_come(
    new_site: NewSite, tmp_path: Path, table: Table
) -> None:
    site = new_site(tables=(table,))
    with following(site, tmp_path) as server:
        before = cached(site, server, table.name)
        assert 0 < len(before) < table.n_rows
        keys = np.concatenate([table.keys[::2], [1000, 1001]])
        site.send(keys, 9, table.name)
        expected = {k: 9 if k % 2 == 0 else v for k, v in before.items()}
        wait_applied(site, server, table.name, rows=keys.size)
        assert cached(site, server, table.name) == expected
        site.delete(table.keys[:10], table.name)
        for key in range(10):
            expected.pop(key, None)
        wait_applied(site, server, table.name, rows=keys.size, deletes=10)
        assert cached(site, server, table.name) == expected
        wanted = [0 if key < 10 else 9 for key in keys.tolist()]
        assert versions(server, keys, table.name, site.model) == wanted


def test_a_paused_stream_leaves_the_cache_alone(
    new_site: NewSite, tmp_path: Path
) -> None:
    site = new_site(tables=(ITEMS,))
    with following(site, tmp_path) as server:
        before = cached(site, server)
        server.updates.pause()
        site.send(ITEMS.keys, 2)
        assert not server.updates.catch_up(0.1)
        assert cached(site, server) == before
        server.updates.resume()
        wait_applied(site, server, "items", rows=ITEMS.n_rows)
        assert cached(site, server) == dict.fromkeys(before, 2)
