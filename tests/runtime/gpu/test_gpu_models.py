"""GPU caches of models that come and go: warm-up, memory, reload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import (
    ClosedError,
    ConfigError,
    DeviceError,
    UnknownTableError,
    UpdateError,
)
from hps_numba.kernels.cuda import gpu as gpu_module
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import WAYS
from hps_numba.kernels.host.hashing import hash_key
from hps_numba.runtime.gpu.cache import GpuCache
from hps_numba.runtime.gpu.sizing import plan_cache
from hps_numba.runtime.hps import HPS
from tests.oracle import versioned_rows
from tests.runtime.deployments import (
    Table,
    model,
    server_config,
    versions,
    write_table,
)
from tests.runtime.gpu.cached import (
    NOTHING,
    Meter,
    cached_keys,
    cached_versions,
    metered,
    table_cache,
)
from tests.runtime.gpu.gpu_servers import gpu_server
from tests.support import fakegpu

pytestmark = pytest.mark.device

ITEMS = Table("items", dim=4, n_rows=300, version=1, default=-1.0)
USERS = Table("users", dim=4, n_rows=60, version=2, default=0.5)
HALVES = Table("halves", dim=4, n_rows=100, dtype="float16")
ALL = {"cache_size_percentage": 1.0}
STATIC = ALL | {"embedding_cache_type": "static"}


class TestWarmUp:
    def test_without_it_the_cache_begins_empty(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS], init_ec=False, **ALL) as server:
            assert cached_versions(server, "items") == {}

    @pytest.mark.parametrize("n_rows", [0, 1, 70, 300, 1000])
    def test_of_the_first_rows_exactly_those_are_cached(
        self, tmp_path: Path, n_rows: int
    ) -> None:
        options = ALL | {"warm_up_rows_per_table": [n_rows, 3]}
        with gpu_server(tmp_path, [ITEMS, USERS], **options) as server:
            wanted = dict.fromkeys(range(min(n_rows, 300)), 1)
            assert cached_versions(server, "items") == wanted
            assert cached_versions(server, "users") == {0: 2, 1: 2, 2: 2}

    def test_a_static_cache_has_every_row_and_no_lookup_misses(
        self, tmp_path: Path
    ) -> None:
        with gpu_server(tmp_path, [ITEMS, USERS], **STATIC) as server:
            session = server.session("wdl")
            rng = np.random.default_rng(3)
            for _ in range(5):
                asked = {t.name: rng.integers(0, t.n_rows, 200) for t in (ITEMS, USERS)}
                rows = session.lookup(asked)
                for table in (ITEMS, USERS):
                    keys = asked[table.name]
                    assert np.array_equal(rows[table.name], table.rows[keys])
            for table in (ITEMS, USERS):
                totals = table_cache(server, table.name).totals()
                assert (totals.hits, totals.misses) == (1000, 0)
                assert (totals.rows, totals.evicted) == (table.n_rows, 0)

    def test_a_static_cache_takes_new_keys_while_there_is_room_and_evicts_none(
        self, tmp_path: Path
    ) -> None:
        with gpu_server(tmp_path, [USERS], **STATIC) as server:
            n_slots = table_cache(server, "users").n_slots
            new = np.arange(1000, 1000 + 2 * n_slots)
            server.update("wdl", "users", new, versioned_rows(new, 3, 4))
            for low in range(0, new.size, 100):
                assert set(versions(server, new[low : low + 100], "users")) == {3}
            held = cached_versions(server, "users")
            assert {k: v for k, v in held.items() if k < 60} == dict.fromkeys(
                range(60), 2
            )
            assert len(held) == n_slots
            assert table_cache(server, "users").totals().evicted == 0

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_rows_of_a_whole_table_are_updated_and_deleted_in_either_set(
        self, tmp_path: Path, kind: str
    ) -> None:
        options = ALL | {"embedding_cache_type": kind}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            n_sets = table_cache(server, "items").n_sets
            homes = [int(hash_key(key)) * n_sets >> 64 for key in range(300)]
            assert max(np.bincount(homes)) > WAYS  # not all of them are at home
            assert cached_versions(server, "items") == dict.fromkeys(range(300), 1)
            keys = np.arange(300)
            server.update("wdl", "items", keys[::2], versioned_rows(keys[::2], 2, 4))
            wanted = {int(key): 1 + (key % 2 == 0) for key in keys}
            assert cached_versions(server, "items") == wanted
            server.delete("wdl", "items", keys[::3])
            wanted = {key: version for key, version in wanted.items() if key % 3}
            assert cached_versions(server, "items") == wanted
            server.refresh("wdl")
            assert cached_versions(server, "items") == wanted
            new = np.arange(1000, 1100)
            server.update("wdl", "items", new, versioned_rows(new, 3, 4))
            assert versions(server, new, "items") == [3] * 100
            assert cached_versions(server, "items").items() >= wanted.items()

    @pytest.mark.parametrize("counts", [False, True], ids=["in order", "with counts"])
    def test_the_keys_of_a_frequency_file_are_cached(
        self, tmp_path: Path, counts: bool
    ) -> None:
        keys = np.random.default_rng(4).permutation(300)[:90]
        content = keys
        if counts:  # the most frequent first, wherever they stand in the file
            content = np.stack([keys, np.arange(90, 0, -1)], 1)[::-1]
        np.save(tmp_path / "items.npy", content)
        options = ALL | {
            "warm_up_keys_per_table": [str(tmp_path / "items.npy"), ""],
            "warm_up_rows_per_table": [80, 10],
        }
        with gpu_server(tmp_path, [ITEMS, USERS], **options) as server:
            wanted = dict.fromkeys(keys[:80].tolist(), 1)
            assert cached_versions(server, "items") == wanted
            assert sorted(cached_versions(server, "users")) == [*range(10)]

    def test_keys_of_a_frequency_file_that_no_tier_knows_are_left_out(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "hps_numba.runtime.gpu.filling")
        np.save(tmp_path / "items.npy", np.arange(250, 400))
        options = ALL | {"warm_up_keys_per_table": [str(tmp_path / "items.npy")]}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            assert sorted(cached_versions(server, "items")) == [*range(250, 300)]
        assert "50 of 150 keys are cached, 100 had no row, 0 no room" in caplog.text

    def test_no_row_leaves_for_one_that_was_asked_for_later(
        self, tmp_path: Path
    ) -> None:
        block = 64
        order = np.random.default_rng(5).permutation(300)
        np.save(tmp_path / "items.npy", order)
        options = {
            "cache_size_percentage": 0.5,
            "warm_up_keys_per_table": [str(tmp_path / "items.npy")],
        }
        with gpu_server(tmp_path, [ITEMS], block_rows=block, **options) as server:
            cache = table_cache(server, "items")
            held = set(cached_keys(cache).tolist())
            wanted = order[: cache.n_slots]
            by_set: dict[int, list[int]] = {}
            for place, key in enumerate(wanted.tolist()):
                number = int(hash_key(np.uint64(key))) * cache.n_sets >> 64
                by_set.setdefault(number, []).append(place)
            assert cache.totals().evicted == 0
        assert held <= set(wanted.tolist())
        left_out = 0
        for places in by_set.values():
            inside = [p for p in places if int(order[p]) in held]
            assert len(inside) == min(len(places), WAYS)
            for place in set(places) - set(inside):
                left_out += 1
                # Within a block of rows the device may choose.
                assert max(inside) // block <= place // block
        assert left_out > 0

    def test_rows_that_are_newer_than_the_files_are_cached(
        self, tmp_path: Path
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            server.update("wdl", "items", [1, 2], versioned_rows([1, 2], 9, 4))
            server.delete("wdl", "items", [3])
        with gpu_server(tmp_path, [ITEMS], write=False, **ALL) as server:
            held = cached_versions(server, "items")
        assert len(held) == 299
        assert {k: v for k, v in held.items() if v != 1} == {1: 9, 2: 9}

    def test_progress_adds_up(self, tmp_path: Path, devices: list[int]) -> None:
        told: dict[str, list[tuple[int, int]]] = {}

        def progress(what: str, done: int, total: int) -> None:
            told.setdefault(what, []).append((done, total))

        np.save(tmp_path / "items.npy", np.arange(150, 350))  # some without a row
        params = model(
            tmp_path,
            [ITEMS, USERS],
            use_gpu_embedding_cache=True,
            deployed_devices=devices,
            warm_up_keys_per_table=[str(tmp_path / "items.npy"), ""],
            **ALL,
        )
        config = server_config(tmp_path, [params], volatile={"max_batch_size": 64})
        with HPS(config, progress=progress):
            pass
        for device in devices:
            for name, n_rows in (("items", 200), ("users", 60)):
                steps = told[f"wdl/{name} warm-up of gpu:{device}"]
                assert steps[0] == (0, n_rows)
                assert steps[-1] == (n_rows, n_rows)
                assert [*steps] == sorted(steps)
        kernels = told["wdl kernels"]
        assert kernels[-1][0] == kernels[-1][1] > 0

    @pytest.mark.parametrize("make_room", [False, True], ids=["filling", "evicting"])
    def test_a_cache_holds_nine_of_ten_random_keys_that_it_has_places_for(
        self, tmp_path: Path, make_room: bool
    ) -> None:
        empty = Table("items", dim=4, n_rows=3000)
        options = {"cache_size_percentage": 0.9, "init_ec": False, "block_rows": 1000}
        rng = np.random.default_rng(6)
        with gpu_server(tmp_path, [empty], **options) as server:
            cache = table_cache(server, "items")
            keys = rng.integers(-(1 << 63), 1 << 63, cache.n_slots, np.int64)
            rows = versioned_rows(keys, 1, 4)
            stored = cache.insert(keys, rows, cache.epoch, make_room=make_room)
            n_held = cached_keys(cache).size
            assert cache.n_slots == cache.n_sets * WAYS >= 2700
            assert 0.9 * cache.n_slots <= n_held <= cache.n_slots
            # Some may have been inserted and pushed out by others since.
            assert stored == n_held + cache.totals().evicted
            assert make_room == (stored == keys.size > n_held)


class TestReload:
    def test_the_cache_has_the_new_rows_afterwards(self, tmp_path: Path) -> None:
        with gpu_server(tmp_path, [ITEMS, USERS], **ALL) as server:
            session = server.session("wdl")
            write_table(tmp_path / "wdl" / "items", np.arange(20, 200), 5)
            assert server.reload("wdl")
            wanted = dict.fromkeys(range(20, 200), 5)
            assert cached_versions(server, "items") == wanted
            assert cached_versions(server, "users") == dict.fromkeys(range(60), 2)
            asked = session.lookup("items", [19, 20])
            assert asked.tolist() == [[-1.0] * 4, [20.0, 5.0] * 2]

    def test_files_that_are_what_is_stored_leave_the_cache_as_it_is(
        self, tmp_path: Path
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            server.update("wdl", "items", [1], versioned_rows([1], 9, 4))
            assert not server.reload("wdl")
            assert versions(server, [1, 2]) == [9, 1]
            assert server.reload("wdl", force=True)
            assert cached_versions(server, "items") == dict.fromkeys(range(300), 1)

    def test_files_that_are_refused_leave_what_is_served(self, tmp_path: Path) -> None:
        options = ALL | {"non_finite": "refuse"}
        with gpu_server(tmp_path, [ITEMS], **options) as server:
            path = tmp_path / "wdl" / "items"
            write_table(path, np.arange(10), np.nan)
            with pytest.raises(Exception, match="finite"):
                server.reload("wdl")
            assert versions(server, ITEMS.keys) == [1] * 300


@pytest.fixture
def meter() -> Iterator[Meter]:
    with metered() as made:
        yield made
        assert made.settled() == NOTHING


class TestMemory:
    def test_it_is_what_was_estimated(
        self, tmp_path: Path, meter: Meter, devices: list[int]
    ) -> None:
        tables = [ITEMS, USERS, HALVES]
        options = {"deployed_devices": devices, "number_of_worker_buffers_in_pool": 3}
        with gpu_server(tmp_path, tables, **options) as server:
            estimate = server.estimate()
            n_bytes = sum(meter.device.values())
            assert [*estimate.gpu_bytes] == devices
            each = {
                estimate.gpu_bytes[d] + estimate.gpu_buffer_bytes[d] for d in devices
            }
            assert each == {n_bytes // len(devices)}
            assert sum(meter.pinned.values()) == estimate.pinned_bytes
            uses = [
                use.bytes
                for table in server.stats().tables
                for use in table.tiers
                if use.tier == "gpu:0"
            ]
            assert sum(uses) == estimate.gpu_bytes[0]

    def test_a_model_that_is_removed_gives_it_back(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            one = meter.live
            params = model(
                tmp_path,
                [USERS],
                name="dcn",
                use_gpu_embedding_cache=True,
                hit_rate_threshold=0.5,
                cache_refresh_percentage_per_iteration=0.5,
                refresh_interval=0.001,
                **ALL,
            )
            for _ in range(3):
                server.add_model(params)
                assert all(a > b for a, b in zip(meter.live, one, strict=True))
                session = server.session("dcn")
                found = np.zeros(USERS.n_rows, np.bool_)
                rows = session.lookup("users", USERS.keys, found=found)
                # A key that the refresh is writing may miss, and gets the default row.
                assert found.mean() >= 0.5
                assert np.array_equal(rows[found], USERS.rows[found])
                assert (rows[~found] == USERS.default).all()
                server.update("dcn", "users", [500], np.zeros((1, 4), np.float32))
                session.lookup("users", np.arange(400, 500))  # deferred
                server.remove_model("dcn", drop_tables=True)
                assert meter.live == one
                with pytest.raises(UnknownTableError, match="'dcn' was removed"):
                    session.lookup("users", [1])
            assert versions(server, ITEMS.keys) == [1] * 300

    def test_a_prepared_lookup_has_its_own_and_gives_it_back(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            one, session = meter.live, server.session("wdl")
            begun = meter.n_blocks
            with session.prepare({"items": 30}):
                assert meter.live[0] > one[0]
            assert meter.live == one
            for number in range(meter.n_blocks - begun):
                meter.refuse_at = number
                with pytest.raises(DeviceError, match="a prepared lookup on device 0"):
                    session.prepare({"items": 30})
                assert meter.settled(one) == one, number

    def test_reloads_and_refreshes_take_none_for_good(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            one = meter.live
            server.reload("wdl", force=True)
            server.refresh()
            server.stats()
            assert meter.live == one

    def test_too_little_of_it_is_an_error_wherever_it_runs_out(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        plan = plan_cache(model(tmp_path, [ITEMS, USERS, HALVES]), [300, 60, 100])
        gpu, sizes = Gpu(0), {"n_lanes": 2, "block_rows": 64}
        GpuCache(gpu, plan, **sizes).close()
        message = "the GPU cache on device 0: .*(has no|cannot be pinned)"
        for number in range(meter.n_blocks):
            meter.refuse_at = number
            with pytest.raises(DeviceError, match=message):
                GpuCache(gpu, plan, **sizes)
            assert meter.settled() == NOTHING, number

    def test_too_little_of_it_on_the_second_device_frees_the_first(
        self, tmp_path: Path, meter: Meter, two_devices: list[int]
    ) -> None:
        with gpu_server(tmp_path, [ITEMS]):
            one = meter.n_blocks
        meter.refuse_at = one + one // 2
        with pytest.raises(DeviceError, match="the GPU cache on device 1: "):
            gpu_server(tmp_path, [ITEMS], deployed_devices=two_devices)
        assert meter.settled() == NOTHING

    def test_a_model_that_finds_too_little_leaves_the_others(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            one = meter.live
            params = model(
                tmp_path, [USERS], name="dcn", use_gpu_embedding_cache=True, **ALL
            )
            meter.refuse_at = 3
            with pytest.raises(DeviceError, match=r"device 0 has no .* bytes left"):
                server.add_model(params)
            assert meter.settled(one) == one
            assert server.models == ("wdl",)
            meter.refuse_at = None
            server.add_model(params)
            assert versions(server, USERS.keys, 0, "dcn") == [2] * 60
            assert versions(server, ITEMS.keys) == [1] * 300

    def test_a_device_that_failed_keeps_nothing_open(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        fake = fakegpu.current()
        if fake is None:
            pytest.skip("only the stand-in survives what fails it")
        server = gpu_server(tmp_path, [ITEMS])
        session = server.session("wdl")
        session.lookup("items", ITEMS.keys[:40])
        fake.failure = ValueError("out of bounds")
        try:
            with pytest.raises(DeviceError, match="model 'wdl': "):
                session.lookup("items", ITEMS.keys[:40])
            with pytest.raises(UpdateError, match="items, gpu:0: a write: "):
                server.update("wdl", "items", [1], versioned_rows([1], 9, 4))
            server.close()
        finally:
            fake.failure = None
        assert meter.settled() == NOTHING
        with gpu_server(tmp_path, [ITEMS], write=False) as server:
            assert versions(server, [1, 2]) == [9, 1]


class TestDevices:
    def test_a_device_that_is_not_there_is_refused(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        message = r"'wdl': deployed_device_list: no CUDA device 9"
        with pytest.raises(ConfigError, match=message):
            gpu_server(tmp_path, [ITEMS], deployed_devices=[0, 9])

    def test_a_model_may_be_on_another_device_only(
        self, tmp_path: Path, meter: Meter, two_devices: list[int]
    ) -> None:
        with gpu_server(tmp_path, [ITEMS], deployed_devices=[1], **ALL) as server:
            assert cached_versions(server, "items", 1) == dict.fromkeys(range(300), 1)
            rows = server.session("wdl", 1).lookup("items", ITEMS.keys)
            assert np.array_equal(rows, ITEMS.rows)
            with pytest.raises(UnknownTableError, match=r"not deployed to device 0"):
                server.session("wdl")

    def test_other_devices_are_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_devices: list[int]
    ) -> None:
        opened: list[int] = []

        class Seen(Gpu):
            def __init__(self, ordinal: int) -> None:
                opened.append(ordinal)
                super().__init__(ordinal)

        monkeypatch.setattr(gpu_module, "Gpu", Seen)
        with gpu_server(tmp_path, [ITEMS], deployed_devices=[1]):
            assert opened == [1]

    def test_a_write_that_comes_after_the_close_touches_no_memory(
        self, tmp_path: Path, meter: Meter
    ) -> None:
        with gpu_server(tmp_path, [ITEMS]) as server:
            cache = table_cache(server, "items")
        keys, rows = ITEMS.keys[:2], ITEMS.rows[:2]
        for call in (
            lambda: cache.insert(keys, rows, cache.epoch),
            lambda: cache.update(keys, rows),
            lambda: cache.evict(keys),
            lambda: cache.keys_of(0, 1),
            cache.clear,
            cache.totals,
        ):
            with pytest.raises(ClosedError, match="the GPU cache is closed"):
                call()

    @pytest.mark.parametrize("seed", range(2))
    def test_a_write_that_is_interrupted_leaves_the_next_one_its_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        fake = fakegpu.current()
        if fake is not None:
            fake.reseed(seed)
        with gpu_server(tmp_path, [ITEMS], **ALL) as server:
            cache = table_cache(server, "items")
            kernels, update = cache.group.cache, cache.group.cache.update

            def interrupted(*args: Any, **kwargs: Any) -> None:
                update(*args, **kwargs)
                raise KeyboardInterrupt

            first = ITEMS.keys[:2], versioned_rows(ITEMS.keys[:2], 8, 4)
            monkeypatch.setattr(kernels, "update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.update(*first)
            monkeypatch.setattr(kernels, "update", update)
            cache.update(ITEMS.keys[2:4], versioned_rows(ITEMS.keys[2:4], 9, 4))
            held = cached_versions(server, "items")
            assert [held[key] for key in range(5)] == [8, 8, 9, 9, 1]
