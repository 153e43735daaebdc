"""Updates, deletions and refreshes reach the GPU caches, and failures leave no row."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import CacheError, DeviceError, TierUnavailableError, UpdateError
from hps_numba.runtime.gpu import table_cache as table_cache_module
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.models import ModelSet
from hps_numba.tiers.base import Tier
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, Wraps, versions
from tests.runtime.gpu.cached import (
    Held,
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

    def test_the_caches_of_all_devices_are_updated(self, tmp_path: Path) -> None:
        options = ALL | {"deployed_devices": [0, 1]}
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

    def test_a_fresh_session_sees_what_another_device_was_told(
        self, tmp_path: Path
    ) -> None:
        options = ALL | {"deployed_devices": [0, 1], "init_ec": False}
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
        self, tmp_path: Path, tier: str, late: bool
    ) -> None:
        server, tiers = failing_server(tmp_path, deployed_devices=[0, 1])
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
            for device in (0, 1):
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
        self, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ALL | {"deployed_devices": [0, 1]}
        with gpu_server(tmp_path, [ITEMS], **options) as server:

            def update(self: TableCache, keys: Any, rows: Any) -> int:
                if self.name == "gpu:1":
                    raise error("planted")
                return original(self, keys, rows)

            original = TableCache.update
            with monkeypatch.context() as patch:
                patch.setattr(TableCache, "update", update)
                with pytest.raises(UpdateError, match=r"0 of 2 keys.*planted"):
                    server.update("wdl", "items", [1, 2], rows_of([1, 2], 2))
            for device in (0, 1):
                assert not {1, 2} & set(cached_versions(server, "items", device))
                rows = server.session("wdl", device).lookup("items", [1, 2])
                assert rows.tolist() == rows_of([1, 2], 2).tolist()


class FreedAfter:
    """Lets a held set go when a cache has tried some writes."""

    def __init__(self, cache: TableCache, n_tries: int, number: int = 0) -> None:
        self.tries = 0
        self._n_tries = n_tries
        self._held = Held(cache, number)
        self._write = cache._write
        cache._write = self._try  # type: ignore[method-assign]

    def _try(self, *args: Any) -> Any:
        self.tries += 1
        if self.tries == self._n_tries:
            self._held.let_go()
        return self._write(*args)


class TestHeldSets:
    def test_an_update_tries_again_until_it_is_done(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            in_set = cache.keys_of(0, 1)
            assert 3 < in_set.size < 20
            freed = FreedAfter(cache, n_tries=3)
            keys = np.arange(20 + in_set.max())
            server.update("wdl", "items", keys, rows_of(keys, 2))
            held = cached_versions(server, "items")
        assert freed.tries >= 3
        assert {held[k] for k in in_set.tolist()} == {2}
        assert {held[k] for k in keys.tolist() if k < 300} == {2}

    def test_a_deletion_tries_again_until_it_is_done(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            in_set = cache.keys_of(0, 1)
            freed = FreedAfter(cache, n_tries=4)
            server.delete("wdl", "items", in_set)
            assert freed.tries == 4
            assert not set(in_set.tolist()) & set(cached_versions(server, "items"))
            assert cache.totals().rows == 300 - in_set.size

    def test_it_may_be_freed_by_another_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried, freed = threading.Event(), threading.Event()
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            (key, *_) = cache.keys_of(2, 1).tolist()
            held = Held(cache, 2)
            check = cache._check_patience

            def busy(*args: Any) -> None:
                tried.set()
                assert freed.wait(30)
                check(*args)

            monkeypatch.setattr(cache, "_check_patience", busy)
            rows = rows_of([key], 2)
            update = threading.Thread(
                target=server.update, args=("wdl", "items", [key], rows)
            )
            update.start()
            assert tried.wait(30)
            held.let_go()
            freed.set()
            update.join()
            assert cached_versions(server, "items")[key] == 2

    def test_a_refresh_and_a_reload_wait_too(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            for call in (
                lambda: server.refresh("wdl", "items"),
                lambda: server.reload("wdl", force=True),
            ):
                held, tries = Held(cache, 1), []
                check = cache._check_patience

                def busy(
                    *args: Any, held: Held = held, tries: list[int] = tries
                ) -> None:
                    tries.append(1)
                    if len(tries) == 3:
                        held.let_go()

                cache._check_patience = busy  # type: ignore[method-assign]
                call()
                cache._check_patience = check  # type: ignore[method-assign]
                assert len(tries) == 3
                assert cached_versions(server, "items") == all_cached()

    def test_a_set_that_stays_held_ends_the_patience(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(table_cache_module, "_PATIENCE_S", 0.05)
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            in_set = cache.keys_of(0, 1)
            held = Held(cache)
            rows = rows_of(in_set, 2)
            message = rf"{TAG}, gpu:0: {in_set.size} keys stay held after 0.05 s"
            with pytest.raises(UpdateError, match=message) as failed:
                server.update("wdl", "items", in_set, rows)
            assert isinstance(failed.value.__cause__, CacheError)
            assert "rows of a failed update were not evicted" in caplog.text
            # The tiers have the rows, and lookups find nothing in a held set.
            assert versions(server, in_set) == [2] * in_set.size
            for call in (
                lambda: cache.keys_of(0, 1),
                cache.clear,
                lambda: server.refresh("wdl", "items"),
            ):
                with pytest.raises(CacheError, match=r"1 sets stay held after 0.05 s"):
                    call()
            held.let_go()

    def test_lookups_do_not_wait_for_held_sets(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            in_set = cache.keys_of(0, 1)
            held = Held(cache)
            before = cache.totals()
            assert versions(server, ITEMS.keys) == [1] * 300
            after = cache.totals()
            held.let_go()
            assert after.misses - before.misses == in_set.size
            assert cached_versions(server, "items") == all_cached()


class Beneath:
    """The tiers of a server, to be changed without its knowledge."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.tiers: list[Tier] = []

        def keep(tier: Tier) -> Tier:
            self.tiers.append(tier)
            return tier

        self.server = gpu_server(root, [ITEMS, USERS], wrap_tier=keep, **options)

    def change(self) -> dict[int, int]:
        """Change rows of the last tier, and return what there is now."""
        last, tag = self.tiers[-1], TAG
        last.insert(tag, np.arange(0, 40), rows_of(np.arange(0, 40), 6))
        last.delete(tag, np.arange(40, 60))
        return {k: 6 if k < 40 else 1 for k in range(300) if not 40 <= k < 60}


