"""Runs compiled Numba CUDA kernels on the CPU, under seeded schedules and with checks.

A kernel goes through the same typing and lowering as for a GPU. The LLVM text that
comes out is retargeted to this machine, and each CUDA thread becomes a fiber. Shown are
logic, interleavings and progress, and on request what weak memory does; speed is not.
"""

from tests.support.cpuexec.compiling import (
    NUMBA_CUDA_VERSION,
    Kernel,
    compile_kernel,
    without_driver,
)
from tests.support.cpuexec.launching import KernelError, Launch, run, run_together
from tests.support.cpuexec.memory import DeviceMemory

__all__ = [
    "DeviceMemory",
    "Kernel",
    "KernelError",
    "Launch",
    "NUMBA_CUDA_VERSION",
    "compile_kernel",
    "run",
    "run_together",
    "without_driver",
]
