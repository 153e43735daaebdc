"""Launches of the small kernels that try the CPU executor out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cuda import types

from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch

ADDRESS_AND_NUMBER = (types.uint64, types.uint32)


def run_on_words(function: Any, number: int = 0, **options: Any) -> np.ndarray:
    """Run a kernel of (address of 64 words, number) as one block of 64 threads."""
    kernel = cpuexec.compile_kernel(function, ADDRESS_AND_NUMBER)
    memory = DeviceMemory()
    words = memory.array(64, np.uint32)
    block = options.pop("block", 64)
    launch = Launch(kernel, 1, block, (memory.address(words), number))
    cpuexec.run(launch, memory, **options)
    return words
