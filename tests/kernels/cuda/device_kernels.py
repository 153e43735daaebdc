"""Launches of the tiny kernels that try device functions on many words at once."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from numba.cuda import types

from tests.support import cpuexec
from tests.support.cpuexec import DeviceMemory, Launch

Array = npt.NDArray[Any]


def run_threads(
    function: Any,
    n_threads: int,
    *given: Array,
    out: Array,
    block: int = 128,
    **options: Any,
) -> Array:
    """Run a kernel of addresses on ``n_threads`` threads and return its output.

    Parameters
    ----------
    function
        Takes the address of a copy of each array of ``given``, then the output's.
    n_threads
        A multiple of ``block``, or less than a block.
    out
        What the output is before.
    options
        For ``cpuexec.run``; by default each thread runs until it waits for others.
    """
    block = min(block, n_threads)
    assert n_threads % block == 0
    memory = DeviceMemory()
    held = [memory.copy(array) for array in (*given, out)]
    kernel = cpuexec.compile_kernel(function, (types.uint64,) * len(held))
    args = tuple(memory.address(array) for array in held)
    launch = Launch(kernel, n_threads // block, block, args)
    cpuexec.run(launch, memory, **{"preempt": 0.0, **options})
    result: Array = held[-1]
    return result
