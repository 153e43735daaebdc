"""Updates, deletions and refreshes reach the GPU caches, and failures leave no row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import CacheError, DeviceError, TierUnavailableError, UpdateError
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, Wraps, versions
from tests.runtime.gpu.cached import (
    cached_versions,
    peek,
    table_cache,
)
from tests.runtime.gpu.gpu_servers import gpu_server
from tests.support.wrappers import FailingTier

pytestmark = pytest.mark.device

# Two tables of one group, and one of half precision. A cache has a place for each row.
ITEMS = Table("items", dim=4, n_rows=300, version=1, default=-1.0)
USERS = Table("users", dim=4, n_rows=60, version=2, default=0.5)
HALVES = Table("halves", dim=4, n_rows=120, version=5, default=-3.0, dtype="float16")
ALL = {"cache_size_percentage": 1.0}
TAG = "hps_et.wdl.items"


def rows_of(keys: Any, version: Any, dim: int = 4) -> Any:
    return versioned_rows(keys, version, dim)


def all_cached(version: int = ITEMS.version) -> dict[int, int]:
    return dict.fromkeys(range(ITEMS.n_rows), version)


class TestUpdates:
    def test_cached_rows_are_replaced_where_they_are(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS, USERS, HALVES], **ALL) as server:
            before = cached_versions(server, "users")
            for table in (ITEMS, HALVES):
                assert len(cached_versions(server, table.name)) == table.n_rows
                keys = table.keys[::3]  # more than a block of rows
                server.update("wdl", table.name, keys, rows_of(keys, 9))
                wanted = {k: table.version if k % 3 else 9 for k in table.keys.tolist()}
                assert cached_versions(server, table.name) == wanted
                assert versions(server, table.keys, table.name) == [*wanted.values()]
            assert cached_versions(server, "users") == before
            totals = table_cache(server, "items").totals()
        assert (totals.updated, totals.evicted, totals.misses) == (100, 0, 0)

    def test_keys_that_are_not_cached_stay_below_until_they_are_asked_for(
        self, tmp_path: Path
    ) -> None:
        options = ALL | {"init_ec": False}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            server.update("wdl", "items", [5, 1000], rows_of([5, 1000], 7))
            assert cached_versions(server, "items") == {}
            assert versions(server, [5, 1000, 6]) == [7, 7, 1]
            assert cached_versions(server, "items") == {5: 7, 1000: 7, 6: 1}

    def test_of_a_key_that_repeats_the_last_row_is_cached(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            keys = np.array([3, 4, 3, 4, 3])
            server.update("wdl", "items", keys, rows_of(keys, [2, 3, 4, 5, 6]))
            held = cached_versions(server, "items")
        assert (held[3], held[4], held[5]) == (6, 5, 1)

    def test_rows_that_are_not_finite_are_cached_bit_for_bit(
        self, tmp_path: Path
    ) -> None:
        rows = np.array([[np.nan, -np.inf, np.inf, -0.0]], np.float32)
        rows.view(np.uint32)[0, 0] = 0x7FC12345  # a NaN with a payload
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            server.update("wdl", "items", [8], rows)
            found = np.zeros(1, np.bool_)
            got = peek(server).lookup("items", [8], found=found)
            stats = server.stats().table("wdl", "items")
        assert found.all()
        assert got.tobytes() == rows.tobytes()
        assert stats.non_finite_rows == 1

    def test_the_caches_of_all_devices_are_updated(
        self, tmp_path: Path, two_devices: list[int]
    ) -> None:
        options = ALL | {"deployed_devices": two_devices}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            server.update("wdl", "items", [1, 2], rows_of([1, 2], 4))
            server.delete("wdl", "items", [2, 3])
            wanted = all_cached() | {1: 4}
            del wanted[2], wanted[3]
            for device in (0, 1):
                assert cached_versions(server, "items", device) == wanted
            tiers = server.stats().table("wdl", "items").tiers
        assert [use.tier for use in tiers] == ["gpu:0", "gpu:1", "host", "rocksdb"]
        assert [use.rows for use in tiers[:2]] == [298, 298]

    def test_a_device_sees_what_was_updated_while_another_was_asked(
        self, tmp_path: Path, two_devices: list[int]
    ) -> None:
        options = ALL | {"deployed_devices": two_devices, "init_ec": False}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            sessions = [server.session("wdl", device) for device in (0, 1)]
            for version in range(2, 6):
                for session in sessions:
                    seen = session.lookup("items", [7])
                    assert seen.tolist() == rows_of([7], version - 1).tolist()
                server.update("wdl", "items", [7], rows_of([7], version))


class TestDeletions:
    def test_deleted_keys_leave_the_cache_and_give_default_rows(
        self, tmp_path: Path
    ) -> None:
        with gpu_server(tmp_path, [ITEMS, HALVES], **ALL) as server:
            server.delete("wdl", "items", ITEMS.keys[::2])
            assert sorted(cached_versions(server, "items")) == [*range(1, 300, 2)]
            assert len(cached_versions(server, "halves")) == HALVES.n_rows
            found = np.ones(4, np.bool_)
            rows = server.lookup([0, 1, 2, 3], "wdl", "items", found=found)
            assert found.tolist() == [False, True, False, True]
            assert rows[:, 0].tolist() == [-1.0, 1.0, -1.0, 3.0]

    def test_keys_that_no_tier_knows_are_not_cached(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            server.delete("wdl", "items", [4])
            assert versions(server, [4, 5, 5000, 4]) == [0, 1, 0, 0]
            assert 4 not in cached_versions(server, "items")
            assert 5000 not in cached_versions(server, "items")
            # Deleted again, and back again.
            server.delete("wdl", "items", [4, 5000])
            server.update("wdl", "items", [4, 5000], rows_of([4, 5000], 3))
            assert versions(server, [4, 5000]) == [3, 3]
            held = cached_versions(server, "items")
        assert (held[4], held[5000]) == (3, 3)


def failing_server(root: Path, **options: Any) -> tuple[HPS, dict[str, Any]]:
    """Return a server that writes blocks of 50 rows, and its tiers, which can fail."""
    wraps = Wraps(FailingTier)
    server = gpu_server(root, [ITEMS], block_rows=50, wrap_tier=wraps, **ALL | options)
    tiers: dict[str, Any] = dict(wraps.tiers)
    return server, tiers


def stored_versions(tier: Tier) -> dict[int, int]:
    """Return the version of each key that a tier has."""
    found: dict[int, int] = {}
    for block in tier.iterate(TAG):
        found |= zip(block.keys.tolist(), block.rows[:, 1].astype(int), strict=True)
    return found


class TestFailures:
    @pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("tier", ["rocksdb", "host"])
    def test_a_tier_that_fails_leaves_no_row_in_caches_that_it_has_not(
        self, tmp_path: Path, devices: list[int], tier: str, late: bool
    ) -> None:
        server, tiers = failing_server(tmp_path, deployed_devices=devices)
        with server:
            keys = np.arange(120)
            insert, calls = tiers[tier].inner.insert, []

            def fail_the_second(*args: Any) -> None:
                calls.append(1)
                if len(calls) == 2 and not late:
                    raise TierUnavailableError("planted", tier=tier)
                insert(*args)
                if len(calls) == 2:
                    raise TierUnavailableError("planted", tier=tier)

            tiers[tier].inner.insert = fail_the_second
            with pytest.raises(UpdateError, match="50 of 120 keys were written"):
                server.update("wdl", "items", keys, rows_of(keys, 2))
            stored = stored_versions(tiers["rocksdb"].inner)
            for device in devices:
                held = cached_versions(server, "items", device)
                assert held == {k: v for k, v in stored.items() if k in held}
                # What was written, and what was not tried, is still there.
                assert [*range(50)] == [k for k in sorted(held) if k < 100]
                assert set(held) >= set(range(100, 300))
            assert versions(server, np.arange(300)) == [stored[k] for k in range(300)]

    def test_a_tier_that_fails_a_deletion_leaves_no_row_either(
        self, tmp_path: Path
    ) -> None:
        server, tiers = failing_server(tmp_path)
        with server:
            tiers["host"].fail("delete", times=1)  # RocksDB has done it by then
            with pytest.raises(UpdateError, match="0 of 3 keys"):
                server.delete("wdl", "items", [1, 2, 3])
            assert not {1, 2, 3} & set(cached_versions(server, "items"))
            assert versions(server, [1, 2, 3, 4]) == [0, 0, 0, 1]

    @pytest.mark.parametrize("error", [CacheError, DeviceError])
    def test_a_cache_that_fails_loses_the_rows_and_the_others_too(
        self,
        tmp_path: Path,
        error: type[Exception],
        devices: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        options = ALL | {"deployed_devices": devices}
        with gpu_server(tmp_path, [ITEMS], **options) as server:

            def update(self: TableCache, keys: Any, rows: Any) -> int:
                if self.name == f"gpu:{devices[-1]}":
                    raise error("planted")
                return original(self, keys, rows)

            original = TableCache.update
            with monkeypatch.context() as patch:
                patch.setattr(TableCache, "update", update)
                with pytest.raises(UpdateError, match=r"0 of 2 keys.*planted"):
                    server.update("wdl", "items", [1, 2], rows_of([1, 2], 2))
            for device in devices:
                assert not {1, 2} & set(cached_versions(server, "items", device))
                rows = server.session("wdl", device).lookup("items", [1, 2])
                assert rows.tolist() == rows_of([1, 2], 2).tolist()