class TestRefreshes:
    @pytest.mark.parametrize("host", [True, False], ids=["host", "no host"])
    def test_rows_that_changed_beneath_are_seen(
        self, tmp_path: Path, host: bool
    ) -> None:
        beneath = Beneath(tmp_path, host=host, **ALL)
        with beneath.server as server:
            now = beneath.change()
            assert cached_versions(server, "items") == all_cached()
            n_uppers = len(beneath.tiers) - 1
            assert server.refresh("wdl", "items") == len(now) * (1 + n_uppers)
            assert cached_versions(server, "items") == now
            assert versions(server, np.arange(300)) == [
                now.get(k, 0) for k in range(300)
            ]
            # Nothing changed: as many rows again, and the other table's if all are.
            assert server.refresh() == (len(now) + USERS.n_rows) * (1 + n_uppers)
            assert cached_versions(server, "items") == now

    def test_of_some_keys_the_others_stay_as_they_are(self, tmp_path: Path) -> None:
        beneath = Beneath(tmp_path, **ALL)
        with beneath.server as server:
            now = beneath.change()
            keys = [39, 38, 59, 58, 38, 200, 7000]
            # Three rows are replaced, two are gone, and one key was never there.
            assert server.refresh("wdl", "items", keys=keys) == 3
            wanted = all_cached() | {38: 6, 39: 6}
            del wanted[58], wanted[59]
            assert cached_versions(server, "items") == wanted
            asked = [*keys, 0, 41]
            assert versions(server, asked) == [6, 6, 0, 0, 6, 1, 0, 1, 1]
            assert server.refresh("wdl", "items", keys=np.arange(300)) == len(now)
            assert cached_versions(server, "items") == now

    @pytest.mark.parametrize(
        ("share", "block_rows", "step"),
        [
            pytest.param(0.2, 400, 5, id="a share"),
            pytest.param(0.0, 64, 2, id="as much as a block holds"),
            pytest.param(0.001, 64, 1, id="less than a set"),
        ],
    )
    def test_every_set_is_read_once_in_steps(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        share: float,
        block_rows: int,
        step: int,
    ) -> None:
        options = ALL | {"cache_refresh_percentage_per_iteration": share}
        beneath = Beneath(tmp_path, block_rows=block_rows, **options)
        steps: list[tuple[str, int, int]] = []
        original = TableCache.keys_of

        def keys_of(self: TableCache, first_set: int, n_sets: int) -> Any:
            steps.append((self.spec.name, first_set, n_sets))
            return original(self, first_set, n_sets)

        with beneath.server as server:
            n_sets = table_cache(server, "items").n_sets
            now = beneath.change()
            with monkeypatch.context() as patch:
                patch.setattr(TableCache, "keys_of", keys_of)
                server.refresh("wdl", "items")
            assert cached_versions(server, "items") == now
        assert n_sets == 25
        assert steps == [
            ("items", first, min(step, 25 - first)) for first in range(0, 25, step)
        ]

    def test_every_device_is_refreshed(self, tmp_path: Path) -> None:
        beneath = Beneath(tmp_path, **ALL | {"deployed_devices": [0, 1]})
        with beneath.server as server:
            now = beneath.change()
            assert server.refresh("wdl", "items") == 3 * len(now)
            for device in (0, 1):
                assert cached_versions(server, "items", device) == now

    def test_a_tier_that_fails_leaves_the_cache_as_it_was(self, tmp_path: Path) -> None:
        server, tiers = failing_server(tmp_path)
        with server:
            tiers["rocksdb"].fail("fetch")
            tiers["host"].fail("fetch")
            with pytest.raises(TierUnavailableError, match="fetch was made to fail"):
                server.refresh("wdl", "items")
            tiers["rocksdb"].heal()
            tiers["host"].heal()
            assert cached_versions(server, "items") == all_cached()


