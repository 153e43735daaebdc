"""Files and databases that cannot be used: the message names them, nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import (
    ConfigError,
    ModelFileError,
    TierCorruptionError,
    TierError,
    TierUnavailableError,
    UpdateError,
)
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from hps_numba.tiers.rocksdb import RocksDBTier
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table, Wraps, model, server_config, write_table
from tests.support.wrappers import FailingTier

ITEMS = Table("items", dim=4, n_rows=200, version=1)
USERS = Table("users", dim=8, n_rows=50, version=2)
TAG = "hps_et.wdl.items"


def assert_unchanged(server: HPS) -> None:
    for table in (ITEMS, USERS):
        rows = server.lookup(table.keys, "wdl", table.name)
        assert np.array_equal(rows, table.rows)
        assert server.lookup([table.n_rows], "wdl", table.name)[0, 0] == table.default


class TestModelDirectories:
    @pytest.mark.parametrize("file", ["key", "emb_vector"])
    def test_a_file_short_of_a_byte_is_refused_at_the_start(
        self, tmp_path: Path, file: str
    ) -> None:
        params = model(tmp_path, [ITEMS, USERS])
        config = server_config(tmp_path, [params])
        cut = tmp_path / "wdl/users" / file
        whole = cut.read_bytes()
        cut.write_bytes(whole[:-1])
        with pytest.raises(ModelFileError, match="users") as caught:
            HPS(config)
        assert str(len(whole) - 1) in str(caught.value).replace(",", "")
        database = RocksDBTier(str(tmp_path / "rocksdb"))
        assert database.tables("wdl") == []
        database.close()
        cut.write_bytes(whole)
        with HPS(config) as server:
            assert_unchanged(server)

    def test_a_file_short_of_a_byte_leaves_what_is_served(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS, USERS])])
        with HPS(config) as server:
            server.update("wdl", "items", [7], versioned_rows([7], 5, 4))
            for table in (ITEMS, USERS):
                write_table(tmp_path / "wdl" / table.name, table.keys, 3, dim=table.dim)
            cut = tmp_path / "wdl/users/emb_vector"
            cut.write_bytes(cut.read_bytes()[:-1])
            for force in (False, True):
                with pytest.raises(ModelFileError, match="users"):
                    server.reload("wdl", force=force)
                rows = server.lookup([6, 7], "wdl", "items")
                assert versions_in([6, 7], rows).tolist() == [1, 5]
            extra = model(tmp_path, [USERS], name="extra")
            cut = tmp_path / "extra/users/key"
            cut.write_bytes(cut.read_bytes()[:-1])
            with pytest.raises(ModelFileError, match="extra"):
                server.add_model(extra)
            assert server.models == ("wdl",)

    def test_refused_contents_leave_what_is_served(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS], duplicate_keys="refuse", non_finite="refuse")
        config = server_config(tmp_path, [params])
        with HPS(config) as server:
            write_table(tmp_path / "wdl/items", [4, 5, 4], 3)
            with pytest.raises(ModelFileError, match="items"):
                server.reload("wdl")
            assert np.array_equal(server.lookup(ITEMS.keys, "wdl"), ITEMS.rows)
        with pytest.raises(ModelFileError, match="items"):
            HPS(config)
        write_table(tmp_path / "wdl/items", [4, 5], [3, np.nan])
        with pytest.raises(ModelFileError, match="items"):
            HPS(config)
        write_table(tmp_path / "wdl/items", ITEMS.keys, 1)
        with HPS(config) as server:
            assert np.array_equal(server.lookup(ITEMS.keys, "wdl"), ITEMS.rows)

    def test_a_model_of_which_one_table_is_refused_stores_nothing(
        self, tmp_path: Path
    ) -> None:
        with HPS(server_config(tmp_path, [model(tmp_path, [ITEMS])])) as server:
            extra = model(tmp_path, [ITEMS, USERS], name="extra", non_finite="refuse")
            bad = tmp_path / "extra/users"
            write_table(bad, USERS.keys, np.nan, dim=USERS.dim)
            with pytest.raises(ModelFileError, match="users"):
                server.add_model(extra)
            persistent = server._stores.persistent
            assert persistent is not None
            assert persistent.tables("extra") == []
            assert persistent.tables("wdl") == ["items"]


class TestDatabase:
    @pytest.mark.parametrize("where", ["rocksdb", "rocksdb/below"])
    def test_a_path_that_is_no_directory_is_refused(
        self, tmp_path: Path, where: str
    ) -> None:
        (tmp_path / "rocksdb").write_text("mine")
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            persistent={"path": str(tmp_path / where)},
        )
        with pytest.raises(TierUnavailableError, match="check the path") as caught:
            HPS(config)
        assert str(tmp_path / where) in str(caught.value)
        assert (tmp_path / "rocksdb").read_text() == "mine"

    def test_a_path_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS])],
            persistent={"path": "/proc/hps_numba/rocksdb"},
        )
        with pytest.raises(TierUnavailableError, match="/proc/hps_numba/rocksdb"):
            HPS(config)

    def test_a_database_of_another_process_is_refused(self, tmp_path: Path) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [7], versioned_rows([7], 5, 4))
        path = str(tmp_path / "rocksdb")
        code = (
            "import sys; from hps_numba.tiers.rocksdb import RocksDBTier\n"
            "tier = RocksDBTier(sys.argv[1]); print('open', flush=True)\n"
            "sys.stdin.read(); tier.close()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "open\n"
            with pytest.raises(TierUnavailableError, match="open elsewhere") as caught:
                HPS(config)
            assert path in str(caught.value)
            other.communicate("")
        with HPS(config) as server:
            rows = server.lookup([6, 7], "wdl", 0)
            assert versions_in([6, 7], rows).tolist() == [1, 5]

    @pytest.mark.parametrize("name", ["MANIFEST-*", "CURRENT"])
    def test_a_damaged_database_is_told_and_left(
        self, tmp_path: Path, name: str
    ) -> None:
        config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
        with HPS(config) as server:
            server.update("wdl", 0, [7], versioned_rows([7], 5, 4))
        path = tmp_path / "rocksdb"
        shutil.copytree(path, tmp_path / "backup")
        (damaged,) = path.glob(name)
        damaged.write_bytes(b"\xff" * damaged.stat().st_size)
        with pytest.raises(TierError, match="rocksdb") as caught:
            HPS(config)
        assert str(path) in str(caught.value)
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "backup", path)
        with HPS(config) as server:
            rows = server.lookup([6, 7], "wdl", 0)
            assert versions_in([6, 7], rows).tolist() == [1, 5]

    def test_a_damaged_row_is_no_row(self, tmp_path: Path) -> None:
        big = Table("items", dim=4, n_rows=5000)
        config = server_config(
            tmp_path, [model(tmp_path, [big])], volatile={"type": "disabled"}
        )
        HPS(config).close()
        file = max(tmp_path.glob("rocksdb/*.sst"), key=lambda f: f.stat().st_size)
        content = bytearray(file.read_bytes())
        content[content.index(big.rows[4000].tobytes())] ^= 0xFF
        file.write_bytes(content)
        with HPS(config) as server:
            assert versions_in([1], server.lookup([1], "wdl", 0)).tolist() == [1]
            with pytest.raises(TierCorruptionError, match=TAG):
                server.lookup([1, 4000], "wdl", 0)
            assert server.stats().table("wdl", "items").errors == 1

    def test_a_read_only_database_refuses_updates(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS])
        HPS(server_config(tmp_path, [params])).close()
        config = server_config(tmp_path, [params], persistent={"read_only": True})
        with HPS(config) as server:
            for call in (
                lambda: server.update("wdl", 0, [7], versioned_rows([7], 5, 4)),
                lambda: server.delete("wdl", 0, [7]),
            ):
                with pytest.raises(UpdateError, match=f"{TAG}: 0 of 1 keys.*read-only"):
                    call()
            assert np.array_equal(server.lookup(ITEMS.keys, "wdl"), ITEMS.rows)
            assert server.stats().table("wdl", "items").updated_rows == 0

    def test_another_dim_than_the_stored_one_is_refused(self, tmp_path: Path) -> None:
        HPS(server_config(tmp_path, [model(tmp_path, [ITEMS])])).close()
        wider = [Table("items", dim=8, n_rows=200)]
        with pytest.raises(ConfigError, match=rf"{TAG}.*dim 4.*dim 8"):
            HPS(server_config(tmp_path, [model(tmp_path, wider)]))
        with HPS(server_config(tmp_path, [model(tmp_path, [ITEMS])])) as server:
            assert np.array_equal(server.lookup(ITEMS.keys, "wdl"), ITEMS.rows)


def test_a_host_budget_without_room_is_refused(tmp_path: Path) -> None:
    config = server_config(
        tmp_path, [model(tmp_path, [ITEMS])], volatile={"max_bytes": 1000}
    )
    with pytest.raises(ConfigError, match=rf"{TAG}.*1000 bytes.*max_bytes"):
        HPS(config)


def test_a_configuration_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="either"):
        HPS()
    config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
    with pytest.raises(TypeError, match="either"):
        HPS(config, hps_json_config_file=tmp_path / "ps.json")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"volatile": {"type": "multi_process_hash_map"}},
            r"volatile_db\.type",
        ),
        (
            {"volatile": {"type": "disabled"}, "persistent": {"backend": "disabled"}},
            "enable at least one",
        ),
    ],
)
def test_a_store_that_is_not_there_is_told(
    tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    config = server_config(tmp_path, [model(tmp_path, [ITEMS])], **options)
    with pytest.raises(ConfigError, match=what):
        HPS(config)


def test_a_start_that_fails_tells_what_failed_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Wraps(FailingTier)

    def wrap(tier: Tier) -> Tier:
        wrapped = failing(tier)
        assert isinstance(wrapped, FailingTier)
        wrapped.fail("load")
        wrapped.fail("drop_table")
        return wrapped

    config = server_config(tmp_path, [model(tmp_path, [ITEMS])])
    with pytest.raises(TierUnavailableError, match="load was made to fail"):
        HPS(config, wrap_tier=wrap)
    assert "model=wdl not released" in caplog.text
    assert "drop_table was made to fail" in caplog.text
