"""The server object, from configuration to rows, on host memory over RocksDB."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ClosedError, ConfigError, UnknownTableError
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from tests import oracle
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table, model, server_config, write_table
from tests.support.gates import StopPoints
from tests.support.wrappers import CountingTier, GatedTier

ITEMS = Table("items", dim=4, n_rows=1000, version=1, default=-1.0)
USERS = Table("users", dim=8, n_rows=500, version=2, default=0.5)
NOBODY = np.iinfo(np.int64).max


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HPS]:
    config = server_config(tmp_path, [model(tmp_path, [ITEMS, USERS])])
    with HPS(config) as made:
        yield made


class Wraps:
    """Wraps the tiers of a server as they are opened, and keeps them by name."""

    def __init__(self, wrap: Callable[[Tier], Tier]) -> None:
        self._wrap = wrap
        self.tiers: dict[str, Tier] = {}

    def __call__(self, tier: Tier) -> Tier:
        return self.tiers.setdefault(tier.name, self._wrap(tier))


def gated(stops: StopPoints) -> Wraps:
    return Wraps(lambda tier: GatedTier(tier, stops))


def versions(server: HPS, keys: Any, table: int | str = 0, name: str = "wdl") -> Any:
    """Return the version of each key, 0 where there is none."""
    array = np.asarray(keys, np.int64)
    found = np.zeros(array.shape, np.bool_)
    rows = server.lookup(array, name, table, found=found)
    return np.where(found, versions_in(array, rows), 0).tolist()


class TestLookup:
    def test_rows_are_those_of_the_files(self, server: HPS) -> None:
        for position, table in enumerate((ITEMS, USERS)):
            rows = server.lookup(table.keys, "wdl", position)
            assert rows.dtype == np.float32
            assert np.array_equal(rows, table.rows)

    def test_random_keys_of_any_kind_agree_with_a_dict(self, server: HPS) -> None:
        plain = oracle.Table(ITEMS.dim, ITEMS.default)
        plain.update(ITEMS.keys, ITEMS.rows)
        rng = np.random.default_rng(5)
        for _ in range(50):
            keys = rng.integers(-50, 1200, size=int(rng.integers(1, 700)))
            found = np.ones(keys.shape, np.bool_)
            rows = server.lookup(keys, "wdl", 0, found=found)
            assert np.array_equal(rows, plain.lookup(keys))
            assert np.array_equal(found, plain.found(keys))

    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0)])
    def test_the_shape_of_the_keys_is_kept(
        self, server: HPS, shape: tuple[int, ...]
    ) -> None:
        keys = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        rows = server.lookup(keys, "wdl", "users")
        assert rows.shape == (*shape, USERS.dim)
        assert np.array_equal(rows, versioned_rows(keys, USERS.version, USERS.dim))

    @pytest.mark.parametrize(
        "keys",
        [
            pytest.param([3, 1, 999], id="list"),
            pytest.param((3, 1, 999), id="tuple"),
            pytest.param(np.array([3, 1, 999], np.int32), id="int32"),
            pytest.param(np.array([3, 1, 999], np.uint64), id="uint64"),
            pytest.param(np.array([3, 1, 999], np.uint16), id="uint16"),
            pytest.param(np.array([3, 1, 999], ">i8"), id="big-endian"),
            pytest.param(np.array([3, 0, 1, 0, 999, 0])[::2], id="strided"),
            pytest.param(np.array([[3, 0], [1, 0], [999, 0]]).T[0], id="column"),
            pytest.param(np.array([999, 1, 3])[::-1], id="reversed"),
            pytest.param(
                np.frombuffer(np.array([3, 1, 999]).tobytes(), np.int64), id="ro"
            ),
            pytest.param(np.ma.masked_array([3, 1, 999]), id="subclass"),
            pytest.param(range(3, 4), id="range"),
            pytest.param(3, id="int"),
            pytest.param(np.int16(3), id="scalar"),
        ],
    )
    def test_any_integers_are_keys(self, server: HPS, keys: Any) -> None:
        plain = np.array(keys, np.int64)
        rows = server.lookup(keys, "wdl", 0)
        assert type(rows) is np.ndarray
        assert np.array_equal(rows, versioned_rows(plain, 1, ITEMS.dim))

    def test_a_matrix_of_keys_gives_rows_of_its_shape(self, server: HPS) -> None:
        keys = np.arange(6).reshape(2, 3)
        with pytest.warns(PendingDeprecationWarning):
            matrix = np.matrix(keys)
        rows = server.lookup(matrix, "wdl", 0)
        assert np.array_equal(rows, versioned_rows(keys, 1, ITEMS.dim))

    def test_an_empty_list_gives_no_rows(self, server: HPS) -> None:
        assert server.lookup([], "wdl", 0).shape == (0, ITEMS.dim)

    def test_every_int64_is_a_key(self, server: HPS) -> None:
        limits = np.iinfo(np.int64)
        keys = np.array([limits.min, -1, 0, limits.max], np.int64)
        assert versions(server, keys) == [0, 0, 1, 0]
        server.update("wdl", "items", keys, versioned_rows(keys, 7, ITEMS.dim))
        assert versions(server, keys) == [7, 7, 7, 7]
        as_unsigned = server.lookup(keys.view(np.uint64), "wdl", 0)
        assert np.array_equal(as_unsigned, server.lookup(keys, "wdl", 0))

    def test_unknown_keys_get_the_default_row(self, server: HPS) -> None:
        found = np.ones(3, np.bool_)
        rows = server.lookup([5, NOBODY, 6], "wdl", "users", found=found)
        assert found.tolist() == [True, False, True]
        assert rows[1].tolist() == [USERS.default] * USERS.dim
        assert server.stats().table("wdl", "users").defaults == 1

    def test_rows_are_written_to_out(self, server: HPS) -> None:
        out = np.full((2, 3, ITEMS.dim), np.nan, np.float32)
        keys = np.arange(6).reshape(2, 3)
        assert server.lookup(keys, "wdl", 0, out=out) is out
        assert np.array_equal(out, versioned_rows(keys, 1, ITEMS.dim))

    def test_a_slice_of_a_larger_buffer_is_an_out(self, server: HPS) -> None:
        buffer = np.full((10, ITEMS.dim), np.nan, np.float32)
        server.lookup([4, NOBODY, 6], "wdl", 0, out=buffer[3:6])
        assert np.array_equal(buffer[3:6, 0], [4, ITEMS.default, 6])
        assert np.isnan(buffer[:3]).all()
        assert np.isnan(buffer[6:]).all()

    def test_found_is_cleared_first(self, server: HPS) -> None:
        found = np.ones((2, 2), np.bool_)
        server.lookup([[1, NOBODY], [NOBODY, 2]], "wdl", 0, found=found)
        assert found.tolist() == [[True, False], [False, True]]

    def test_the_positional_signature_is_hugectrs(self, server: HPS) -> None:
        assert np.array_equal(
            server.lookup(USERS.keys, "wdl", 1, 0),
            server.lookup(USERS.keys, model_name="wdl", table_id=1, device_id=0),
        )

    def test_what_a_lookup_returned_stays_as_it_was(self, server: HPS) -> None:
        before = server.lookup([1, 2], "wdl", 0)
        server.update("wdl", 0, [1], versioned_rows([1], 2, ITEMS.dim))
        server.lookup([1, 2], "wdl", 0)
        assert versions_in([1, 2], before).tolist() == [1, 1]

    def test_keys_are_left_as_they_were(self, server: HPS) -> None:
        keys = np.array([3, 1, 3])
        server.lookup(keys, "wdl", 0)
        assert keys.tolist() == [3, 1, 3]

    def test_a_long_lookup_goes_in_chunks(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path, [model(tmp_path, [ITEMS])], volatile={"max_batch_size": 64}
        )
        keys = np.random.default_rng(2).integers(0, 1000, size=(40, 25))
        events: list[tuple[str, int]] = []
        with HPS(config) as server:
            session = server.session(
                "wdl", observer=lambda s, n, *_: events.append((s, n))
            )
            rows = session.lookup("items", keys)
        assert (versions_in(keys, rows) == 1).all()
        assert len([n for stage, n in events if stage == "local"]) == -(-1000 // 64)


class TestSession:
    def test_one_call_looks_several_tables_up(self, server: HPS) -> None:
        keys = {"items": np.arange(6).reshape(2, 3), "users": [7, NOBODY]}
        found = {"users": np.zeros(2, np.bool_)}
        out = {"items": np.empty((2, 3, ITEMS.dim), np.float32)}
        rows = server.session("wdl").lookup(keys, out=out, found=found)
        assert list(rows) == ["items", "users"]
        assert rows["items"] is out["items"]
        assert np.array_equal(rows["items"], versioned_rows(keys["items"], 1, 4))
        assert np.array_equal(rows["users"][0], versioned_rows(7, 2, 8))
        assert rows["users"][1].tolist() == [USERS.default] * 8
        assert found["users"].tolist() == [True, False]

    def test_no_tables_give_no_rows(self, server: HPS) -> None:
        assert server.session("wdl").lookup({}) == {}

    def test_a_device_has_one_session(self, tmp_path: Path) -> None:
        params = model(tmp_path, [ITEMS], deployed_devices=[0, 2])
        with HPS(server_config(tmp_path, [params])) as server:
            assert server.session("wdl", 2) is server.session("wdl", 2)
            assert server.session("wdl", 2) is not server.session("wdl", 0)
            assert np.array_equal(server.lookup([3], "wdl", 0, 2), ITEMS.rows[3:4])

    def test_tables_have_names_and_positions(self, server: HPS) -> None:
        session = server.session("wdl")
        assert np.array_equal(session.lookup(1, [3]), session.lookup("users", [3]))


class TestManyThreads:
    def test_eight_threads_get_their_own_rows(self, tmp_path: Path) -> None:
        config = server_config(
            tmp_path,
            [model(tmp_path, [ITEMS, USERS])],
            volatile={"max_bytes": 600_000, "max_batch_size": 128},
        )
        barrier = threading.Barrier(8)

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            barrier.wait(30)
            n_keys = 0
            for _ in range(60):
                name, table = ("items", ITEMS) if rng.integers(2) else ("users", USERS)
                keys = rng.integers(0, table.n_rows, size=(20, 25))
                rows = server.lookup(keys, "wdl", name)
                assert (versions_in(keys, rows) == table.version).all()
                n_keys += keys.size
            return n_keys

        with HPS(config) as server, ThreadPoolExecutor(8) as pool:
            n_keys = sum(pool.map(work, range(8)))
            tables = server.stats().tables
            assert sum(table.keys for table in tables) == n_keys == 8 * 60 * 500
            assert sum(table.lookups for table in tables) == 8 * 60

    def test_python_runs_while_rows_move(self, tmp_path: Path) -> None:
        """Another thread gets on during one call: the call lets go of the GIL."""
        wide = Table("wide", dim=1024, n_rows=4000, version=1)
        params = model(tmp_path, [wide], max_batchsize=60_000)
        keys = np.random.default_rng(1).integers(0, wide.n_rows, 60_000)
        out = np.empty((keys.size, wide.dim), np.float32)
        progress = [0]
        stop = threading.Event()

        def spin() -> None:
            while not stop.is_set():
                progress[0] += 1

        config = server_config(tmp_path, [params], persistent={"backend": "disabled"})
        with HPS(config) as server:
            host = server._stores.volatile
            assert host is not None
            found = np.zeros(keys.size, np.bool_)
            spinning = threading.Thread(target=spin)
            spinning.start()
            begin = progress[0]
            host.fetch("hps_et.wdl.wide", keys, out, found)
            during = progress[0] - begin
            stop.set()
            spinning.join()
        assert found.all()
        # 240 MB take tens of ms, in which a thread counts far; with the GIL held it
        # would stand still but for the moment before the call.
        assert during > 10_000
        assert (versions_in(keys, out) == 1).all()


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


class TestHalfPrecision:
    TABLE = Table("half", dim=4, n_rows=500, version=3, dtype="float16")

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[HPS]:
        with HPS(server_config(tmp_path, [model(tmp_path, [self.TABLE])])) as made:
            yield made

    def test_lookups_give_float32(self, server: HPS) -> None:
        rows = server.lookup([5, NOBODY, 7], "wdl", 0)
        assert rows.dtype == np.float32
        assert rows[:, 1].tolist() == [3.0, -1.0, 3.0]

    def test_out_may_have_the_stored_dtype(self, server: HPS) -> None:
        for dtype in (np.float16, np.float32):
            out = np.zeros((3, 4), dtype)
            server.lookup([5, NOBODY, 7], "wdl", 0, out=out)
            assert out[:, 0].tolist() == [5.0, -1.0, 7.0]

    def test_updates_are_rounded(self, server: HPS) -> None:
        rows = np.array([[0.1, 1e6, -1e-9, 2049.0]], np.float32)
        server.update("wdl", 0, [1], rows)
        with np.errstate(over="ignore"):
            expected = rows.astype(np.float16).astype(np.float32)
        assert np.array_equal(server.lookup([1], "wdl", 0), expected)


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

    def test_nothing_is_loaded_unless_configured(self, tmp_path: Path) -> None:
        off = {"initialize_after_startup": False}
        config = server_config(
            tmp_path, [model(tmp_path, [ITEMS])], volatile=off, persistent=off
        )
        with HPS(config) as server:
            assert versions(server, [0, 1]) == [0, 0]
            server.update("wdl", 0, [1], versioned_rows([1], 2, 4))
            assert versions(server, [0, 1]) == [0, 2]

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