class Rounds:
    """Counts the refreshes of one table, and waits for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._done = threading.Semaphore(0)
        original = ModelSet.refresh

        def refresh(models: ModelSet, served: Any, table: Any) -> int:
            try:
                return original(models, served, table)
            finally:
                if table.spec.name == "items":
                    self._done.release()

        patch.setattr(ModelSet, "refresh", refresh)

    def wait(self, n: int = 1) -> None:
        """Wait for the end of so many more refreshes."""
        for _ in range(n):
            assert self._done.acquire(timeout=30)

    def wait_for_a_whole_one(self) -> None:
        """Wait for a refresh that begins from now on."""
        while self._done.acquire(blocking=False):
            pass
        self.wait(2)


TIMED = ALL | {"cache_refresh_percentage_per_iteration": 0.3, "refresh_interval": 0.005}


class TestTimer:
    def test_rows_that_changed_beneath_are_seen_by_themselves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rounds = Rounds(monkeypatch)
        beneath = Beneath(tmp_path, **TIMED)
        with beneath.server as server:
            now = beneath.change()
            rounds.wait_for_a_whole_one()
            assert cached_versions(server, "items") == now
            assert not threads_named("hps-refresh-dcn")
            assert len(threads_named("hps-refresh-wdl")) == 1
        assert not threads_named("hps-refresh-wdl")

    def test_a_failure_is_logged_and_the_next_one_is_tried(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        rounds = Rounds(monkeypatch)
        server, tiers = failing_server(tmp_path, **TIMED)
        with server:
            tiers["rocksdb"].fail("fetch")
            tiers["rocksdb"].wait_failed("fetch")
            tiers["rocksdb"].inner.insert(TAG, np.array([3]), rows_of([3], 8))
            tiers["rocksdb"].heal()
            rounds.wait_for_a_whole_one()
            assert cached_versions(server, "items") == all_cached() | {3: 8}
        assert "refresh of wdl failed: " in caplog.text

    @pytest.mark.parametrize(
        "missing", ["refresh_interval", "cache_refresh_percentage_per_iteration"]
    )
    def test_there_is_none_unless_both_are_set(
        self, tmp_path: Path, missing: str
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **TIMED | {missing: 0.0}):
            assert not threads_named("hps-refresh-wdl")


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]
