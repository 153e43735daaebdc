"""Kernels by the name of their entry: what the stand-in runs in place of a cubin."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from hps_numba.kernels.cuda import cubins
from hps_numba.kernels.cuda.compiling import (
    NUMBA_TYPES,
    ComputeCapability,
    Cubin,
    KernelSpec,
)
from tests.support import cpuexec
from tests.support.fakegpu.device import NOT_FOUND
from tests.support.fakegpu.shim import DriverError

_C_TYPES: dict[str, Any] = {
    "U": ctypes.c_uint64,
    "u": ctypes.c_uint32,
    "I": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}
_specs: dict[str, KernelSpec] = {}


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A kernel on the stand-in device."""

    spec: KernelSpec

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared_bytes: int,
        parameters: int,
    ) -> cpuexec.Launch:
        """Return a launch with the arguments as they are at these addresses now."""
        kinds = tuple(NUMBA_TYPES[letter] for letter in self.spec.argtypes)
        args = []
        for i, letter in enumerate(self.spec.argtypes):
            address = ctypes.c_void_p.from_address(parameters + 8 * i).value
            assert address is not None
            args.append(_C_TYPES[letter].from_address(address).value)
        kernel = cpuexec.compile_kernel(self.spec.function, kinds)
        return cpuexec.Launch(
            kernel, grid, block, tuple(args), shared_bytes=shared_bytes
        )


def find(name: str) -> LoadedKernel:
    """Return a kernel that this process has had the cubin of."""
    if name not in _specs:
        raise DriverError(NOT_FOUND)
    return LoadedKernel(_specs[name])


def remember_specs() -> None:
    """Note which function each cubin comes from, as the stand-in cannot run cubins."""
    original = cubins.CubinCache.get

    def get(self: cubins.CubinCache, spec: KernelSpec, cc: ComputeCapability) -> Cubin:
        _specs[spec.name] = spec
        return original(self, spec, cc)

    cubins.CubinCache.get = get  # type: ignore[method-assign]
