"""What a GPU cache lacks: fetched in chunks, through two blocks in turn."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import TierUnavailableError
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.base import Tier
from hps_numba.types import FailureMode
from tests.runtime.deployments import Wraps
from tests.runtime.gpu.foreign import uploaded
from tests.runtime.gpu.gpu_servers import (
    ITEMS,
    SHOPS,
    USERS,
    Guarded,
    downloaded,
    gpu_server,
    known,
    rows_for,
    settle,
    some_keys,
)
from tests.support import fakegpu
from tests.support.gates import StopPoints
from tests.support.wrappers import GatedTier, WrappedTier

pytestmark = pytest.mark.device

TABLES = (ITEMS, USERS)
BLOCK = 28  # a set's worth, the smallest block there is
SMALL = 0.1  # of the rows: a lookup misses most of its keys


def reseed(seed: int) -> None:
    """Let the stand-in run what may run in another order."""
    fake = fakegpu.current()
    if fake is not None:
        fake.reseed(seed)


class BreaksAt(WrappedTier):
    """Fails one fetch of several, or all. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self._lock = threading.Lock()
        self._left: float = math.inf  # guarded by _lock
        self._times: float = 0  # guarded by _lock

    def break_at(self, number: int, times: float = 1) -> None:
        """Fail a fetch, counted from now and 0, and some that follow."""
        with self._lock:
            self._left, self._times = number, times

    def before(self, operation: str) -> None:
        if operation != "fetch":
            return
        with self._lock:
            self._left -= 1
            if self._left >= 0 or self._times <= 0:
                return
            self._times -= 1
        raise TierUnavailableError("the fetch was made to fail", tier=self.name)


@contextmanager
def breaking(
    root: Path, on_failure: FailureMode, **options: Any
) -> Iterator[tuple[HPS, BreaksAt]]:
    """Give a server whose only tier fails when it is told to."""
    wraps = Wraps(BreaksAt)
    with gpu_server(
        root,
        TABLES,
        block_rows=BLOCK,
        host=False,
        wrap_tier=wraps,
        server={"on_tier_failure": on_failure},
        **{"cache_size_percentage": SMALL} | options,
    ) as server:
        broken = wraps.tiers["rocksdb"]
        assert isinstance(broken, BreaksAt)
        yield server, broken


class TestFailures:
    @pytest.mark.parametrize("at", [0, 1, 4, 7])
    def test_a_lookup_that_fails_leaves_nothing_behind(
        self, tmp_path: Path, gpu: Gpu, at: int
    ) -> None:
        """When the error surfaces, the output is the caller's own again."""
        keys = ITEMS.keys
        with breaking(tmp_path, FailureMode.RAISE) as (server, broken):
            session = server.session("wdl")
            for seed in range(4):
                reseed(seed)
                out = uploaded(gpu, np.zeros((keys.size, 4), np.float32))
                broken.break_at(at)
                with pytest.raises(TierUnavailableError, match="made to fail"):
                    session.lookup("items", uploaded(gpu, keys), out=out)
                # All at once, past the order of any stream.
                mine = np.full(out.shape, 99, np.float32)
                fake = fakegpu.current()
                if fake is not None:
                    fake.copy(out.address, mine.ctypes.data, mine.nbytes)
                    fake.wait_for_all()
                    assert (downloaded(gpu, out) == 99).all()
                for _ in range(3):  # more than there are lanes
                    rows = session.lookup("items", keys)
                    assert np.array_equal(rows, rows_for(ITEMS, keys))
            stats = server.stats().table("wdl", "items")
        assert (stats.errors, stats.lookups, stats.degraded) == (4, 12, 0)

    @pytest.mark.parametrize("at", [0, 3])
    def test_a_lookup_that_goes_on_gives_default_rows(
        self, tmp_path: Path, gpu: Gpu, at: int
    ) -> None:
        keys = np.concatenate([ITEMS.keys, [5000, 5000]])
        with breaking(tmp_path, FailureMode.DEGRADE, cache_size_percentage=1.0) as (
            server,
            broken,
        ):
            server.delete("wdl", "items", ITEMS.keys)
            server.update("wdl", "items", ITEMS.keys, ITEMS.rows)
            broken.break_at(at)
            found = np.zeros(keys.size, np.bool_)
            rows = server.session("wdl").lookup("items", keys, found=found)
            wanted = rows_for(ITEMS, keys)
            lost = known(ITEMS, keys) & ~found
            wanted[lost] = ITEMS.default
            assert np.array_equal(rows, wanted)
            assert 0 < lost.sum() <= BLOCK
            assert not found[-2:].any()
            settle(gpu)
            stats = server.stats().table("wdl", "items")
            assert (stats.degraded, stats.defaults) == (1, lost.sum() + 2)
            # Default rows are not cached.
            assert stats.tiers[0].rows == ITEMS.keys.size - lost.sum()
            assert np.array_equal(
                server.lookup(keys, "wdl", "items", found=found), rows_for(ITEMS, keys)
            )
            assert np.array_equal(found, known(ITEMS, keys))
            stats = server.stats().table("wdl", "items")
            assert (stats.degraded, stats.defaults) == (1, lost.sum() + 4)

    def test_a_lookup_without_a_tier_gives_what_is_cached(self, tmp_path: Path) -> None:
        with breaking(tmp_path, FailureMode.DEGRADE, cache_size_percentage=1.0) as (
            server,
            broken,
        ):
            gone = ITEMS.keys[::3]
            server.delete("wdl", "items", gone)
            server.update("wdl", "items", gone, ITEMS.rows[::3])
            broken.break_at(0, times=math.inf)
            found = np.zeros(ITEMS.keys.size, np.bool_)
            rows = server.lookup(ITEMS.keys, "wdl", "items", found=found)
            assert np.array_equal(found, ~np.isin(ITEMS.keys, gone))
            assert np.array_equal(rows[found], ITEMS.rows[found])
            assert (rows[~found] == ITEMS.default).all()


