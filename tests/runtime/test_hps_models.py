"""Models that are added, removed and loaded again while a server runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from hps_numba.errors import ConfigError, UnknownTableError
from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows
from tests.runtime.deployments import (
    ITEMS,
    USERS,
    Table,
    gated,
    model,
    server_config,
    versions,
    write_table,
)
from tests.support.gates import StopPoints


class TestModels:
    def test_a_model_is_added_and_removed(self, server: HPS, tmp_path: Path) -> None:
        extra = Table("items", dim=2, n_rows=50, version=8)
        server.add_model(model(tmp_path, [extra], name="extra"))
        assert server.models == ("wdl", "extra")
        assert versions(server, [1, 2], name="extra") == [8, 8]
        session = server.session("extra")
        server.remove_model("extra")
        assert server.models == ("wdl",)
        with pytest.raises(UnknownTableError, match="'extra'"):
            server.lookup([1], "extra", 0)
        with pytest.raises(UnknownTableError, match="'extra' was removed"):
            session.lookup(0, [1])
        assert versions(server, [1, 2]) == [1, 1]

    def test_statistics_leave_out_a_model_that_is_being_removed(
        self, server: HPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = server._models
        server.add_model(model(tmp_path, [ITEMS], name="dcn"))
        with_both = models.served
        monkeypatch.setattr(type(models), "served", property(lambda _: with_both))
        server.remove_model("dcn")
        assert {table.model for table in server.stats().tables} == {"wdl"}

    def test_a_removed_model_resumes_when_it_is_added_again(
        self, server: HPS, tmp_path: Path
    ) -> None:
        params = model(tmp_path, [Table("t", n_rows=50)], name="extra")
        server.add_model(params)
        server.update("extra", 0, [1], versioned_rows([1], 2, 4))
        server.remove_model("extra")
        server.add_model(params)
        assert versions(server, [0, 1], name="extra") == [1, 2]

    def test_dropping_its_tables_forgets_a_model(
        self, server: HPS, tmp_path: Path
    ) -> None:
        params = model(tmp_path, [Table("t", n_rows=50)], name="extra")
        server.add_model(params)
        server.update("extra", 0, [1], versioned_rows([1], 2, 4))
        server.remove_model("extra", drop_tables=True)
        server.add_model(params)
        assert versions(server, [0, 1], name="extra") == [1, 1]
        server.remove_model("extra", drop_tables=True)
        wider = model(tmp_path, [Table("t", dim=8, n_rows=50, version=4)], name="extra")
        server.add_model(wider)
        assert versions(server, [0, 1], name="extra") == [4, 4]

    def test_a_model_is_not_added_twice(self, server: HPS, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="'wdl' is served already"):
            server.add_model(model(tmp_path, [ITEMS]))
        assert versions(server, [1]) == [1]

    def test_a_read_only_database_keeps_the_model_whole(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS])
        with HPS(server_config(tmp_path, [params])):
            pass
        config = server_config(tmp_path, [params], persistent={"read_only": True})
        with HPS(config) as server:
            with pytest.raises(ConfigError, match="read_only is true"):
                server.remove_model("wdl", drop_tables=True)
            assert versions(server, [1]) == [1]
            server.remove_model("wdl")
            assert server.models == ()

    def test_a_model_with_keys_of_another_width_is_not_added(
        self, server: HPS, tmp_path: Path
    ) -> None:
        params = model(tmp_path, [Table("t", n_rows=50)], name="extra")
        with pytest.raises(ConfigError, match="'extra': i64_input_key=False differs"):
            server.add_model(params.replace(i64_input_key=False))
        assert server.models == ("wdl",)

    def test_a_model_that_cannot_be_opened_leaves_nothing_behind(
        self, tmp_path: Path
    ) -> None:
        first, second = (
            Table("a", n_rows=50, version=2),
            Table("b", n_rows=50, version=2),
        )
        config = server_config(
            tmp_path, [model(tmp_path, [ITEMS])], volatile={"max_bytes": 2_000_000}
        )
        with HPS(config) as server:
            # Another dim is stored for the second table than it is opened with.
            server.add_model(model(tmp_path, [second], name="extra"))
            server.remove_model("extra")
            wrong = [Table("a", dim=2, n_rows=50), Table("b", dim=2, n_rows=50)]
            for _ in range(2):
                with pytest.raises(ConfigError, match=r"hps_et\.extra\.b"):
                    server.add_model(model(tmp_path, wrong, name="extra"))
            assert server.models == ("wdl",)
            # The first table's memory was given back, and its dim is free again.
            server.add_model(model(tmp_path, [first, second], name="extra"))
            assert versions(server, [1, 2], "a", "extra") == [2, 2]
            assert versions(server, [1, 2], "b", "extra") == [2, 2]

    def test_rows_of_a_removed_model_do_not_come_back(self, tmp_path: Path) -> None:
        """A backfill that is late would find a new table of the same name."""
        stops = StopPoints()
        config = server_config(
            tmp_path,
            [model(tmp_path, [USERS], name="base")],
            volatile={"initialize_after_startup": False},
        )
        with HPS(config, wrap_tier=gated(stops)) as server:
            params = model(tmp_path, [ITEMS], name="extra")
            server.add_model(params)
            for version in range(2, 12):  # so that the old table's epoch is high
                server.update("extra", 0, [999], versioned_rows([999], version, 4))
            stops.arm("host.backfill")
            versions(server, [1], name="base")
            stops.wait_held("host.backfill")
            assert versions(server, [1], name="extra") == [1]  # its backfill waits
            server.remove_model("extra")
            write_table(tmp_path / "extra/items", ITEMS.keys, 2)
            server.add_model(params)
            stops.release("host.backfill")
            server.drain()
            assert versions(server, [1], name="extra") == [2]

    def test_reload_loads_what_changed(self, server: HPS, tmp_path: Path) -> None:
        server.update("wdl", "items", [1], versioned_rows([1], 2, 4))
        assert server.reload("wdl") is False
        assert versions(server, [0, 1]) == [1, 2]
        write_table(tmp_path / "wdl/items", np.arange(900), 3)
        assert server.reload("wdl") is True
        assert versions(server, [0, 1, 899, 900]) == [3, 3, 3, 0]
        assert versions(server, [1], "users") == [2]
        assert server.reload("wdl") is False

    def test_a_forced_reload_of_a_model_undoes_updates(self, server: HPS) -> None:
        server.update("wdl", "items", [1, 5000], versioned_rows([1, 5000], 2, 4))
        assert server.reload("wdl", force=True) is True
        assert versions(server, [0, 1, 5000]) == [1, 1, 0]

    def test_reload_replaces_rows_that_lookups_brought_up(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"initialize_after_startup": False},
        )
        with HPS(config) as server:
            assert versions(server, ITEMS.keys) == [1] * ITEMS.n_rows
            server.drain()
            write_table(tmp_path / "wdl/items", np.arange(900), 2)
            assert server.reload("wdl") is True
            assert versions(server, ITEMS.keys) == [2] * 900 + [0] * 100

    def test_reload_without_a_database_undoes_no_updates(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path, [model(tmp_path, [ITEMS])], persistent={"backend": "disabled"}
        )
        with HPS(config) as server:
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert server.reload("wdl") is False
            assert versions(server, [0, 1]) == [1, 2]
            write_table(tmp_path / "wdl/items", np.arange(900), 3)
            assert server.reload("wdl") is True
            assert versions(server, [0, 1, 899, 900]) == [3, 3, 3, 0]

    def test_lookups_during_a_reload_see_old_rows_or_new_ones(
        self, server: HPS, tmp_path: Path
    ) -> None:
        write_table(tmp_path / "wdl/items", ITEMS.keys, 2)
        loaded = threading.Event()
        seen: set[int] = set()

        def read() -> None:
            rng = np.random.default_rng(0)
            while True:
                last = loaded.is_set()
                found = set(versions(server, rng.integers(0, 1000, 300)))
                assert found <= ({2} if last else {1, 2})
                seen.update(found)
                if last:
                    return

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            assert server.reload("wdl") is True
            loaded.set()
            for reader in readers:
                reader.result()
        assert 2 in seen

    def test_removing_and_reloading_at_once_ends(
        self, server: HPS, tmp_path: Path
    ) -> None:
        names = [f"m{i}" for i in range(4)]
        for name in names:
            server.add_model(model(tmp_path, [Table("t", n_rows=50)], name=name))

        def reload(name: str) -> None:
            with suppress(UnknownTableError):  # it was removed already
                server.reload(name)

        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(reload, name) for name in names]
            calls += [pool.submit(server.remove_model, name) for name in names]
            for call in calls:
                call.result()
        assert server.models == ("wdl",)
