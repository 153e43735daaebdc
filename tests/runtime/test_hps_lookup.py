"""Lookups: keys of any kind in, rows of their shape out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.runtime.hps import HPS
from tests import oracle
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import (
    ITEMS,
    NOBODY,
    USERS,
    Table,
    model,
    server_config,
    versions,
)


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


@pytest.fixture
def short_turns() -> Iterator[None]:
    """Let no thread keep the GIL for long."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


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

    def test_python_runs_while_rows_move(
        self, tmp_path: Path, short_turns: None
    ) -> None:
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
        # 240 MB take tens of ms, in which a thread counts to a million and more. With
        # the GIL held it has a few turns around the call, and gets to ten thousands.
        assert during > 200_000
        assert (versions_in(keys, out) == 1).all()


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