class TestChunks:
    @pytest.mark.parametrize("host", [True, False], ids=["local", "remote"])
    def test_many_chunks_pass_through_two_blocks(
        self, tmp_path: Path, gpu: Gpu, host: bool
    ) -> None:
        rng = np.random.default_rng(1)
        with gpu_server(
            tmp_path, TABLES, block_rows=BLOCK, cache_size_percentage=SMALL, host=host
        ) as server:
            seen: list[tuple[str, int]] = []
            session = server.session("wdl", observer=lambda *e: seen.append(e[:2]))
            for seed in range(8):
                reseed(seed)
                seen.clear()
                keys = {t.name: some_keys(rng, t, 390) for t in TABLES}
                found = {t.name: np.zeros(390, np.bool_) for t in TABLES}
                out = Guarded(gpu, (390, 4), np.float32)
                rows = session.lookup(
                    keys | {"users": uploaded(gpu, keys["users"])},
                    out={"items": out.array},
                    found=found,
                )
                users = downloaded(gpu, rows["users"])
                assert np.array_equal(out.rows(), rows_for(ITEMS, keys["items"]))
                assert np.array_equal(users, rows_for(USERS, keys["users"]))
                for table in TABLES:
                    wanted = known(table, keys[table.name])
                    assert np.array_equal(found[table.name], wanted)
                gives = [number for stage, number in seen if stage == "give"]
                assert sorted(gives) == list(range(len(gives)))
                assert len(gives) >= 10
                assert Counter(stage for stage, _ in seen)["take"] == len(gives)

    def test_the_next_chunk_is_asked_for_while_the_last_one_is_fetched(
        self, tmp_path: Path
    ) -> None:
        stops, seen, rows = StopPoints(), list[tuple[str, int]](), list[Any]()
        asked = threading.Event()

        def observe(stage: str, number: int, *_: float) -> None:
            if stage == "rocksdb":
                return
            seen.append((stage, number))
            if (stage, number) == ("take", 1):  # chunk 0 comes there first
                stops.wait_held("rocksdb.fetch", 1)
            if (stage, number) == ("local", 2):
                asked.set()

        with gpu_server(
            tmp_path,
            TABLES,
            block_rows=BLOCK,
            cache_size_percentage=SMALL,
            host=False,
            wrap_tier=Wraps(lambda tier: GatedTier(tier, stops)),
        ) as server:
            session = server.session("wdl", observer=observe)
            stops.arm("rocksdb.fetch")
            running = threading.Thread(
                target=lambda: rows.append(session.lookup("items", ITEMS.keys))
            )
            running.start()
            try:
                stops.wait_held("rocksdb.fetch", 2)
                # Both blocks are with workers, and chunk 2 waits for the first one's.
                begun = [("take", 0), ("local", 0), ("take", 1), ("local", 1)]
                assert seen == begun
                stops.release_first("rocksdb.fetch")
                assert asked.wait(30)
                begun += [("remote", 0), ("give", 0), ("take", 2), ("local", 2)]
                assert seen == begun
            finally:
                stops.release("rocksdb.fetch")
                running.join()
        assert np.array_equal(rows[0], rows_for(ITEMS, ITEMS.keys))

    def test_what_was_fetched_is_cached(self, tmp_path: Path, gpu: Gpu) -> None:
        with gpu_server(
            tmp_path, TABLES, block_rows=BLOCK, cache_size_percentage=1.0
        ) as server:
            server.delete("wdl", "items", ITEMS.keys[::2])
            server.update("wdl", "items", ITEMS.keys[::2], ITEMS.rows[::2])
            session, seen = server.session("wdl"), []
            for _ in range(2):
                rows = session.lookup("items", ITEMS.keys)
                assert np.array_equal(rows, rows_for(ITEMS, ITEMS.keys))
                settle(gpu)
                use = server.stats().table("wdl", "items").tiers[0]
                seen.append((use.hits, use.asked - use.hits, use.rows))
        n, n_gone = ITEMS.keys.size, ITEMS.keys[::2].size
        assert seen == [(n - n_gone, n_gone, n), (2 * n - n_gone, n_gone, n)]

    def test_a_hit_costs_no_more_than_it_has_to(self, tmp_path: Path, gpu: Gpu) -> None:
        """No memory but the result's, one launch a group, one wait."""
        if fakegpu.current() is None:
            pytest.skip("only the stand-in counts calls")
        tables = (ITEMS, USERS, SHOPS)
        with gpu_server(tmp_path, tables, cache_size_percentage=1.0) as server:
            session = server.session("wdl")
            keys = {t.name: uploaded(gpu, t.keys[:90]) for t in tables}
            out = {t.name: uploaded(gpu, t.rows[:90]) for t in tables}

            def calls(call: Callable[[], Any]) -> dict[str, int]:
                for _ in range(2):
                    before = fakegpu.calls()
                    result = call()
                    after = fakegpu.calls() - before
                    gpu.wait(0)
                    del result
                # What asks the driver's own memory, and what gives back.
                ignored = ("cuCtxGetCurrent", "cuPointerGetAttribute")
                ignored += ("cuStreamIsCapturing", "cuMemFreeAsync")
                return {k: n for k, n in after.items() if k not in ignored}

            one = {"cuLaunchKernel": 1, "cuMemcpyAsync": 1, "cuStreamSynchronize": 1}
            allocated = {"cuMemAllocFromPoolAsync": 1}
            assert (
                calls(lambda: session.lookup("items", keys["items"], out=out["items"]))
                == one
            )
            assert calls(lambda: session.lookup("items", keys["items"])) == (
                one | allocated
            )
            # Keys go in, results and rows come out.
            assert calls(lambda: session.lookup("items", ITEMS.keys[:90])) == (
                one | allocated | {"cuMemcpyAsync": 3, "cuStreamSynchronize": 2}
            )
            # Two groups; the keys of one of them are brought together, with offsets.
            assert calls(lambda: session.lookup(keys)) == {
                "cuLaunchKernel": 2,
                "cuMemAllocFromPoolAsync": 2,
                "cuMemcpyAsync": 5,
                "cuStreamSynchronize": 1,
            }

    def test_defaults_are_counted_and_not_cached(
        self, tmp_path: Path, gpu: Gpu
    ) -> None:
        keys = np.repeat(np.arange(ITEMS.n_rows - 5, ITEMS.n_rows + 7), 2)
        with gpu_server(tmp_path, TABLES, cache_size_percentage=1.0) as server:
            session = server.session("wdl")
            before = server.stats().table("wdl", "items").tiers[0].rows
            for given in (keys, uploaded(gpu, keys)):
                found = np.zeros(keys.size, np.bool_)
                session.lookup("items", given, found=found)
                settle(gpu)
                assert np.array_equal(found, known(ITEMS, keys))
            session.lookup("items", keys)  # also without marks
            stats = server.stats().table("wdl", "items")
        assert stats.defaults == 3 * 2 * 7
        assert (stats.lookups, stats.keys) == (3, 3 * keys.size)
        assert stats.tiers[0].rows == before
        assert (stats.tiers[0].asked, stats.tiers[0].hits) == (72, 30)
