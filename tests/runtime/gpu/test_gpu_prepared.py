"""Prepared lookups: launches in buffers of their own, and what brings missing rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver

from hps_numba.errors import (
    ClosedError,
    DeviceError,
    TierUnavailableError,
    UnknownTableError,
)
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows
from tests.runtime.deployments import Wraps
from tests.runtime.gpu.foreign import uploaded
from tests.runtime.gpu.gpu_servers import (
    BRANDS,
    COLOURS,
    ITEMS,
    USERS,
    downloaded,
    gpu_server,
    known,
    launched,
    rows_for,
    some_keys,
    streams,
)
from tests.support import fakegpu
from tests.support.wrappers import FailingTier

pytestmark = pytest.mark.device

TABLES = (ITEMS, USERS, BRANDS, COLOURS)
BY_NAME = {table.name: table for table in TABLES}
SIZES = {"users": 90, "colours": 40, "items": 60}  # brands, in between, are left out


@contextmanager
def serving(root: Path, *, share: float = 1.0, **options: Any) -> Iterator[HPS]:
    """Give a server whose caches have all rows or a share; 28 are fetched at once."""
    with gpu_server(
        root, TABLES, block_rows=28, cache_size_percentage=share, **options
    ) as server:
        yield server


def take_out(server: HPS, n: int) -> None:
    """Take the first keys of each table out of its cache, and leave them stored."""
    for table in TABLES:
        server.delete("wdl", table.name, table.keys[:n])
        server.update("wdl", table.name, table.keys[:n], table.rows[:n])


def write(gpu: Gpu, prepared: Any, keys: Mapping[str, Any], stream: int = 0) -> None:
    """Bring keys into the buffers of a lookup, in the order of a stream."""
    for name, some in keys.items():
        address = prepared.keys[name].__cuda_array_interface__["data"][0]
        assert prepared.keys[name].shape == some.shape
        gpu.copy(address, some.ctypes.data, some.nbytes, stream)


def random_keys(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: some_keys(rng, BY_NAME[name], n) for name, n in SIZES.items()}


def check(
    gpu: Gpu, prepared: Any, keys: Mapping[str, Any], stream: int = 0, *, n_out: int = 0
) -> None:
    """Compare the rows with those of tables that lack their first keys."""
    for name, some in keys.items():
        table, rows = BY_NAME[name], prepared.rows[name]
        wanted = rows_for(table, some)
        wanted[(some >= 0) & (some < n_out)] = table.default
        got = downloaded(gpu, rows, stream)
        assert got.dtype == np.float32
        assert np.array_equal(got, wanted)


def n_unique(keys: Mapping[str, Any], n_out: int) -> int:
    """Return how many unique keys a cache lacks that has all but the first ones."""
    return sum(
        np.unique(k[~known(BY_NAME[n], k) | ((k >= 0) & (k < n_out))]).size
        for n, k in keys.items()
    )


class Handle:
    """A stream of a handle."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class TestLaunches:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_launch_gives_what_is_cached_and_completing_the_rest(
        self, tmp_path: Path, gpu: Gpu, seed: int
    ) -> None:
        fake = fakegpu.current()
        if fake is not None:
            fake.reseed(seed)
        with serving(tmp_path) as server, streams(gpu, 1) as (mine,):
            take_out(server, 50)
            with server.session("wdl").prepare(SIZES) as prepared:
                assert list(prepared.keys) == list(prepared.rows) == list(SIZES)
                for stream, n_out in ((0, 50), (mine, 50), (mine, 0)):
                    keys = random_keys(seed)
                    if stream == 0:
                        keys = {n: np.roll(k, 7) % 100 + 50 for n, k in keys.items()}
                    write(gpu, prepared, keys, stream)
                    prepared.launch(stream)
                    check(gpu, prepared, keys, stream, n_out=n_out)
                    assert prepared.complete(stream) == n_unique(keys, n_out)
                    check(gpu, prepared, keys, stream)
                prepared.launch(mine)
                prepared.launch(mine)
                check(gpu, prepared, keys, mine)

    @pytest.mark.parametrize("seed", range(6))
    def test_each_launch_follows_the_last_one_at_once(
        self, tmp_path: Path, gpu: Gpu, seed: int
    ) -> None:
        """What is left of a completion must not meet the keys of the next launch."""
        fake, rng = fakegpu.current(), np.random.default_rng(seed)
        with serving(tmp_path, share=0.4) as server, streams(gpu, 1) as (mine,):
            session = server.session("wdl")
            if fake is not None:
                fake.reseed(seed)
            for n_launches in (1, 5, 2, 3):
                with session.prepare({"items": 60, "users": 40}) as prepared:
                    prepared.launch(mine)
                    if fake is not None:  # new memory holds keys that nobody has
                        rows = downloaded(gpu, prepared.rows["items"], mine)
                        assert (rows == ITEMS.default).all()
                    for _ in range(n_launches):
                        keys = {
                            "items": rng.permutation(ITEMS.keys)[:60],
                            "users": rng.permutation(USERS.keys)[:40],
                        }
                        write(gpu, prepared, keys, mine)
                        prepared.launch(mine)
                        prepared.complete(mine)
                    check(gpu, prepared, keys, mine)
            for table in (ITEMS, USERS):
                rows = session.lookup(table.name, table.keys)
                assert np.array_equal(rows, rows_for(table, table.keys))

    def test_a_captured_launch_looks_up_what_the_keys_hold(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        device = gpu.launcher.device
        with (
            serving(tmp_path, share=0.4) as server,
            streams(gpu, 1) as (mine,),
            server.session("wdl").prepare(SIZES) as prepared,
        ):
            builder = device.create_graph_builder().begin_building()
            prepared.launch(builder)
            graph = builder.end_building().complete()
            stream = device.create_stream(Handle(mine))
            for seed in range(5):
                keys = random_keys(seed)
                write(gpu, prepared, keys, mine)
                graph.launch(stream)
                assert prepared.complete(mine) > 0
                check(gpu, prepared, keys, mine)
            # What an update wrote, the next replay finds.
            newer = versioned_rows(np.arange(60), 9, 4)
            keys["items"] = np.arange(60)
            write(gpu, prepared, keys, mine)
            server.lookup(np.arange(60), "wdl", "items")
            server.update("wdl", "items", np.arange(60), newer)
            server.delete("wdl", "items", [3, 4])
            graph.launch(stream)
            assert prepared.complete(mine) >= 2
            newer[[3, 4]] = ITEMS.default
            got = downloaded(gpu, prepared.rows["items"], mine)
            assert np.array_equal(got, newer)

    def test_a_launch_is_one_call_a_group(self, tmp_path: Path, gpu: Gpu) -> None:
        """No memory is taken, nothing is copied, and nobody waits."""
        fake = fakegpu.current()
        if fake is None:
            pytest.skip("only the stand-in counts calls")
        with (
            serving(tmp_path) as server,
            server.session("wdl").prepare(SIZES) as prepared,
        ):
            write(gpu, prepared, random_keys(1))
            gpu.wait(0)
            before, n_before = fakegpu.calls(), len(fake.launches)
            for _ in range(3):
                prepared.launch()
            made = fakegpu.calls() - before
            del made["cuCtxGetCurrent"]
            assert made == {"cuLaunchKernel": 2 * 3}
            assert launched(fake, n_before) == []
            gpu.wait(0)
            assert launched(fake, n_before) == ["query"] * 6

    def test_hits_only_are_completed_by_reading_so(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        fake = fakegpu.current()
        keys = {n: np.arange(size) for n, size in SIZES.items()}
        with (
            serving(tmp_path) as server,
            server.session("wdl").prepare(SIZES) as prepared,
        ):
            write(gpu, prepared, keys)
            n_before = len(fake.launches) if fake else 0
            prepared.launch()
            assert prepared.complete() == 0
            check(gpu, prepared, keys)
            assert fake is None or launched(fake, n_before) == ["query"] * 2

    def test_two_lookups_are_in_flight_at_once(self, tmp_path: Path, gpu: Gpu) -> None:
        """Both lack the same keys, and each brings them to its own rows."""
        with serving(tmp_path, share=0.2) as server, streams(gpu, 2) as made:
            session = server.session("wdl")
            with session.prepare(SIZES) as one, session.prepare(SIZES) as other:
                for seed in range(4):
                    keys, others = random_keys(seed), random_keys(seed + 1)
                    write(gpu, one, keys, made[0])
                    write(gpu, other, others, made[1])
                    one.launch(made[0])
                    other.launch(made[1])
                    assert other.complete(made[1]) > 0
                    assert one.complete(made[0]) > 0
                    rows = session.lookup("items", keys["items"])
                    assert np.array_equal(rows, rows_for(ITEMS, keys["items"]))
                    check(gpu, one, keys, made[0])
                    check(gpu, other, others, made[1])

    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"items": 0},
            {"items": 0, "users": 0, "colours": 3},
            {"users": 0, "brands": 5, "items": 1},
            {"brands": 7},
        ],
    )
    def test_tables_may_have_no_keys(
        self, tmp_path: Path, gpu: Gpu, sizes: dict[str, int]
    ) -> None:
        keys = {name: np.arange(n) * 30 for name, n in sizes.items()}
        with (
            serving(tmp_path, share=0.3) as server,
            server.session("wdl").prepare(sizes) as prepared,
        ):
            for _ in range(2):
                write(gpu, prepared, keys)
                prepared.launch()
                prepared.complete()
                check(gpu, prepared, keys)


