"""Libraries, kernels and launches."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_int, c_uint, c_void_p
from typing import Any

from tests.support.fakegpu import kernels
from tests.support.fakegpu.device import INVALID_VALUE, Operation
from tests.support.fakegpu.driver.state import (
    ATTRIBUTES,
    device,
    look_up,
    new_handle,
    put,
    queue,
)
from tests.support.fakegpu.shim import DriverError, implements


@implements(
    "cuLibraryLoadData",
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint),
)
def library_load(result: int, image: int, *options: Any) -> None:
    magic = (c_char * 4).from_address(image).raw
    if magic != b"\x7fELF":
        raise DriverError(200)
    put(result, c_void_p, new_handle("library"))


@implements("cuLibraryGetKernel", c_void_p, c_void_p, c_char_p)
def library_kernel(result: int, library: int | None, name: bytes) -> None:
    put(result, c_void_p, new_handle(kernels.find(name.decode())))


@implements("cuLibraryGetModule", c_void_p, c_void_p)
def library_module(result: int, library: int | None) -> None:
    put(result, c_void_p, library)


@implements("cuKernelGetFunction", c_void_p, c_void_p)
def kernel_function(result: int, kernel: int | None) -> None:
    put(result, c_void_p, kernel)


@implements("cuKernelGetAttribute", c_void_p, c_int, c_void_p, c_int)
def kernel_attribute(result: int, which: int, kernel: int | None, ordinal: int) -> None:
    put(result, c_int, 1024 if which == 0 else 32)


def _launching(
    function: int | None,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int | None,
    parameters: int,
) -> None:
    device.check()
    kernel: kernels.LoadedKernel = look_up(function, kernels.LoadedKernel)
    if min(grid + block) < 1 or block[0] * block[1] * block[2] > kernel.spec.block:
        raise DriverError(INVALID_VALUE)
    if grid[0] > ATTRIBUTES[5] or max(grid[1:]) > ATTRIBUTES[6]:
        raise DriverError(INVALID_VALUE)
    launch = kernel.launch(grid, block, shared_bytes, parameters)
    queue(stream, Operation(kernel.spec.name, launch=launch))


@implements(
    "cuLaunchKernel",
    c_void_p,
    *[c_uint] * 7,
    *(c_void_p, c_void_p, c_void_p),
)
def launch_kernel(function: int | None, *rest: Any) -> None:
    *sizes, shared_bytes, stream, parameters, _ = rest
    grid, block = tuple(sizes[:3]), tuple(sizes[3:])
    _launching(function, grid, block, shared_bytes, stream, parameters)


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
    )


@implements("cuLaunchKernelEx", c_void_p, c_void_p, c_void_p, c_void_p)
def launch_kernel_ex(
    config: int, function: int | None, parameters: int, extra: int
) -> None:
    found = _LaunchConfig.from_address(config)
    grid, block = tuple(found.grid), tuple(found.block)
    _launching(function, grid, block, found.shared_bytes, found.stream, parameters)


_HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)


@implements("cuLaunchHostFunc", c_void_p, c_void_p, c_void_p)
def launch_host_function(stream: int | None, function: int, data: int | None) -> None:
    called = _HOST_FUNCTION(function)
    queue(stream, Operation("host function", action=lambda: called(data)))
