"""Refreshes of GPU caches, and sets that others hold."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import CacheError, TierUnavailableError, UpdateError
from hps_numba.kernels.host.hashing import hash_key
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
    table_cache,
)
from tests.runtime.gpu.gpu_servers import gpu_server
from tests.support.wrappers import FailingTier

pytestmark = pytest.mark.device

ITEMS = Table("items", dim=4, n_rows=300, version=1, default=-1.0)
USERS = Table("users", dim=4, n_rows=60, version=2, default=0.5)
ALL = {"cache_size_percentage": 1.0}
TAG = "hps_et.wdl.items"


def rows_of(keys: Any, version: Any) -> Any:
    return versioned_rows(keys, version, ITEMS.dim)


def all_cached(version: int = ITEMS.version) -> dict[int, int]:
    return dict.fromkeys(range(ITEMS.n_rows), version)


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
            freed = FreedAfter(cache, n_tries=3)
            # A block in which they are not the first ones, and more blocks.
            keys = np.arange(64, 320)
            in_set = in_set[in_set >= 64]
            assert 64 not in in_set
            assert (in_set < 128).sum() > 1
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
            # Those whose home set is held are not looked for in their second one.
            at_home = {
                key
                for key in ITEMS.keys.tolist()
                if int(hash_key(key)) * cache.n_sets >> 64 == 0
            }
            hidden = set(in_set.tolist()) | at_home
            assert after.misses - before.misses == len(hidden)
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
            pytest.param(0.4, 400, 5, id="a share"),
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
        assert n_sets == 13
        assert steps == [
            ("items", first, min(step, 13 - first)) for first in range(0, 13, step)
        ]

    def test_every_device_is_refreshed(
        self, tmp_path: Path, two_devices: list[int]
    ) -> None:
        beneath = Beneath(tmp_path, **ALL | {"deployed_devices": two_devices})
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


def failing_server(root: Path, **options: Any) -> tuple[HPS, dict[str, Any]]:
    """Return a server that writes blocks of 50 rows, and its tiers, which can fail."""
    wraps = Wraps(FailingTier)
    server = gpu_server(root, [ITEMS], block_rows=50, wrap_tier=wraps, **ALL | options)
    tiers: dict[str, Any] = dict(wraps.tiers)
    return server, tiers


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
