"""Launches as callers make them: with another device current, and from graphs."""

from __future__ import annotations

import numpy as np
from cuda.bindings import driver

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.launch import checked
from hps_numba.kernels.cuda.layout import Policy, RowLayout, TableLayout
from hps_numba.kernels.cuda.operands import Batch
from hps_numba.kernels.cuda.query import query_kernel
from tests.gpu.mirrored import MirroredMemory, mirrored_cache
from tests.kernels.cuda.oracle import Array

ROWS = RowLayout(32)
N_KEYS, N_REPLAYS = 500, 5
MODES = driver.CUstreamCaptureMode


def n_devices() -> int:
    """Return how many devices the driver shows."""
    return int(checked(driver.cuDeviceGetCount(), "devices"))


def check_current_device() -> int:
    """Use each device while another one is current; return how many keys were read.

    The thread's current device stays what it is.
    """
    gpus = [Gpu(i) for i in range(n_devices())]
    n_read = 0
    for gpu in gpus:
        for other in gpus:
            if other is not gpu:
                with other.launcher.current():
                    before = int(checked(driver.cuCtxGetCurrent(), "context"))
                    n_read += _write_and_read(gpu)
                    after = int(checked(driver.cuCtxGetCurrent(), "context"))
                    assert before == after, "another device became current"
    return n_read


def _write_and_read(gpu: Gpu) -> int:
    memory = MirroredMemory(gpu)
    try:
        cache = mirrored_cache(memory, ROWS, [TableLayout.for_rows(2 * N_KEYS)])
        keys, rows = _some_rows(gpu.ordinal)
        cache.insert(keys, rows)
        answer = cache.query(keys)
        assert answer.results()[2] == N_KEYS
        assert answer.out.tobytes() == rows.tobytes()
    finally:
        memory.close()
    return N_KEYS


def check_graphs(gpu: Gpu) -> int:
    """Capture a query in each mode, and replay it with other keys; return how many.

    Keys lie where they lay when the query was captured. The workspace takes the misses
    of one replay after the other.
    """
    n_read = 0
    for mode in (
        MODES.CU_STREAM_CAPTURE_MODE_GLOBAL,
        MODES.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        MODES.CU_STREAM_CAPTURE_MODE_RELAXED,
    ):
        n_read += _capture_and_replay(gpu, mode)
    return n_read


def _capture_and_replay(gpu: Gpu, mode: MODES) -> int:
    memory = MirroredMemory(gpu)
    try:
        cache = mirrored_cache(memory, ROWS, [TableLayout.for_rows(2 * N_KEYS)])
        base = cache.cache.base
        plain = Cache(cache.layout, Policy.LRU, base=base, launcher=gpu.launcher)
        gpu.launcher.warm_up([query_kernel(ROWS, Policy.LRU)])
        keys, rows = _some_rows(1)
        cache.insert(keys, rows)
        asked = memory.array(N_KEYS, np.int64)
        out = memory.array((N_KEYS, ROWS.dim), np.float32)
        work, block = cache.workspace(N_KEYS)
        memory.upload()
        stream = memory.stream
        checked(driver.cuStreamBeginCapture(stream, mode), "capture")
        batch = Batch(N_KEYS, memory.address(asked))
        plain.query(batch, memory.address(out), work, stream=stream)
        captured = checked(driver.cuStreamEndCapture(stream), "capture")
        graph = checked(driver.cuGraphInstantiate(captured, 0), "graph")
        rng = np.random.default_rng(0)
        for turn in range(N_REPLAYS):
            # The more turns, the more keys that are not there.
            drawn = rng.integers(0, N_KEYS, N_KEYS)
            absent = rng.random(N_KEYS) < turn / N_REPLAYS
            asked[...] = np.where(absent, keys[drawn] ^ 1 << 62, keys[drawn])
            out.view(np.uint8)[...] = 0xEE
            memory.upload()
            checked(driver.cuGraphLaunch(graph, stream), "graph")
            memory.download()
            assert out[~absent].tobytes() == rows[drawn][~absent].tobytes()
            assert (out[absent].view(np.uint8) == 0xEE).all()
            start = work.layout.results
            n_missing, n_unique, n_hits, _ = block[start : start + 16].view(np.uint32)
            assert (n_missing, n_hits) == (absent.sum(), (~absent).sum())
            assert n_unique == len(np.unique(asked[absent]))
        driver.cuGraphExecDestroy(graph)
        driver.cuGraphDestroy(captured)
    finally:
        memory.close()
    return N_REPLAYS * N_KEYS


def _some_rows(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    edges = np.array([-1, 0, 1, 2**63 - 1, -(2**63)], np.int64)
    drawn = rng.choice(1 << 40, N_KEYS - len(edges), replace=False) + 2
    keys = np.concatenate([edges, drawn])
    return keys, rng.standard_normal((N_KEYS, ROWS.dim)).astype(np.float32)
