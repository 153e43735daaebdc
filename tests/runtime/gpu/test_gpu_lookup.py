"""Lookups through a GPU cache give what the tiers hold, wherever keys and rows are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hps_numba.errors import UnknownTableError
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.session import LookupSession
from tests.runtime.deployments import Table
from tests.runtime.gpu.foreign import Exchanged, uploaded
from tests.runtime.gpu.gpu_servers import (
    COLOURS,
    EDGES,
    ITEMS,
    MAX_KEYS,
    SHOPS,
    TABLES,
    USERS,
    Lent,
    downloaded,
    gpu_server,
    known,
    rows_for,
    some_keys,
    streams,
)

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


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu(0)


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
