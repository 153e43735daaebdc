"""Random operations on a device, each compared with the oracle to the last byte."""

from __future__ import annotations

from collections.abc import Iterator

from hps_numba.kernels.cuda.gpu import Gpu
from hps_numba.kernels.cuda.layout import Policy, RowLayout
from tests.gpu.mirrored import MirroredMemory, checked_cache
from tests.kernels.cuda.sequences import TABLES, RandomOperations

# One of each way that rows are moved, and each policy.
CASES = (
    (RowLayout(32), Policy.LRU),
    (RowLayout(128, "float16"), Policy.LRU),
    (RowLayout(7, "bfloat16", "bfloat16"), Policy.STATIC),
    (RowLayout(3), Policy.LFU),
    (RowLayout(64, "float16", "float16"), Policy.LFU),
    (RowLayout(1000), Policy.LRU),
    (RowLayout(24, "bfloat16"), Policy.LRU),
    (RowLayout(1, "float16"), Policy.STATIC),
)


def check_operations(
    gpu: Gpu, n_keys: int, n_cases: int = 8
) -> Iterator[tuple[str, int]]:
    """Run until each kernel has had ``n_keys`` keys; yield how many there were."""
    for seed, (rows, policy) in enumerate(CASES[:n_cases]):
        memory = MirroredMemory(gpu)
        try:
            cache = checked_cache(memory, rows, TABLES, policy)
            RandomOperations(cache, seed).run(n_keys)
        finally:
            memory.close()
        yield f"{rows.name}, {policy.value}", cache.keys.total()
