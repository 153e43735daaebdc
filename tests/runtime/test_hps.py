"""Writing, refreshing, telling, failing and closing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hps_numba.errors import ClosedError, TierUnavailableError, UpdateError
from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import (
    ITEMS,
    NOBODY,
    Table,
    Wraps,
    gated,
    model,
    server_config,
    versions,
    write_table,
)
from tests.support.gates import StopPoints
from tests.support.wrappers import FailingTier


class TestWriting:
    def test_an_update_is_seen_by_the_next_lookup(self, server: HPS) -> None:
        keys = np.array([5, 2000, 7])
        server.update("wdl", "items", keys, versioned_rows(keys, 3, ITEMS.dim))
        assert versions(server, [5, 6, 7, 2000]) == [3, 1, 3, 3]
        assert server.stats().table("wdl", "items").updated_rows == 3

    def test_of_a_repeated_key_the_last_row_counts(self, server: HPS) -> None:
        keys = np.array([5, 6, 5, 7, 5, 6])
        rows = versioned_rows(keys, [2, 3, 4, 5, 6, 7], ITEMS.dim)
        server.update("wdl", "items", keys, rows)
        assert versions(server, [5, 6, 7]) == [6, 7, 5]

    def test_rows_may_be_any_numbers(self, server: HPS) -> None:
        server.update("wdl", 0, [1], [[1, 2, 3, 4]])
        assert server.lookup([1], "wdl", 0).tolist() == [[1.0, 2.0, 3.0, 4.0]]
        strided = np.arange(16.0).reshape(2, 8)[:, ::2]
        server.update("wdl", 0, [1, 2], strided)
        assert np.array_equal(server.lookup([1, 2], "wdl", 0), strided)

    def test_the_callers_rows_are_copied(self, server: HPS) -> None:
        rows = versioned_rows([1], 5, ITEMS.dim)
        server.update("wdl", 0, [1], rows)
        rows[:] = -5
        assert versions(server, [1]) == [5]

    def test_an_update_of_nothing_is_nothing(self, server: HPS) -> None:
        server.update("wdl", 0, [], np.empty((0, ITEMS.dim), np.float32))
        assert server.stats().table("wdl", "items").updated_rows == 0

    def test_nan_is_stored_and_counted(self, server: HPS) -> None:
        rows = np.array(
            [[1, np.nan, 3, 4], [1, 2, 3, 4], [np.inf, 2, 3, 4]], np.float32
        )
        server.update("wdl", 0, [1, 2, 3], rows)
        assert np.array_equal(server.lookup([1, 2, 3], "wdl", 0), rows, equal_nan=True)
        assert server.stats().table("wdl", "items").non_finite_rows == 2

    def test_deleted_keys_get_the_default_row(self, server: HPS) -> None:
        server.delete("wdl", "items", [3, 3, 5, NOBODY])
        assert versions(server, [3, 4, 5]) == [0, 1, 0]
        assert server.stats().table("wdl", "items").deleted_keys == 3
        server.update("wdl", "items", [3], versioned_rows([3], 9, ITEMS.dim))
        assert versions(server, [3, 4, 5]) == [9, 1, 0]

    def test_models_with_equal_table_names_share_no_rows(self, tmp_path: Path) -> None:
        other = Table("items", dim=4, n_rows=1000, version=6)
        models = [
            model(tmp_path, [ITEMS], name="a"),
            model(tmp_path, [other], name="b"),
        ]
        with HPS(server_config(tmp_path, models)) as server:
            assert versions(server, [1, 2], name="a") == [1, 1]
            assert versions(server, [1, 2], name="b") == [6, 6]
            server.update("a", "items", [1], versioned_rows([1], 9, 4))
            server.delete("b", "items", [2])
            assert versions(server, [1, 2], name="a") == [9, 1]
            assert versions(server, [1, 2], name="b") == [6, 0]
            assert {t.model for t in server.stats().tables} == {"a", "b"}

    def test_refresh_reads_the_database_again(self, tmp_path: Path) -> None:
        wraps = Wraps(lambda tier: tier)
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config, wrap_tier=wraps) as server:
            beneath = wraps.tiers["rocksdb"]
            keys = np.arange(10, dtype=np.int64)
            beneath.insert("hps_et.wdl.items", keys, versioned_rows(keys, 2, 4))
            assert versions(server, keys) == [1] * 10
            assert server.refresh("wdl", "items") == ITEMS.n_rows
            assert versions(server, keys) == [2] * 10
            assert server.refresh() == ITEMS.n_rows


class TestTelling:
    def test_locate_names_the_tier_of_each_key(self, server: HPS) -> None:
        assert server.locate("wdl", "users", [1, NOBODY]) == ["host", "default"]

    def test_counters_add_up(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"initialize_after_startup": False},
        )
        with HPS(config) as server:
            server.lookup([1, 1, 2, NOBODY], "wdl", 0)
            server.drain()
            server.lookup([1, 2, 3], "wdl", 0)
            stats = server.stats()
            table = stats.table("wdl", "items")
            assert (table.lookups, table.keys, table.defaults) == (2, 7, 1)
            host, rocks = table.tiers
            assert (host.tier, host.asked, host.hits) == ("host", 7, 2)
            assert (rocks.tier, rocks.asked, rocks.hits) == ("rocksdb", 4, 3)
            assert table.latency.count == 2
            assert 0 < table.latency.p50_ms <= table.latency.max_ms
            assert stats.backfill.stored_rows >= 2

    def test_the_estimate_covers_what_is_used(self, server: HPS) -> None:
        estimate = server.estimate()
        stats = server.stats()
        assert [(t.model, t.table, t.rows) for t in estimate.tables] == [
            ("wdl", "items", 1000),
            ("wdl", "users", 500),
        ]
        for told, used in zip(estimate.tables, stats.tables, strict=True):
            assert used.tiers[0].bytes <= told.host_bytes
        assert estimate.host_bytes == sum(t.host_bytes for t in estimate.tables)
        assert estimate.host_budget_bytes is None


class TestFailures:
    """What a failing tier does to lookups is configured; here, what is told of it."""

    @pytest.fixture(params=["raise", "degrade"])
    def mode(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_a_failing_database_is_counted(self, tmp_path: Path, mode: str) -> None:
        wraps = Wraps(FailingTier)
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"initialize_after_startup": False},
            on_tier_failure=mode,
        )
        with HPS(config, wrap_tier=wraps) as server:
            assert versions(server, [1, 2]) == [1, 1]
            server.drain()
            rocks = wraps.tiers["rocksdb"]
            assert isinstance(rocks, FailingTier)
            rocks.fail("fetch")
            assert versions(server, [1, 2]) == [1, 1]  # host memory has them
            if mode == "raise":
                with pytest.raises(TierUnavailableError, match="rocksdb"):
                    versions(server, [1, 3])
            else:
                assert versions(server, [1, 3]) == [1, 0]
            rocks.heal()
            assert versions(server, [1, 3]) == [1, 1]
            table = server.stats().table("wdl", "items")
        counted = (table.lookups, table.errors, table.degraded, table.defaults)
        assert counted == ((3, 1, 0, 0) if mode == "raise" else (4, 0, 1, 1))

    def test_an_update_that_fails_is_not_counted(self, tmp_path: Path) -> None:
        wraps = Wraps(FailingTier)
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config, wrap_tier=wraps) as server:
            rocks = wraps.tiers["rocksdb"]
            assert isinstance(rocks, FailingTier)
            rocks.fail("insert", times=1)
            with pytest.raises(UpdateError, match=r"hps_et\.wdl\.items: 0 of 1 keys"):
                server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert versions(server, [1, 2]) == [1, 1]
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert versions(server, [1, 2]) == [2, 1]
            assert server.stats().table("wdl", "items").updated_rows == 1


class TestClosing:
    def test_closing_twice_is_fine(self, server: HPS) -> None:
        server.close()
        server.close()

    def test_every_call_after_it_is_refused(self, server: HPS, tmp_path: Path) -> None:
        session = server.session("wdl")
        server.close()
        extra = model(tmp_path, [Table("t", n_rows=5)], name="extra")
        calls: list[Callable[[], object]] = [
            lambda: server.lookup([1], "wdl", 0),
            lambda: server.lookup([1], "nobody", 0),
            lambda: session.lookup(0, [1]),
            lambda: session.lookup({"items": [1]}),
            lambda: server.session("wdl"),
            lambda: server.update("wdl", 0, [1], ITEMS.rows[:1]),
            lambda: server.delete("wdl", 0, [1]),
            lambda: server.refresh(),
            lambda: server.refresh("wdl"),
            lambda: server.add_model(extra),
            lambda: server.remove_model("wdl"),
            lambda: server.reload("wdl"),
            lambda: server.locate("wdl", 0, [1]),
            lambda: server.stats(),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()
        server.drain()

    def test_the_database_is_free_for_the_next_server(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        for _ in range(3):
            with HPS(config) as server:
                assert versions(server, [1]) == [1]

    def test_closing_waits_for_a_lookup_under_way(self, tmp_path: Path) -> None:
        stops = StopPoints()
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"initialize_after_startup": False},
        )
        server = HPS(config, wrap_tier=gated(stops))
        stops.arm("rocksdb.fetch")
        with ThreadPoolExecutor(2) as pool:
            looking = pool.submit(versions, server, [1, NOBODY])
            stops.wait_held("rocksdb.fetch")
            closing = pool.submit(server.close)
            assert not closing.done()
            stops.release("rocksdb.fetch")
            assert looking.result() == [1, 0]
            closing.result()
        with pytest.raises(ClosedError):
            server.lookup([1], "wdl", 0)

    def test_closing_during_lookups_hangs_nobody(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"max_bytes": 200_000, "max_batch_size": 64},
        )
        server = HPS(config)
        begun = threading.Barrier(9)

        def read(seed: int) -> int:
            rng = np.random.default_rng(seed)
            n_lookups = 0
            while True:
                keys = rng.integers(0, 1000, 500)
                try:
                    rows = server.lookup(keys, "wdl", 0)
                except ClosedError:
                    return n_lookups
                assert (versions_in(keys, rows) == 1).all()
                n_lookups += 1
                if n_lookups == 1:
                    begun.wait(30)

        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(read, seed) for seed in range(8)]
            begun.wait(30)
            server.close()
            assert all(reader.result() >= 1 for reader in readers)

    def test_a_server_that_cannot_start_leaves_nothing_open(
        self, tmp_path: Path
    ) -> None:
        params = model(tmp_path, [ITEMS])
        (tmp_path / "wdl/items/key").write_bytes(b"123")
        n_threads = threading.active_count()
        for _ in range(2):
            with pytest.raises(Exception, match="items"):
                HPS(server_config(tmp_path, [params]))
        assert threading.active_count() == n_threads
        write_table(tmp_path / "wdl/items", ITEMS.keys, 1)
        with HPS(server_config(tmp_path, [params])) as server:
            assert versions(server, [1]) == [1]
