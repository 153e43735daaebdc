"""What a server serves that starts, or starts again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows
from tests.runtime.deployments import (
    ITEMS,
    NOBODY,
    USERS,
    Table,
    Wraps,
    model,
    server_config,
    versions,
    write_table,
)
from tests.support.wrappers import CountingTier


class TestStarting:
    def test_starting_again_undoes_no_updates(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [1, 5000], versioned_rows([1, 5000], 2, 4))
            server.delete("wdl", 0, [3])
        with HPS(config) as server:
            assert versions(server, [0, 1, 3, 5000]) == [1, 2, 0, 2]
            assert server.locate("wdl", 0, [1, 5000]) == ["host", "host"]

    def test_a_start_without_updates_resumes(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        HPS(config).close()
        wraps = Wraps(CountingTier)
        with HPS(config, wrap_tier=wraps) as server:
            assert versions(server, [0, 999, 1000]) == [1, 1, 0]
        assert wraps.tiers["rocksdb"].calls["load"] == 0

    def test_changed_files_replace_the_table(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [1, 5000], versioned_rows([1, 5000], 2, 4))
        write_table(tmp_path / "wdl/items", np.arange(1, 10), 3)
        with HPS(config) as server:
            assert versions(server, [0, 1, 9, 10, 5000]) == [0, 3, 3, 0, 0]

    def test_touched_and_copied_files_are_the_same_version(
        self, tmp_path: Path
    ) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
        directory = tmp_path / "wdl/items"
        for file in directory.iterdir():
            file.touch()
        with HPS(config) as server:
            assert versions(server, [0, 1]) == [1, 2]
        shutil.copytree(directory, tmp_path / "copy")
        shutil.rmtree(directory)
        shutil.copytree(tmp_path / "copy", directory)
        with HPS(config) as server:
            assert versions(server, [0, 1]) == [1, 2]

    def test_a_forced_reload_undoes_updates(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [1, 5000], versioned_rows([1, 5000], 2, 4))
        with HPS(config, force_reload=True) as server:
            assert versions(server, [0, 1, 5000]) == [1, 1, 0]

    @pytest.mark.parametrize("persistent", [True, False])
    def test_a_reload_that_fails_is_repaired_by_the_next(
        self, tmp_path: Path, persistent: bool
    ) -> None:
        steps: list[str] = []

        def progress(label: str, done: int, total: int) -> None:
            steps.append(label)
            if planted and label.endswith(" host") and done:
                raise InterruptedError("planted")

        planted = False
        kind = {} if persistent else {"backend": "disabled"}
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])], persistent=kind)
        with HPS(config, progress=progress) as server:
            directory = Path(config.models[0].sparse_model_files[0])
            write_table(directory, ITEMS.keys, version=2)
            planted = True
            with pytest.raises(InterruptedError):
                server.reload("wdl")
            planted = False
            if persistent:
                assert versions(server, ITEMS.keys) == [2] * ITEMS.n_rows
            else:
                write_table(directory, ITEMS.keys, version=1)
            server.reload("wdl")
            expected = 2 if persistent else 1
            assert versions(server, ITEMS.keys) == [expected] * ITEMS.n_rows

    def test_nothing_is_loaded_unless_configured(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        off = {"initialize_after_startup": False}
        config = server_config(
            tmp_path, [model(tmp_path, [ITEMS])], volatile=off, persistent=off
        )
        with HPS(config) as server:
            assert "serves default rows: nothing is stored" in caplog.text
            assert versions(server, [0, 1]) == [0, 0]
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert versions(server, [0, 1]) == [0, 2]
        caplog.clear()
        with HPS(config):
            assert "serves default rows" not in caplog.text

    def test_host_memory_alone_can_be_left_empty(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            volatile={"initialize_after_startup": False},
        )
        with HPS(config) as server:
            assert server.locate("wdl", 0, [1]) == ["rocksdb"]
            assert versions(server, [1]) == [1]
            server.drain()
            assert server.locate("wdl", 0, [1, 2]) == ["host", "rocksdb"]

    def test_host_memory_never_holds_other_rows_than_the_database(
        self, tmp_path: Path
    ) -> None:
        """The database keeps its version: it is not to be filled from new files."""
        params = model(tmp_path, [ITEMS])
        HPS(server_config(tmp_path, [params])).close()
        write_table(tmp_path / "wdl/items", ITEMS.keys, 2)
        for persistent in ({"initialize_after_startup": False}, {"read_only": True}):
            config = server_config(tmp_path, [params], persistent=persistent)
            with HPS(config) as server:
                assert versions(server, [1, 2]) == [1, 1]
                assert server.locate("wdl", 0, [1]) == ["host"]

    def test_a_table_without_files_begins_empty(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS], write=False, sparse_model_files=[])
        with HPS(server_config(tmp_path, [params])) as server:
            assert versions(server, [1]) == [0]
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert versions(server, [1]) == [2]
        with HPS(server_config(tmp_path, [params])) as server:
            assert versions(server, [1]) == [2]

    def test_duplicate_keys_in_files_resolve_to_the_last(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS])
        keys = np.array([5, 6, 5, 7])
        write_table(tmp_path / "wdl/items", keys, [1, 2, 3, 4])
        with HPS(server_config(tmp_path, [params])) as server:
            assert versions(server, [5, 6, 7]) == [3, 2, 4]
            server.delete("wdl", 0, [7])  # the host tier reads what is stored now
            assert versions(server, [5, 6, 7]) == [3, 2, 0]
        with HPS(server_config(tmp_path, [params])) as server:
            assert versions(server, [5, 6, 7]) == [3, 2, 0]

    @pytest.mark.parametrize("which", ["volatile", "persistent"])
    def test_one_database_is_enough(self, tmp_path: Path, which: str) -> None:
        off = {"type": "disabled"} if which == "persistent" else {"backend": "disabled"}
        other = {"persistent": "volatile", "volatile": "persistent"}[which]
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])], **{other: off})
        name = {"volatile": "host", "persistent": "rocksdb"}[which]
        with HPS(config) as server:
            assert server.locate("wdl", 0, [1, NOBODY]) == [name, "default"]
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            server.delete("wdl", 0, [2])
            assert versions(server, [1, 2, 3]) == [2, 0, 1]
            assert server.refresh() == 0

    def test_tables_larger_than_the_host_budget_are_served(
        self, tmp_path: Path
    ) -> None:
        big = Table("big", dim=16, n_rows=20_000, version=4)
        budget = 400_000
        config = server_config(
            tmp_path,
            [model(tmp_path, [big], max_batchsize=20_000)],
            volatile={"max_bytes": budget},
        )
        with HPS(config) as server:
            assert versions(server, big.keys) == [4] * big.n_rows
            server.drain()
            assert versions(server, big.keys[::-1]) == [4] * big.n_rows
            host, rocks = server.stats().table("wdl", "big").tiers
            assert host.bytes <= budget
            assert 0 < host.rows < big.n_rows
            assert host.evictions > 0
            assert rocks.hits > 0

    def test_progress_is_told(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS, USERS])])
        told: dict[str, list[tuple[int, int]]] = {}

        def progress(label: str, done: int, total: int) -> None:
            told.setdefault(label, []).append((done, total))

        with HPS(config, progress=progress):
            pass
        for table in (ITEMS, USERS):
            steps = {
                k: v for k, v in told.items() if k.startswith(f"wdl/{table.name} ")
            }
            assert {label.split()[1] for label in steps} >= {"host", "rocksdb"}
            for calls in steps.values():
                done = [count for count, _ in calls]
                assert done == sorted(done)
                assert calls[-1] == (table.n_rows, table.n_rows)

    def test_a_json_file_configures_a_server(self, tmp_path: Path) -> None:
        model(tmp_path, [ITEMS])
        file = tmp_path / "ps.json"
        content = {
            "supportlonglong": True,
            "volatile_db": {"type": "parallel_hash_map", "num_partitions": 2},
            "persistent_db": {"type": "rocks_db", "path": str(tmp_path / "rocksdb")},
            "models": [
                {
                    "model": "wdl",
                    "sparse_files": [str(tmp_path / "wdl/items")],
                    "embedding_table_names": ["items"],
                    "embedding_vecsize_per_table": [4],
                    "maxnum_catfeature_query_per_table_per_sample": [10],
                    "default_value_for_each_table": [0.0],
                    "deployed_device_list": [0],
                    "max_batch_size": 100,
                    "gpucache": False,
                }
            ],
        }
        file.write_text(json.dumps(content))
        with HPS.from_json(file) as server:
            assert server.models == ("wdl",)
            assert np.array_equal(server.lookup([1, 2], "wdl", 0), ITEMS.rows[1:3])
        with HPS(hps_json_config_file=file) as server:
            assert np.array_equal(server.lookup([1, 2], "wdl", 0), ITEMS.rows[1:3])
