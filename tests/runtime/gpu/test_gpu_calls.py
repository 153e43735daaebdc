"""Calls of a GPU cache: streams, devices, and calls that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ClosedError
from hps_numba.kernels.cuda.gpu import Gpu, PinnedBlock
from hps_numba.kernels.cuda.interchange import n_devices
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.session import LookupSession
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table
from tests.runtime.gpu.foreign import Described, uploaded
from tests.runtime.gpu.gpu_servers import (
    COLOURS,
    ITEMS,
    MAX_KEYS,
    SIZES,
    USERS,
    Guarded,
    Lent,
    downloaded,
    gpu_server,
    hold,
    known,
    rows_for,
    some_keys,
    streams,
)
from tests.support import fakegpu

pytestmark = pytest.mark.device

TABLES = (ITEMS, USERS, COLOURS, SIZES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    """Return a server whose rows no test changes; half of them are cached."""
    with gpu_server(tmp_path_factory.mktemp("server"), TABLES) as made:
        yield made


@pytest.fixture
def session(server: HPS) -> LookupSession:
    return server.session("wdl")


class Wrong:
    """Three keys of users with something that does not fit, and what is said of it."""

    def __init__(self, gpu: Gpu, what: str) -> None:
        self.rows = np.full((3, 5), 99, np.float32)
        self.flags = np.array([False, True, False])
        self.device = Guarded(gpu, (3, 5), np.float32)
        self.keys: Any = np.arange(3)
        self.out: Any = self.rows[:, :4].copy()
        self.found: Any = self.flags
        self.message = getattr(self, "_" + what)(gpu)

    def _dtype(self, gpu: Gpu) -> str:
        self.out = self.out.astype(np.float64)
        return "out is a NumPy array of float32; got float64"

    def _shape(self, gpu: Gpu) -> str:
        self.out = self.rows
        return r"out has shape \(3, 5\); these keys need \(3, 4\)"

    def _strides(self, gpu: Gpu) -> str:
        self.out = self.rows[:, :4]
        return "out must be contiguous and writable"

    def _device_shape(self, gpu: Gpu) -> str:
        self.out = self.device.array
        return r"out has shape \(3, 5\); these keys need \(3, 4\)"

    def _side(self, gpu: Gpu) -> str:
        self.keys = uploaded(gpu, self.keys)
        return "out is an array on device 0, as the rows are; got ndarray"

    def _marks(self, gpu: Gpu) -> str:
        self.found = self.flags.astype(np.uint8)
        return "found is a NumPy array of bool; got uint8"

    def _marks_shape(self, gpu: Gpu) -> str:
        self.found = self.flags[:2]
        return r"found has shape \(2,\); these keys need \(3,\)"

    def _too_many(self, gpu: Gpu) -> str:
        self.keys, self.out = np.zeros(MAX_KEYS + 1, np.int64), None
        return "a lookup of 401 keys exceeds the limit of 400"

    def _no_keys(self, gpu: Gpu) -> str:
        self.keys, self.out = uploaded(gpu, np.zeros(3, np.int32)), None
        return "keys on a device are int64 or uint64"

    def untouched(self) -> bool:
        rows = (self.rows == 99).all() and self.device.untouched()
        outs = self.out is None or self.out is self.device.array
        outs = outs or bool((np.asarray(self.out) == 99).all())
        return rows and outs and self.flags.tolist() == [False, True, False]


class TestRefusedCalls:
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize(
        "what",
        [
            *("dtype", "shape", "strides", "device_shape", "side"),
            *("marks", "marks_shape", "too_many", "no_keys"),
        ],
    )
    def test_nothing_is_written_whichever_table_comes_first(
        self, session: LookupSession, gpu: Gpu, what: str, first: bool
    ) -> None:
        wrong = Wrong(gpu, what)
        right, marks = Guarded(gpu, (2, 4), np.float32), np.array([False, True])
        names = ("users", "items") if first else ("items", "users")
        with pytest.raises((TypeError, ValueError), match=f"users: {wrong.message}"):
            session.lookup(
                {
                    n: wrong.keys if n == "users" else uploaded(gpu, [1, 2])
                    for n in names
                },
                out={"users": wrong.out, "items": right.array},
                found={"users": wrong.found, "items": marks},
            )
        gpu.wait(0)
        assert wrong.untouched()
        assert right.untouched()
        assert marks.tolist() == [False, True]
        keys = ITEMS.keys[:50]
        assert np.array_equal(session.lookup("items", keys), rows_for(ITEMS, keys))

    def test_empty_arrays_have_no_address(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        def empty(shape: tuple[int, ...], typestr: str) -> Described:
            described = {"shape": shape, "typestr": typestr, "data": (0, False)}
            return Described(described | {"strides": None, "version": 3})

        keys, out = empty((0, 3), "<i8"), empty((0, 3, 4), "<f4")
        assert session.lookup("items", keys, out=out) is out
        users = uploaded(gpu, USERS.keys[:5])
        rows = session.lookup({"items": keys, "users": users}, out={"items": out})
        assert rows["items"] is out
        assert np.array_equal(downloaded(gpu, rows["users"]), USERS.rows[:5])

    def test_refused_calls_are_no_failed_lookups(
        self, session: LookupSession, server: HPS
    ) -> None:
        with pytest.raises(ValueError, match="rows of one dtype"):
            session.lookup(
                {"sizes": [1], "colours": [1]},
                out={"sizes": np.zeros((1, 4), np.float16)},
            )
        assert server.stats().table("wdl", "sizes").errors == 0

    @pytest.mark.parametrize("stream", ["default", object(), np.int64(0), 0.0])
    def test_a_stream_that_is_none_is_refused(
        self, session: LookupSession, stream: Any
    ) -> None:
        with pytest.raises(TypeError, match="a stream is a handle, or has"):
            session.lookup("items", [1], stream=stream)

    def test_tables_of_one_launch_give_rows_of_one_dtype(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys, marks = (
            np.arange(5),
            {n: np.zeros(5, np.bool_) for n in ("sizes", "items")},
        )
        half = np.full((5, 4), 99, np.float16)
        there = Guarded(gpu, (5, 4), np.float16)
        message = "out of hps_et.wdl.colours is float32 and that of hps_et.wdl.sizes"
        for out in (half, there.array):
            with pytest.raises(ValueError, match=message):
                session.lookup(
                    {"items": keys, "sizes": keys, "colours": keys},
                    out={"sizes": out},
                    found=marks,
                )
        assert (half == 99).all()
        assert there.untouched()
        assert not marks["sizes"].any()
        assert not marks["items"].any()

    def test_a_closed_server_looks_nothing_up(self, tmp_path: Path, gpu: Gpu) -> None:
        server = gpu_server(tmp_path, TABLES)
        session, keys = server.session("wdl"), uploaded(gpu, [1, 2])
        out = Guarded(gpu, (2, 4), np.float32)
        server.close()
        for given in (keys, [1, 2]):
            with pytest.raises(ClosedError, match="the server is closed"):
                session.lookup("items", given, out=out.array)
        server.close()
        assert out.untouched()


class Late(Lent):
    """Keys that are on their way to the device on a stream of their owner's."""

    def __init__(self, gpu: Gpu, keys: Any, stream: int) -> None:
        super().__init__(uploaded(gpu, np.zeros_like(keys)), stream)
        self.host = PinnedBlock(gpu, keys.nbytes)
        self.host.array.view(np.int64)[:] = keys
        gpu.copy(self.array.address, self.host.address, keys.nbytes, stream)


