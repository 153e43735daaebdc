"""Small kernels for weak memory, run over many seeds; words lie 64 bytes apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.ptx import store_u32
from tests.kernels.cuda.word_kernels import ADDRESS_AND_NUMBER
from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch

u32, u64 = np.uint32, np.uint64
X, Y, OUT = u64(0), u64(64), u64(128)
SEEDS = 300


def outcomes(
    function: Any,
    *,
    blocks: int = 2,
    threads: int = 1,
    results: int = 2,
    seeds: int = SEEDS,
    **options: Any,
) -> Counter[tuple[int, ...]]:
    """Count what blocks of a kernel leave in the words from OUT on."""
    kernel = cpuexec.compile_kernel(function, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(64, np.uint32)
    launch = Launch(kernel, blocks, threads, (memory.address(words), 0))
    seen: Counter[tuple[int, ...]] = Counter()
    options = {"weak": 0.5, "preempt": 0.3, **options}
    for seed in range(seeds):
        words[:] = 0
        cpuexec.run(launch, memory, seed=seed, **options)
        seen[tuple(words[32 : 32 + results].tolist())] += 1
    return seen


@cuda.jit(device=True, forceinline=True)
def write_out(words, i, value):
    store_u32(words + OUT + u64(i) * u64(4), u32(value))


@cuda.jit(device=True, forceinline=True)
def nothing():
    pass
