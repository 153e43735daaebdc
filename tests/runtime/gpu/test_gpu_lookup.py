"""Lookups through a GPU cache give what the tiers hold, wherever keys and rows are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import UnknownTableError
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.session import LookupSession
from tests.runtime.deployments import Table
from tests.runtime.gpu.foreign import Exchanged, uploaded
from tests.runtime.gpu.gpu_servers import (
    BRANDS,
    COLOURS,
    EDGES,
    ITEMS,
    MAX_KEYS,
    SHOPS,
    SIZES,
    TABLES,
    USERS,
    Guarded,
    Lent,
    downloaded,
    gpu_server,
    known,
    launched,
    rows_for,
    some_keys,
    streams,
)
from tests.support import fakegpu

pytestmark = pytest.mark.device

KINDS = {
    "DeviceArray": lambda array: array,
    "described": Lent,
    "DLPack": Exchanged,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    """Return a server whose rows no test changes; half of them are cached."""
    with gpu_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def session(server: HPS) -> LookupSession:
    return server.session("wdl")


class TestOneTable:
    @pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
    def test_host_keys_give_rows_in_host_memory(
        self, session: LookupSession, table: Table
    ) -> None:
        rng = np.random.default_rng(1)
        for n in (1, 33, 400):
            keys = some_keys(rng, table, n)
            found = np.zeros(n, np.bool_)
            rows = session.lookup(table.name, keys, found=found)
            assert type(rows) is np.ndarray
            assert rows.dtype == np.float32
            assert np.array_equal(rows, rows_for(table, keys))
            assert np.array_equal(found, known(table, keys))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("table", [USERS, SHOPS, COLOURS], ids=lambda t: t.name)
    def test_keys_on_the_device_give_rows_there(
        self, session: LookupSession, gpu: Gpu, table: Table, kind: str
    ) -> None:
        rng = np.random.default_rng(2)
        for n in (1, 33, 400):
            keys = some_keys(rng, table, n)
            given = KINDS[kind](uploaded(gpu, keys))
            found = np.zeros(n, np.bool_)
            rows = session.lookup(table.name, given, found=found)
            assert not isinstance(rows, np.ndarray)
            assert np.array_equal(downloaded(gpu, rows), rows_for(table, keys))
            assert np.array_equal(found, known(table, keys))

    def test_a_table_has_a_name_and_a_position(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        for position, table in enumerate(TABLES):
            keys = table.keys[::7]
            for asked in (position, np.int64(position), table.name):
                assert np.array_equal(
                    session.lookup(asked, keys), rows_for(table, keys)
                )
                rows = session.lookup(asked, uploaded(gpu, keys))
                assert np.array_equal(downloaded(gpu, rows), rows_for(table, keys))

    @pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0,), (4, 0)])
    def test_the_shape_of_the_keys_is_kept(
        self, session: LookupSession, gpu: Gpu, shape: tuple[int, ...]
    ) -> None:
        keys = some_keys(np.random.default_rng(3), SHOPS, shape)
        wanted = rows_for(SHOPS, keys)
        assert wanted.shape == (*shape, SHOPS.dim)
        for given in (keys, uploaded(gpu, keys)):
            found = np.ones(shape, np.bool_)
            rows = session.lookup("shops", given, found=found)
            assert rows.shape == wanted.shape
            on_host = rows if given is keys else downloaded(gpu, rows)
            assert np.array_equal(on_host, wanted)
            assert np.array_equal(found, known(SHOPS, keys))

    def test_keys_may_repeat_and_be_at_the_edges(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys = np.repeat(np.concatenate([EDGES, EDGES + 1, [7]]), 5)
        for table in (ITEMS, USERS, SHOPS):
            wanted = rows_for(table, keys)
            for _ in range(2):  # first missed, then hit
                assert np.array_equal(session.lookup(table.name, keys), wanted)
            rows = session.lookup(table.name, uploaded(gpu, keys))
            assert np.array_equal(downloaded(gpu, rows), wanted)

    @pytest.mark.parametrize("dtype", ["uint64", "int32", "uint8", ">i8"])
    def test_host_keys_are_of_any_integer_dtype(
        self, session: LookupSession, dtype: str
    ) -> None:
        keys = np.array([3, 250, 0, 200], dtype)
        assert np.array_equal(session.lookup("users", keys), rows_for(USERS, keys))

    def test_uint64_keys_on_the_device_wrap_around(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys = np.concatenate([EDGES, [5, 1000]]).astype(np.uint64)
        rows = session.lookup("items", uploaded(gpu, keys))
        assert np.array_equal(downloaded(gpu, rows), rows_for(ITEMS, keys))

    @pytest.mark.parametrize("dtype", ["int32", "uint32", "float64", "int16"])
    def test_other_keys_on_the_device_are_refused(
        self, session: LookupSession, gpu: Gpu, dtype: str
    ) -> None:
        keys = uploaded(gpu, np.zeros(3, dtype))
        with pytest.raises(TypeError, match=f"users: keys .*int64 or uint64.*{dtype}"):
            session.lookup("users", keys)

    def test_host_keys_with_a_stream_give_rows_on_the_device(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys = some_keys(np.random.default_rng(4), ITEMS, (7, 9))
        with streams(gpu, 1) as (stream,):
            for given in (0, stream):
                rows = session.lookup("items", keys, stream=given)
                assert not isinstance(rows, np.ndarray)
                got = downloaded(gpu, rows, given)
                assert np.array_equal(got, rows_for(ITEMS, keys))
                del rows

    def test_a_lookup_of_too_many_keys_is_refused(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys = np.zeros(MAX_KEYS + 1, np.int64)
        for given in (keys, uploaded(gpu, keys)):
            with pytest.raises(ValueError, match=r"items: a lookup of 401 keys"):
                session.lookup("items", given)

    def test_a_table_that_is_not_there_is_named(self, session: LookupSession) -> None:
        with pytest.raises(UnknownTableError, match="no table 'nobody'"):
            session.lookup("nobody", [1])
        with pytest.raises(UnknownTableError, match="no table 6"):
            session.lookup(6, [1])


class Question:
    """One table of a lookup: keys and outputs on either side, and the answer."""

    def __init__(
        self, rng: np.random.Generator, gpu: Gpu, table: Table, half: bool
    ) -> None:
        self.table, self._gpu = table, gpu
        shape = (int(rng.integers(0, 5)), int(rng.integers(1, 30)))
        self.plain = some_keys(rng, table, shape)
        self.on_device = bool(rng.random() < 0.5)
        self.keys: Any = uploaded(gpu, self.plain) if self.on_device else self.plain
        self.found = np.zeros(shape, np.bool_) if rng.random() < 0.7 else None
        dtype = np.float16 if half and table.dtype == "float16" else np.float32
        self.wanted = rows_for(table, self.plain, dtype)
        self.guarded: Guarded | None = None
        self.out: Any = None
        if dtype == np.float16 or rng.random() < 0.5:
            if not self.on_device and rng.random() < 0.5:
                self.out = np.full(self.wanted.shape, 99, dtype)
            else:
                offset = 256 + 16 * int(rng.integers(0, 8))
                shape = self.wanted.shape
                self.guarded = Guarded(gpu, shape, dtype, offset=offset)
                self.out, self.on_device = self.guarded.array, True

    def check(self, rows: Any) -> None:
        """Compare with what a lookup returned."""
        assert isinstance(rows, np.ndarray) is not self.on_device
        assert self.out is None or rows is self.out
        got = rows
        if self.guarded is not None:
            got = self.guarded.rows()
        elif self.on_device:
            got = downloaded(self._gpu, rows)
        assert got.dtype == self.wanted.dtype
        assert np.array_equal(got, self.wanted)
        if self.found is not None:
            assert np.array_equal(self.found, known(self.table, self.plain))


class TestSeveralTables:
    @pytest.mark.parametrize("seed", range(12))
    def test_any_mixture_of_tables_and_places_gives_each_its_rows(
        self, session: LookupSession, gpu: Gpu, seed: int
    ) -> None:
        fake = fakegpu.current()
        if fake is not None:
            fake.reseed(seed)
        rng = np.random.default_rng(seed)
        for _ in range(3):
            chosen = rng.permutation(len(TABLES))[: int(rng.integers(1, 7))]
            half = bool(rng.random() < 0.5)
            asked = [Question(rng, gpu, TABLES[i], half) for i in chosen]
            rows = session.lookup(
                {one.table.name: one.keys for one in asked},
                out={one.table.name: one.out for one in asked if one.out is not None},
                found={
                    one.table.name: one.found for one in asked if one.found is not None
                },
            )
            assert list(rows) == [one.table.name for one in asked]
            for one in asked:
                one.check(rows[one.table.name])

    def test_a_group_of_tables_is_one_launch(
        self, tmp_path: Path, gpu: Gpu, server: HPS
    ) -> None:
        fake = fakegpu.current()
        if fake is None:
            pytest.skip("only the stand-in remembers launches")
        with gpu_server(tmp_path, cache_size_percentage=1.0) as made:
            session = made.session("wdl")
            for tables, n in (
                ([ITEMS], 1),
                ([ITEMS, USERS, BRANDS], 1),
                ([BRANDS, ITEMS], 1),  # the one between them is left out
                ([USERS, SHOPS], 2),
                (TABLES, 3),
            ):
                keys = {table.name: table.keys[::5] for table in tables}
                before = len(fake.launches)
                rows = session.lookup(keys)
                assert launched(fake, before) == ["query"] * n
                for table in tables:
                    wanted = rows_for(table, keys[table.name])
                    assert np.array_equal(rows[table.name], wanted)

    @pytest.mark.parametrize("longest", [ITEMS, USERS, BRANDS], ids=lambda t: t.name)
    def test_any_table_may_have_the_most_keys(
        self, session: LookupSession, longest: Table
    ) -> None:
        rng = np.random.default_rng(11)
        keys = {
            t.name: some_keys(rng, t, MAX_KEYS if t is longest else 2)
            for t in (ITEMS, USERS, BRANDS)
        }
        rows = session.lookup(keys)
        for table in (ITEMS, USERS, BRANDS):
            wanted = rows_for(table, keys[table.name])
            assert np.array_equal(rows[table.name], wanted)

    def test_no_tables_give_no_rows(self, session: LookupSession) -> None:
        assert session.lookup({}) == {}
        assert session.lookup({}, stream=0) == {}

    def test_tables_without_keys_launch_nothing(self, session: LookupSession) -> None:
        fake = fakegpu.current()
        before = len(fake.launches) if fake else 0
        rows = session.lookup({t.name: np.zeros((0, 2), int) for t in TABLES})
        assert [rows[t.name].shape for t in TABLES] == [(0, 2, t.dim) for t in TABLES]
        assert fake is None or launched(fake, before) == []

    def test_a_table_is_asked_once(self, session: LookupSession) -> None:
        asked: Any = {"users": [1, 2], 1: [3]}
        with pytest.raises(ValueError, match="users is asked for twice"):
            session.lookup(asked)
        rows: Any = session.lookup({0: [1], "users": [2]})  # type: ignore[dict-item]
        assert np.array_equal(rows[0], rows_for(ITEMS, [1]))


class TestOutputs:
    @pytest.mark.parametrize(
        ("table", "dtype", "offset"),
        [
            (ITEMS, np.float32, 256),
            (ITEMS, np.float32, 260),
            (COLOURS, np.float32, 264),
            (COLOURS, np.float16, 256),
            (COLOURS, np.float16, 258),
        ],
    )
    def test_an_output_may_begin_at_any_item(
        self, session: LookupSession, gpu: Gpu, table: Table, dtype: Any, offset: int
    ) -> None:
        keys = some_keys(np.random.default_rng(6), table, (5, 9))
        for given in (keys, uploaded(gpu, keys)):
            out = Guarded(gpu, (5, 9, table.dim), dtype, offset=offset)
            assert session.lookup(table.name, given, out=out.array) is out.array
            assert np.array_equal(out.rows(), rows_for(table, keys, dtype))

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_host_outputs_take_stored_rows_too(
        self, session: LookupSession, dtype: Any
    ) -> None:
        asked = {t.name: t.keys[::3] for t in (COLOURS, SIZES)}
        out = {name: np.full((k.size, 4), 99, dtype) for name, k in asked.items()}
        rows = session.lookup(asked, out=out)
        for table in (COLOURS, SIZES):
            assert rows[table.name] is out[table.name]
            wanted = rows_for(table, asked[table.name], dtype)
            assert np.array_equal(out[table.name], wanted)

    def test_outputs_at_odd_addresses_are_refused(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        out = Guarded(gpu, (3, 4), np.float32, offset=258)
        with pytest.raises(ValueError, match="no multiple of their 4 bytes"):
            session.lookup("items", uploaded(gpu, [1, 2, 3]), out=out.array)
        assert out.untouched()
