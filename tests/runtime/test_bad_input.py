"""What is wrong is refused with a message that names it, and nothing is changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hps_numba.errors import (
    ConfigError,
    ModelFileError,
    TierCorruptionError,
    TierError,
    TierUnavailableError,
    UnknownTableError,
    UpdateError,
)
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.rocksdb import RocksDBTier
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table, model, server_config, write_table

ITEMS = Table("items", dim=4, n_rows=200, version=1)
USERS = Table("users", dim=8, n_rows=50, version=2)
TAG = "hps_et.wdl.items"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    """Return a server that no test of this module may change."""
    root = tmp_path_factory.mktemp("server")
    params = model(root, [ITEMS, USERS], max_batchsize=30)  # at most 300 keys
    with HPS(server_config(root, [params])) as made:
        yield made
        assert_unchanged(made)


def assert_unchanged(server: HPS) -> None:
    for table in (ITEMS, USERS):
        rows = server.lookup(table.keys, "wdl", table.name)
        assert np.array_equal(rows, table.rows)
        assert server.lookup([table.n_rows], "wdl", table.name)[0, 0] == table.default


class TestNames:
    @pytest.mark.parametrize(
        "call",
        [
            lambda s: s.lookup([1], "nobody", 0),
            lambda s: s.session("nobody"),
            lambda s: s.update("nobody", 0, [1], ITEMS.rows[:1]),
            lambda s: s.delete("nobody", 0, [1]),
            lambda s: s.refresh("nobody"),
            lambda s: s.reload("nobody"),
            lambda s: s.remove_model("nobody"),
            lambda s: s.locate("nobody", 0, [1]),
        ],
    )
    def test_an_unknown_model_is_told_with_those_there_are(
        self, server: HPS, call: Callable[[HPS], object]
    ) -> None:
        with pytest.raises(UnknownTableError, match=r"'nobody' .* served are wdl"):
            call(server)

    @pytest.mark.parametrize("table", ["nothing", 2, -1, 1 << 40])
    @pytest.mark.parametrize(
        "call",
        [
            lambda s, t: s.lookup([1], "wdl", t),
            lambda s, t: s.session("wdl").lookup(t, [1]),
            lambda s, t: s.update("wdl", t, [1], ITEMS.rows[:1]),
            lambda s, t: s.delete("wdl", t, [1]),
            lambda s, t: s.refresh("wdl", t),
            lambda s, t: s.locate("wdl", t, [1]),
        ],
    )
    def test_an_unknown_table_is_told_with_those_there_are(
        self, server: HPS, table: Any, call: Callable[[HPS, Any], object]
    ) -> None:
        with pytest.raises(UnknownTableError, match="'wdl' has no table") as caught:
            call(server, table)
        assert repr(table) in str(caught.value)
        assert "0: items, 1: users" in str(caught.value)

    def test_an_unknown_table_among_several_is_told(self, server: HPS) -> None:
        with pytest.raises(UnknownTableError, match="'nothing'"):
            server.session("wdl").lookup({"items": [1], "nothing": [2]})

    @pytest.mark.parametrize("device", [1, -1])
    def test_a_device_without_the_model_is_told(self, server: HPS, device: int) -> None:
        for call in (
            lambda: server.lookup([1], "wdl", 0, device),
            lambda: server.session("wdl", device),
        ):
            with pytest.raises(UnknownTableError, match=r"'wdl'.*device.*\[0\]"):
                call()


class TestKeys:
    @pytest.mark.parametrize(
        "keys",
        [
            pytest.param(np.array([1.0, 2.0]), id="float64"),
            pytest.param(np.array([1, 2], np.float16), id="float16"),
            pytest.param([1.5], id="list of floats"),
            pytest.param(np.array([1, 2], object), id="object"),
            pytest.param([1, None], id="None in a list"),
            pytest.param([1 << 70], id="beyond 64 bits"),
            pytest.param([True, False], id="bool"),
            pytest.param(["1"], id="text"),
            pytest.param(b"12345678", id="bytes"),
            pytest.param([1 + 2j], id="complex"),
            pytest.param(np.array(["2020-01-01"], "datetime64[D]"), id="dates"),
            pytest.param(np.empty(0, np.float32), id="no floats"),
            pytest.param({1, 2}, id="set"),
        ],
    )
    def test_what_is_no_integer_is_refused(self, server: HPS, keys: Any) -> None:
        for call in (
            lambda: server.lookup(keys, "wdl", "items"),
            lambda: server.session("wdl").lookup({"users": [1], "items": keys}),
            lambda: server.update("wdl", "items", keys, ITEMS.rows[:2]),
            lambda: server.delete("wdl", "items", keys),
            lambda: server.locate("wdl", "items", keys),
        ):
            with pytest.raises(TypeError, match=TAG):
                call()

    def test_a_ragged_list_is_refused(self, server: HPS) -> None:
        with pytest.raises(ValueError, match="inhomogeneous"):
            server.lookup([[1, 2], [3]], "wdl", "items")  # type: ignore[list-item]

    def test_a_missing_list_of_keys_is_told(self, server: HPS) -> None:
        with pytest.raises(TypeError, match="keys are missing"):
            server.session("wdl").lookup("items")  # type: ignore[call-overload]

    def test_too_many_keys_are_refused_with_the_limit(self, server: HPS) -> None:
        for shape in [(301,), (7, 43)]:
            keys = np.zeros(shape, np.int64)
            with pytest.raises(ValueError, match=f"{TAG}.*301 keys.* 300 ") as caught:
                server.lookup(keys, "wdl", "items")
            assert "max_batch_size" in str(caught.value)
        assert_unchanged(server)

    def test_the_limit_itself_is_allowed(self, server: HPS) -> None:
        keys = np.arange(300) % 200
        assert (versions_in(keys, server.lookup(keys, "wdl", "items")) == 1).all()

    def test_keys_of_a_write_have_one_dimension(self, server: HPS) -> None:
        keys = np.zeros((2, 2), np.int64)
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 2\)"):
            server.update("wdl", "items", keys, np.zeros((2, 2, 4), np.float32))
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 2\)"):
            server.delete("wdl", "items", keys)


class TestOutput:
    KEYS = (1, 2, 3)

    @pytest.mark.parametrize(
        "out",
        [
            pytest.param(np.zeros((3, 4), np.float64), id="float64"),
            pytest.param(np.zeros((3, 4), np.float16), id="float16"),
            pytest.param(np.zeros((3, 4), np.int32), id="int32"),
            pytest.param(np.zeros((3, 4), ">f4"), id="big-endian"),
            pytest.param([[0.0] * 4] * 3, id="list"),
            pytest.param(bytearray(48), id="bytearray"),
        ],
    )
    def test_an_out_of_another_type_is_refused(self, server: HPS, out: Any) -> None:
        before = np.array(out, copy=True) if isinstance(out, np.ndarray) else None
        with pytest.raises(TypeError, match=rf"{TAG}.*float32"):
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert before is None or np.array_equal(out, before)

    @pytest.mark.parametrize(
        "shape",
        [(3, 3), (3, 5), (2, 4), (4, 4), (12,), (1, 3, 4), (3, 4, 1), (0, 4), ()],
    )
    def test_an_out_of_another_shape_is_refused(
        self, server: HPS, shape: tuple[int, ...]
    ) -> None:
        out = np.full(shape, 7, np.float32)
        with pytest.raises(ValueError, match=rf"{TAG}.*need \(3, 4\)") as caught:
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert str(shape) in str(caught.value)
        assert (out == 7).all()

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: read_only(np.full((3, 4), 7, np.float32)), id="ro"),
            pytest.param(lambda: np.full((3, 8), 7, np.float32)[:, ::2], id="strided"),
            pytest.param(lambda: np.full((4, 3), 7, np.float32).T, id="transposed"),
            pytest.param(lambda: np.full((3, 4), 7, np.float32)[::-1], id="reversed"),
            pytest.param(
                lambda: np.broadcast_to(np.full(4, 7, np.float32), (3, 4)),
                id="repeated",
            ),
        ],
    )
    def test_an_out_that_cannot_be_filled_is_refused(
        self, server: HPS, make: Callable[[], Any]
    ) -> None:
        out = make()
        with pytest.raises(ValueError, match=f"{TAG}.*contiguous and writable"):
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert (out == 7).all()

    @pytest.mark.parametrize(
        ("found", "error"),
        [
            pytest.param(np.ones(3, np.uint8), TypeError, id="uint8"),
            pytest.param([True] * 3, TypeError, id="list"),
            pytest.param(np.ones(2, np.bool_), ValueError, id="short"),
            pytest.param(np.ones((3, 1), np.bool_), ValueError, id="column"),
            pytest.param(np.ones(6, np.bool_)[::2], ValueError, id="strided"),
        ],
    )
    def test_a_found_that_does_not_fit_is_refused(
        self, server: HPS, found: Any, error: type[Exception]
    ) -> None:
        out = np.full((3, 4), 7, np.float32)
        with pytest.raises(error, match=f"{TAG}.*found"):
            server.lookup(self.KEYS, "wdl", "items", out=out, found=found)
        assert np.all(found)
        assert (out == 7).all()

    def test_what_fits_is_not_written_if_another_table_does_not(
        self, server: HPS
    ) -> None:
        out = {
            "items": np.full((3, 4), 7, np.float32),
            "users": np.full((3, 4), 7, np.float32),  # the dim is 8
        }
        found = {"items": np.ones(3, np.bool_)}
        keys = {"items": self.KEYS, "users": self.KEYS}
        with pytest.raises(ValueError, match=r"hps_et\.wdl\.users.*\(3, 8\)"):
            server.session("wdl").lookup(keys, out=out, found=found)
        assert (out["items"] == 7).all()
        assert found["items"].all()

    def test_an_out_for_a_table_that_is_not_asked_for_is_refused(
        self, server: HPS
    ) -> None:
        for option in ("out", "found"):
            with pytest.raises(ValueError, match=r"'item'.*items"):
                server.session("wdl").lookup({"items": [1]}, **{option: {"item": None}})

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        keys=arrays.arrays(
            st.sampled_from([np.int64, np.int32, np.uint64, np.uint8, np.float32]),
            arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        ),
        shape=arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
        fits=st.booleans(),
    )
    def test_nothing_is_written_beside_the_output(
        self, server: HPS, keys: Any, shape: tuple[int, ...], fits: bool
    ) -> None:
        shape = (*keys.shape, ITEMS.dim) if fits else shape
        size = int(np.prod(shape))
        guarded = np.full(size + 128, -7, np.float32)
        out = guarded[64 : 64 + size].reshape(shape)
        found = np.ones(keys.shape, np.bool_)
        if out.shape != (*keys.shape, ITEMS.dim) or keys.dtype.kind == "f":
            with pytest.raises((TypeError, ValueError), match=TAG):
                server.lookup(keys, "wdl", "items", out=out, found=found)
            assert (out == -7).all()
            assert found.all()
        else:
            server.lookup(keys, "wdl", "items", out=out, found=found)
            plain = keys.astype(np.int64)
            known = (plain >= 0) & (plain < ITEMS.n_rows)
            assert np.array_equal(found, known)
            assert (versions_in(plain[known], out[known]) == 1).all()
            assert (out[~known] == ITEMS.default).all()
        assert (guarded[:64] == -7).all()
        assert (guarded[64 + size :] == -7).all()


class TestRows:
    @pytest.mark.parametrize(
        "shape", [(2, 3), (2, 5), (1, 4), (3, 4), (8,), (2, 4, 1), (0, 4), (2, 0)]
    )
    def test_rows_of_another_shape_are_refused(
        self, server: HPS, shape: tuple[int, ...]
    ) -> None:
        rows = np.full(shape, 9, np.float32)
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 4\)") as caught:
            server.update("wdl", "items", [1, 2], rows)
        assert str(shape) in str(caught.value)
        assert_unchanged(server)

    @pytest.mark.parametrize(
        "rows",
        [
            pytest.param([["a"] * 4] * 2, id="text"),
            pytest.param(np.zeros((2, 4), np.complex64), id="complex"),
            pytest.param(np.zeros((2, 4), np.bool_), id="bool"),
            pytest.param(np.full((2, 4), None), id="object"),
        ],
    )
    def test_rows_that_are_no_numbers_are_refused(self, server: HPS, rows: Any) -> None:
        with pytest.raises(TypeError, match=TAG):
            server.update("wdl", "items", [1, 2], rows)
        assert_unchanged(server)

    def test_counters_do_not_count_what_was_refused(self, server: HPS) -> None:
        before = server.stats().table("wdl", "items")
        with pytest.raises(ValueError, match=TAG):
            server.update("wdl", "items", [1, 2], np.zeros((2, 3)))
        after = server.stats().table("wdl", "items")
        assert (after.updated_rows, after.lookups) == (
            before.updated_rows,
            before.lookups,
        )


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
            {"volatile": {"type": "redis_cluster", "num_partitions": 8}},
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


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array
