"""Lookups that do not wait for missing rows, and lookups beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ClosedError, DeviceError
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.gpu.deferred import DeferredInsert
from hps_numba.runtime.gpu.table_cache import TableCache
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.session import LookupSession
from tests.runtime.deployments import Table, Wraps
from tests.runtime.gpu.foreign import uploaded
from tests.runtime.gpu.gpu_servers import (
    ITEMS,
    SHOPS,
    USERS,
    downloaded,
    gpu_server,
    known,
    rows_for,
    settle,
    some_keys,
    streams,
)
from tests.support.gates import StopPoints
from tests.support.wrappers import FailingTier, GatedTier

pytestmark = pytest.mark.device

N_GONE = 100  # the first keys of each table: stored, and not cached


@contextmanager
def partly_cached(root: Path, threshold: float, **options: Any) -> Iterator[HPS]:
    """Give a server whose caches have all rows but the first ones of each table."""
    tables, gone = (ITEMS, USERS), np.arange(N_GONE)
    with gpu_server(
        root,
        tables,
        block_rows=28,
        hit_rate_threshold=threshold,
        cache_size_percentage=1.0,
        **options,
    ) as server:
        for table in tables:
            server.delete("wdl", table.name, gone)
            server.update("wdl", table.name, gone, table.rows[:N_GONE])
        yield server


def asked(n_hits: int, n_missing: int, *, repeat: Sequence[int] = (1, 1)) -> Any:
    """Return keys of which so many are cached and not, each of them repeated."""
    hits = np.arange(N_GONE, N_GONE + n_hits).repeat(repeat[0])
    missing = np.arange(n_missing).repeat(repeat[1])
    keys = np.concatenate([hits, missing])
    return np.random.default_rng(n_hits).permutation(keys)


def given_up(table: Table, keys: Any) -> Any:
    """Return the rows of a lookup that fetches nothing."""
    return np.where(keys[:, None] < N_GONE, table.default, rows_for(table, keys))


class TestThresholds:
    @pytest.mark.parametrize(
        ("threshold", "keys", "deferred"),
        [
            (0.0, asked(0, 40), True),
            (0.0, asked(40, 1), True),
            (0.5, asked(20, 20), True),
            (0.5, asked(19, 20), False),
            (0.5, asked(10, 20, repeat=(9, 1)), False),  # unique keys count
            (0.5, asked(20, 10, repeat=(1, 9)), True),
            (0.75, asked(60, 20), True),
            (0.75, asked(59, 20), False),
            (1.0, asked(99, 1), False),
            (1.1, asked(99, 1), False),
        ],
    )
    def test_default_rows_come_from_the_threshold_on(
        self, tmp_path: Path, gpu: Gpu, threshold: float, keys: Any, deferred: bool
    ) -> None:
        wanted, n_missing = rows_for(ITEMS, keys), int((keys < N_GONE).sum())
        with partly_cached(tmp_path, threshold) as server:
            session = server.session("wdl")
            found = np.zeros(keys.size, np.bool_)
            rows = session.lookup("items", keys, found=found)
            first = given_up(ITEMS, keys) if deferred else wanted
            assert np.array_equal(rows, first)
            assert np.array_equal(found, keys >= N_GONE if deferred else keys >= 0)
            stats = server.stats().table("wdl", "items")
            assert stats.deferred == n_missing * deferred
            assert stats.defaults == 0
            server.drain()
            settle(gpu)
            given = uploaded(gpu, keys)
            rows = session.lookup("items", given, found=found)
            assert np.array_equal(downloaded(gpu, rows), wanted)
            assert found.all()
            stats = server.stats().table("wdl", "items")
            use = stats.tiers[0]
            assert (use.asked, use.hits) == (2 * keys.size, 2 * keys.size - n_missing)
            assert stats.deferred == n_missing * deferred
            n_unique = np.unique(keys[keys < N_GONE]).size
            done = server.stats().deferred
            assert done.stored_rows == n_unique * deferred
            assert (done.queued_rows, done.dropped_rows, done.refused_rows) == (0, 0, 0)
            all_unique = np.unique(keys).size
            if 0 < threshold < 1:
                assert use.unique_asked == 2 * all_unique
                assert use.unique_hits == 2 * all_unique - n_unique
            else:
                assert (use.unique_asked, use.unique_hits) == (0, 0)

    def test_each_table_of_a_lookup_has_its_own_rate(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        many, few = asked(30, 10), asked(10, 30)
        with partly_cached(tmp_path, 0.6) as server:
            found = {n: np.zeros(40, np.bool_) for n in ("items", "users")}
            rows = server.session("wdl").lookup(
                {"items": uploaded(gpu, many), "users": few}, found=found
            )
            got = downloaded(gpu, rows["items"])
            assert np.array_equal(got, given_up(ITEMS, many))
            assert np.array_equal(found["items"], many >= N_GONE)
            assert np.array_equal(rows["users"], rows_for(USERS, few))
            assert found["users"].all()
            stats = server.stats()
            assert stats.table("wdl", "items").deferred == 10
            assert stats.table("wdl", "users").deferred == 0

    def test_keys_that_no_tier_knows_are_deferred_again(self, tmp_path: Path) -> None:
        keys = np.concatenate([np.arange(N_GONE, N_GONE + 9), [-77, 1234, 1234]])
        with partly_cached(tmp_path, 0.5) as server:
            cached = server.stats().table("wdl", "items").tiers[0].rows
            for n in (1, 2):
                found = np.ones(keys.size, np.bool_)
                rows = server.lookup(keys, "wdl", "items", found=found)
                assert np.array_equal(rows, rows_for(ITEMS, keys))
                assert np.array_equal(found, known(ITEMS, keys))
                server.drain()
                stats = server.stats()
                assert stats.table("wdl", "items").deferred == 3 * n
                assert stats.table("wdl", "items").tiers[0].rows == cached
                assert stats.deferred.refused_rows == 2 * n

    def test_what_finds_no_room_in_the_queue_is_dropped_and_counted(
        self, tmp_path: Path
    ) -> None:
        keys, room = asked(40, 20), {"backfill_queue_bytes": 19 * 8}
        with partly_cached(tmp_path, 0.5, server=room) as server:
            for n in (1, 2):
                rows = server.lookup(keys, "wdl", "items")
                assert np.array_equal(rows, given_up(ITEMS, keys))
                server.drain()
                stats = server.stats()
                assert stats.table("wdl", "items").deferred == 20 * n
                assert stats.deferred.dropped_rows == 20 * n
                assert stats.deferred.stored_rows == 0
            rows = server.lookup(keys[keys != 3], "wdl", "items")
            server.drain()
            assert server.stats().deferred.stored_rows == 19

    def test_keys_that_are_deleted_meanwhile_stay_deleted(self, tmp_path: Path) -> None:
        keys = asked(40, 20)
        with partly_cached(tmp_path, 0.5) as server:
            server.lookup(keys, "wdl", "items")
            server.delete("wdl", "items", np.arange(5))
            server.drain()
            found = np.ones(keys.size, np.bool_)
            rows = server.lookup(keys, "wdl", "items", found=found)
            assert np.array_equal(found, keys >= 5)
            assert np.array_equal(rows[found], rows_for(ITEMS, keys[found]))
            assert (rows[~found] == ITEMS.default).all()

    def test_deferred_keys_are_those_of_their_lookup(self, tmp_path: Path) -> None:
        """However many lookups of the same lane come before they are fetched."""
        stops = StopPoints()
        options = {
            "host": False,
            "wrap_tier": Wraps(lambda tier: GatedTier(tier, stops)),
            "number_of_worker_buffers_in_pool": 1,
        }
        lookups = [np.arange(low, low + 30) for low in (0, 30, 60)]
        hits = np.arange(N_GONE, N_GONE + 90)
        with partly_cached(tmp_path, 0.5, **options) as server:
            stops.arm("rocksdb.fetch")
            for missing in lookups:
                server.lookup(np.concatenate([missing, hits]), "wdl", "items")
                stops.wait_held("rocksdb.fetch")
            stops.release("rocksdb.fetch")
            server.drain()
            keys = np.concatenate([*lookups, hits])
            found = np.zeros(keys.size, np.bool_)
            rows = server.lookup(keys, "wdl", "items", found=found)
            assert np.array_equal(rows, rows_for(ITEMS, keys))
            assert found.all()
            assert server.stats().table("wdl", "items").deferred == 90

    def test_a_deferred_fetch_that_fails_is_logged_and_fails_no_lookup(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        keys, wraps = asked(40, 20), Wraps(FailingTier)
        with partly_cached(tmp_path, 0.5, host=False, wrap_tier=wraps) as server:
            broken = wraps.tiers["rocksdb"]
            assert isinstance(broken, FailingTier)
            broken.fail("fetch")
            rows = server.lookup(keys, "wdl", "items")
            assert np.array_equal(rows, given_up(ITEMS, keys))
            server.drain()
            assert "fetch was made to fail" in caplog.text
            assert server.stats().deferred.failed_rows == 20
            broken.heal()
            rows = server.lookup(keys, "wdl", "items")
            assert np.array_equal(rows, given_up(ITEMS, keys))
            server.drain()
            rows = server.lookup(keys, "wdl", "items")
            assert np.array_equal(rows, rows_for(ITEMS, keys))
            assert server.stats().table("wdl", "items").errors == 0


class TestThreads:
    @staticmethod
    def work(
        session: LookupSession, gpu: Gpu, tables: Sequence[Table], seed: int, n: int
    ) -> int:
        """Look random mixtures up and return how many were right."""
        rng = np.random.default_rng(seed)
        n_right = 0
        with streams(gpu, 1) as (mine,):
            for _ in range(n):
                stream = mine if rng.random() < 0.5 else None
                chosen = [t for t in tables if rng.random() < 0.7]
                plain = {
                    t.name: some_keys(rng, t, int(rng.integers(0, 120))) for t in chosen
                }
                keys = {
                    name: uploaded(gpu, k, mine) if rng.random() < 0.5 else k
                    for name, k in plain.items()
                }
                found = {n: np.zeros(k.size, np.bool_) for n, k in plain.items()}
                rows = session.lookup(keys, found=found, stream=stream)
                for table in chosen:
                    got = rows[table.name]
                    if not isinstance(got, np.ndarray):
                        got = downloaded(gpu, got, stream or 0)
                    asked = plain[table.name]
                    assert np.array_equal(got, rows_for(table, asked))
                    assert np.array_equal(found[table.name], known(table, asked))
                    n_right += 1
                del rows
        return n_right

    def test_more_threads_than_lanes_share_a_session(
        self, tmp_path: Path, gpu: Gpu, threads: ThreadPoolExecutor
    ) -> None:
        tables = (ITEMS, USERS, SHOPS)
        with gpu_server(
            tmp_path, tables, block_rows=28, cache_size_percentage=0.2
        ) as server:
            session = server.session("wdl")
            jobs = [
                threads.submit(self.work, session, gpu, tables, seed, 25)
                for seed in range(6)
            ]
            assert sum(job.result() for job in jobs) > 200
            stats = server.stats()
        assert all(stats.table("wdl", t.name).errors == 0 for t in tables)

    def test_closing_waits_for_lookups_and_refuses_others(
        self, tmp_path: Path, gpu: Gpu, threads: ThreadPoolExecutor
    ) -> None:
        server = gpu_server(
            tmp_path, (ITEMS, USERS), block_rows=28, cache_size_percentage=0.2
        )
        session, together = server.session("wdl"), Barrier(5)

        def run(seed: int) -> int:
            n_right = self.work(session, gpu, (ITEMS, USERS), seed, 1)
            together.wait(30)
            try:
                for more in range(1000):
                    n_right += self.work(session, gpu, (ITEMS, USERS), more, 1)
            except ClosedError:
                return n_right
            raise AssertionError("the server never closed")

        jobs = [threads.submit(run, seed) for seed in range(4)]
        together.wait(30)
        server.close()
        assert all(job.result() >= 0 for job in jobs)
        with pytest.raises(ClosedError):
            session.lookup("items", uploaded(gpu, [1]))


def test_keys_that_several_lookups_miss_are_fetched_once(tmp_path: Path) -> None:
    with partly_cached(tmp_path, 0.1) as server:
        cache = server._models["wdl"].caches[0].tables["hps_et.wdl.items"]
        table = server._models["wdl"].table("items")
        keys = np.arange(40)
        jobs = [DeferredInsert(cache, table, keys[:n].copy()) for n in (30, 40, 20)]
        asked = server.stats().table("wdl", "items").tiers[1].asked
        assert [job.store() for job in jobs] == [30, 40, 20]
        asked = server.stats().table("wdl", "items").tiers[1].asked - asked
        assert asked == 40
        # Whoever asks later may have to be brought them again.
        server.delete("wdl", "items", keys[:5])
        server.update("wdl", "items", keys[:5], ITEMS.rows[:5])
        assert DeferredInsert(cache, table, keys[:5].copy()).store() == 5
        rows = server.session("wdl").lookup("items", keys)
        assert (rows == ITEMS.rows[:40]).all()


def test_a_device_that_fails_leaves_the_other_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: TableCache) -> None:
        raise DeviceError("the device is lost")

    with gpu_server(tmp_path, [ITEMS]) as server:
        server.session("wdl").lookup("items", np.arange(10))
        monkeypatch.setattr(TableCache, "totals", fail)
        cache, host, *_ = server.stats().table("wdl", "items").tiers
    assert (cache.tier, cache.asked, cache.rows) == ("gpu:0", 0, 0)
    assert host.rows == len(ITEMS.keys)
    assert "the device is lost" in caplog.text