class TestStreams:
    @pytest.mark.parametrize("seed", range(6))
    def test_rows_are_there_in_the_order_of_the_stream(
        self, session: LookupSession, gpu: Gpu, seed: int
    ) -> None:
        """Nobody waits for any other stream: neither the lane's nor the default one."""
        fake = fakegpu.current()
        if fake is not None:
            fake.reseed(seed)
        rng = np.random.default_rng(seed)
        with streams(gpu, 2) as made:
            for stream in made * 2:
                plain = {t.name: some_keys(rng, t, 60) for t in (ITEMS, USERS, COLOURS)}
                keys = {n: Late(gpu, k, made[0]) for n, k in plain.items()}
                keys["users"] = plain["users"]  # in host memory
                out = Guarded(gpu, (60, 4), np.float32)
                rows = session.lookup(keys, out={"items": out.array}, stream=stream)
                assert np.array_equal(out.rows(stream), rows_for(ITEMS, plain["items"]))
                for table in (USERS, COLOURS):
                    got = downloaded(gpu, rows[table.name], stream)
                    assert np.array_equal(got, rows_for(table, plain[table.name]))
                del rows

    @pytest.mark.parametrize("seed", range(4))
    def test_keys_are_read_when_their_owner_has_written_them(
        self, session: LookupSession, gpu: Gpu, seed: int
    ) -> None:
        fake = fakegpu.current()
        if fake is not None:
            fake.reseed(seed)
        plain = some_keys(np.random.default_rng(seed), USERS, 80)
        with streams(gpu, 2) as (theirs, mine):
            for stream in (None, mine):
                late = Late(gpu, plain, theirs)
                rows = session.lookup("users", late, stream=stream)
                got = downloaded(gpu, rows, stream or 0)
                assert np.array_equal(got, rows_for(USERS, plain))
                del rows

    def test_an_output_is_written_when_its_owner_is_done_with_it(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        fake, keys = fakegpu.current(), USERS.keys[:40]
        for seed in range(6):
            if fake is not None:
                fake.reseed(seed)
            out = uploaded(gpu, np.zeros((40, 4), np.float32))
            with streams(gpu, 2) as (theirs, mine):
                gpu.zero(out.address, out.nbytes, theirs)
                session.lookup("users", keys, out=Lent(out, theirs), stream=mine)
                got = downloaded(gpu, out, mine)
                assert np.array_equal(got, rows_for(USERS, keys))

    def test_a_lookup_leaves_what_the_last_one_of_its_lane_has_still_to_do(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        """The last one's rows are on their way to its output and into the cache."""
        fake, rng = fakegpu.current(), np.random.default_rng(9)
        options = {"cache_size_percentage": 0.2, "number_of_worker_buffers_in_pool": 1}
        with (
            gpu_server(tmp_path, TABLES, block_rows=400, **options) as made,
            streams(gpu, 3) as several,
        ):
            session = made.session("wdl")
            for seed in range(6):
                if fake is not None:
                    fake.reseed(seed)
                plain = [rng.permutation(ITEMS.keys)[:90] for _ in several]
                keys = [uploaded(gpu, k) for k in plain]
                rows = [
                    session.lookup("items", k, stream=stream)
                    for k, stream in zip(keys, several, strict=True)
                ]
                for k, got, stream in zip(plain, rows, several, strict=True):
                    here = downloaded(gpu, got, stream)
                    assert np.array_equal(here, rows_for(ITEMS, k))
                rows.clear()

    def test_a_stream_is_a_handle_or_has_one(
        self, session: LookupSession, gpu: Gpu
    ) -> None:
        keys = USERS.keys[:9]
        for stream in (gpu.launcher.device.create_stream(), 0, 1):
            rows = session.lookup("users", keys, stream=stream)
            handle = stream if isinstance(stream, int) else int(stream.handle)
            assert np.array_equal(downloaded(gpu, rows, handle), rows_for(USERS, keys))
            gpu.wait(handle)
            del rows


@pytest.fixture(scope="class")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    if n_devices() < 2:
        pytest.skip("one device has no second replica")
    root = tmp_path_factory.mktemp("two")
    options: dict[str, Any] = {"deployed_device_list": [0, 1]}
    with gpu_server(root, (ITEMS, USERS), cache_size_percentage=1.0, **options) as made:
        yield made


class TestTwoDevices:
    def test_each_device_gives_rows_in_its_memory(self, two: HPS) -> None:
        keys = some_keys(np.random.default_rng(8), ITEMS, 90)
        for device in (0, 1):
            gpu, session = Gpu(device), two.session("wdl", device)
            rows = session.lookup("items", uploaded(gpu, keys))
            assert rows.__dlpack_device__()[1] == device
            assert np.array_equal(downloaded(gpu, rows), rows_for(ITEMS, keys))
            assert np.array_equal(session.lookup("items", keys), rows_for(ITEMS, keys))

    def test_arrays_of_the_other_device_are_refused(self, two: HPS) -> None:
        for device in (0, 1):
            there = Gpu(1 - device)
            keys, out = uploaded(there, [1, 2]), Guarded(there, (2, 4), np.float32)
            session = two.session("wdl", device)
            message = f"is on device {1 - device}, the cache on {device}"
            with pytest.raises(ValueError, match=f"keys: the array {message}"):
                session.lookup("items", keys)
            with pytest.raises(ValueError, match=f"out: the array {message}"):
                session.lookup("items", [1, 2], out=out.array)
            assert out.untouched()

    def test_streams_of_the_other_device_are_refused(self, two: HPS) -> None:
        for device in (0, 1):
            session = two.session("wdl", device)
            with streams(Gpu(device), 1) as mine, streams(Gpu(1 - device), 1) as theirs:
                rows = session.lookup("items", [1, 2], stream=mine[0])
                got = downloaded(Gpu(device), rows, mine[0])
                assert np.array_equal(got, rows_for(ITEMS, [1, 2]))
                message = f"'wdl': the stream is of device {1 - device}, the session of"
                with pytest.raises(ValueError, match=f"{message} {device}"):
                    session.lookup("items", [1, 2], stream=theirs[0])

    def test_lookups_of_one_device_leave_the_other_ones_cache(self, two: HPS) -> None:
        def rows_cached() -> list[int]:
            return [use.rows for use in two.stats().table("wdl", "users").tiers[:2]]

        hold(two, [USERS])
        before = rows_cached()
        assert before == [USERS.keys.size] * 2
        two.delete("wdl", "users", [5])
        two.update("wdl", "users", [5], versioned_rows([5], USERS.version, 4))
        assert rows_cached() == [USERS.keys.size - 1] * 2
        two.session("wdl", 1).lookup("users", [5])
        assert rows_cached() == [USERS.keys.size - 1, USERS.keys.size]

    def test_updates_and_deletes_reach_both(self, two: HPS) -> None:
        keys = np.arange(100)
        hold(two, [ITEMS])
        hold(two, [ITEMS], device=1)
        two.update("wdl", "items", keys, versioned_rows(keys, 9, 4))
        two.delete("wdl", "items", keys[:10])
        newer = Table("items", dim=4, n_rows=100, version=9, default=ITEMS.default)
        wanted = rows_for(newer, keys)
        wanted[:10] = ITEMS.default
        for device in (0, 1):
            found = np.zeros(100, np.bool_)
            session = two.session("wdl", device)
            assert np.array_equal(session.lookup("items", keys, found=found), wanted)
            assert np.array_equal(found, known(ITEMS, keys) & (keys >= 10))
        two.update("wdl", "items", keys, versioned_rows(keys, ITEMS.version, 4))
