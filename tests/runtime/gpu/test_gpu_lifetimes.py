"""What a GPU cache keeps, and for how long: memory, streams, kernels."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from hps_numba.errors import ClosedError
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.runtime.gpu import lane, new_arrays
from tests.runtime.gpu.gpu_servers import COLOURS, ITEMS, USERS, Guarded, gpu_server

pytestmark = pytest.mark.device

TABLES = (ITEMS, USERS, COLOURS)


def test_a_lookup_that_hangs_keeps_its_memory_and_lets_others_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lane, "_PATIENCE_S", 0.0)
    with gpu_server(tmp_path, TABLES) as server:
        cache = server.session("wdl")._path._cache  # type: ignore[attr-defined]
        held = cache.lanes.take()
    assert "cache=gpu:0 a lookup does not end" in caplog.text
    # What it may still write to is there.
    for group in cache.groups:
        Gpu(0).zero(group.base, group.plan.layout.n_bytes, held.stream)
    Gpu(0).wait(held.stream)
    with pytest.raises(ClosedError, match="the GPU cache is closed"):
        cache.lanes.take()


def test_rows_as_they_are_stored_need_no_kernel_that_is_compiled_later(
    tmp_path: Path, gpu: Gpu
) -> None:
    with gpu_server(tmp_path, TABLES) as server:
        session = server.session("wdl")
        launcher = session._path._cache.gpu.launcher  # type: ignore[attr-defined]
        before = set(launcher._loaded)
        out = Guarded(gpu, (3, COLOURS.dim), np.float16)
        session.lookup("colours", [1, 2, 10_000], out=out.array)
        assert set(launcher._loaded) == before


class Borrowed:
    """A stream of an object that takes the stream with it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.handle = gpu, gpu.stream()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def __del__(self) -> None:
        self._gpu.wait(self.handle)
        self._gpu.drop_stream(self.handle)


def test_rows_keep_the_stream_that_their_memory_goes_back_to(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_arrays, "_maker", lambda: new_arrays._own)
    stream = Borrowed(gpu)
    gone = weakref.ref(stream)
    with gpu_server(tmp_path, TABLES) as server:
        session = server.session("wdl")
        rows = session.lookup({"items": [1, 2], "users": [3]}, stream=stream)
        alone = session.lookup("items", [5], stream=stream)
    del stream
    assert gone() is not None
    del rows["items"]
    del alone
    gc.collect()
    assert gone() is not None  # the other table's rows are of the same memory
    rows.clear()
    gc.collect()
    assert gone() is None