class TestCalls:
    @pytest.mark.parametrize(
        ("sizes", "error", "message"),
        [
            ({"items": 5, "nobody": 5}, UnknownTableError, "no table 'nobody'"),
            ({"users": 5, "items": 401}, ValueError, "items: .*401 keys exceeds"),
            ({"users": 5, "items": 10**13}, ValueError, "items: .*exceeds the limit"),
            ({"users": 5, "items": -1}, ValueError, "items: .*-1 keys"),
            ({"users": 5, "items": 2.5}, TypeError, "items: 2.5 is no"),
            ({"users": 5, 1: 5}, ValueError, "users is asked for twice"),
        ],
    )
    def test_sizes_that_do_not_fit_take_nothing(
        self, tmp_path: Path, sizes: Any, error: type[Exception], message: str
    ) -> None:
        fake = fakegpu.current()
        with serving(tmp_path) as server:
            session = server.session("wdl")
            before = fakegpu.calls()
            with pytest.raises(error, match=message):
                session.prepare(sizes)
            made = fakegpu.calls() - before
            taken = made["cuMemAlloc"] + made["cuMemAllocHost"] + made["cuStreamCreate"]
            assert fake is None or taken == 0

    def test_a_closed_lookup_launches_nothing(self, tmp_path: Path, gpu: Gpu) -> None:
        keys = {"items": np.arange(60)}
        with serving(tmp_path) as server:
            prepared = server.session("wdl").prepare({"items": 60})
            write(gpu, prepared, keys)
            prepared.launch()
            prepared.close()  # with a launch under way
            check(gpu, prepared, keys)
            prepared.close()
            for call in (prepared.launch, prepared.complete):
                with pytest.raises(ClosedError, match="prepared lookup is closed"):
                    call()

    def test_an_ordinary_lookup_is_no_part_of_a_graph(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        with serving(tmp_path, share=0.2) as server:
            session = server.session("wdl")
            keys = uploaded(gpu, ITEMS.keys[:90])
            with streams(gpu, 1) as (mine,):
                mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
                assert not driver.cuStreamBeginCapture(mine, mode)[0]
                for given in (keys, ITEMS.keys[:90]):
                    with pytest.raises(DeviceError, match="model 'wdl'"):
                        session.lookup("items", given, stream=mine)
                driver.cuStreamEndCapture(mine)  # it may be beyond use
                for stream in (None, mine):
                    rows = session.lookup("items", keys, stream=stream)
                    got = downloaded(gpu, rows, stream or 0)
                    assert np.array_equal(got, ITEMS.rows[:90])
                    del rows

    def test_a_lookup_ends_with_its_server(self, tmp_path: Path, gpu: Gpu) -> None:
        with serving(tmp_path) as server:
            prepared = server.session("wdl").prepare({"items": 60})
            write(gpu, prepared, {"items": np.arange(60)})
            prepared.launch()
        for call in (prepared.launch, prepared.complete):
            with pytest.raises(ClosedError, match="the server is closed"):
                call()
        check(gpu, prepared, {"items": np.arange(60)})
        prepared.close()

    def test_lookups_give_their_memory_and_streams_back(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        if fakegpu.current() is None:
            pytest.skip("only the stand-in counts calls")
        with serving(tmp_path) as server:
            before = fakegpu.calls()
            for _ in range(3):
                server.session("wdl").prepare(SIZES).close()
            made = fakegpu.calls() - before
        assert made["cuMemFree"] == made["cuMemAlloc"] > 0
        assert made["cuMemFreeHost"] == made["cuMemAllocHost"] > 0
        assert made["cuStreamDestroy"] == made["cuStreamCreate"] == 6
        assert made["cuEventDestroy"] == made["cuEventCreate"] > 0

    def test_each_completed_launch_is_counted_once(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        with serving(tmp_path) as server:
            take_out(server, 10)
            with server.session("wdl").prepare({"items": 20}) as prepared:
                for first in (290, 0, 100):  # 10 of no tier, 10 of the tiers, hits
                    write(gpu, prepared, {"items": np.arange(first, first + 20)})
                    prepared.launch()
                    assert prepared.complete() == (0 if first == 100 else 10)
            stats = server.stats().table("wdl", "items")
        assert (stats.lookups, stats.keys, stats.defaults) == (3, 60, 10)

    def test_a_tier_that_fails_fails_the_completion(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        wraps = Wraps(FailingTier)
        with serving(tmp_path, share=0.2, host=False, wrap_tier=wraps) as server:
            broken = wraps.tiers["rocksdb"]
            assert isinstance(broken, FailingTier)
            with server.session("wdl").prepare(SIZES) as prepared:
                for seed in range(3):
                    keys = random_keys(seed)
                    write(gpu, prepared, keys)
                    broken.fail("fetch", times=1)
                    prepared.launch()
                    with pytest.raises(TierUnavailableError, match="made to fail"):
                        prepared.complete()
                    prepared.launch()
                    assert prepared.complete() > 0
                    check(gpu, prepared, keys)
            stats = server.stats().table("wdl", "items")
        assert (stats.errors, stats.lookups) == (3, 3)
