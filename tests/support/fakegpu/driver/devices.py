"""Devices, contexts and errors."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

from tests.support.fakegpu.driver.state import (
    ATTRIBUTES,
    N_DEVICES,
    NAME,
    PRIMARY,
    VERSION,
    constant,
    current_context,
    device,
    put,
    thread_state,
)
from tests.support.fakegpu.shim import DriverError, implements

constant("cuInit", c_uint, writes={})
constant("cuDriverGetVersion", c_void_p, writes={0: (c_int, VERSION)})
constant("cuDeviceGetCount", c_void_p, writes={0: (c_int, N_DEVICES)})
constant("cuDeviceTotalMem", c_void_p, c_int, writes={0: (c_size_t, 1 << 37)})
constant("cuCtxGetStreamPriorityRange", c_void_p, c_void_p, writes={1: (c_int, -5)})
constant("cuMemPoolSetAttribute", c_void_p, c_int, c_void_p, writes={})
constant(
    "cuMemPoolGetAttribute", c_void_p, c_int, c_void_p, writes={2: (c_ulonglong, 0)}
)
constant("cuLibraryUnload", c_void_p, writes={})
constant("cuFuncLoad", c_void_p, writes={})
constant("cuGraphUpload", c_void_p, c_void_p, writes={})
constant("cuDevicePrimaryCtxRelease", c_int, writes={})


@implements("cuDeviceGet", c_void_p, c_int)
def device_get(result: int, ordinal: int) -> None:
    if not 0 <= ordinal < N_DEVICES:
        raise DriverError(101)
    put(result, c_int, ordinal)


@implements("cuDeviceGetName", c_void_p, c_int, c_int)
def device_get_name(result: int, n_bytes: int, ordinal: int) -> None:
    ctypes.memmove(result, NAME + b"\0", len(NAME) + 1)


@implements("cuDeviceGetUuid", c_void_p, c_int)
def device_get_uuid(result: int, ordinal: int) -> None:
    ctypes.memset(result, 7 + ordinal, 16)


@implements("cuDeviceGetAttribute", c_void_p, c_int, c_int)
def device_get_attribute(result: int, which: int, ordinal: int) -> None:
    put(result, c_int, ATTRIBUTES.get(which, 1))


@implements("cuDevicePrimaryCtxRetain", c_void_p, c_int)
def primary_context(result: int, ordinal: int) -> None:
    put(result, c_void_p, PRIMARY + ordinal)


@implements("cuCtxGetCurrent", c_void_p)
def context_get(result: int) -> None:
    put(result, c_void_p, getattr(thread_state, "context", 0))


@implements("cuCtxSetCurrent", c_void_p)
def context_set(context: int | None) -> None:
    thread_state.context = context or 0


@implements("cuCtxGetDevice", c_void_p)
def context_device(result: int) -> None:
    put(result, c_int, current_context() - PRIMARY)


@implements("cuCtxGetDevice", c_void_p, c_void_p, version=13000)
def context_device_of(result: int, context: int | None) -> None:
    put(result, c_int, (context or current_context()) - PRIMARY)


@implements("cuCtxSynchronize")
def context_synchronize() -> None:
    current_context()
    device.wait_for_all()


@implements("cuCtxSynchronize", c_void_p, version=13000)
def context_synchronize_of(context: int | None) -> None:
    device.wait_for_all()


@implements("cuGetErrorName", c_int, c_void_p)
def error_name(status: int, result: int) -> None:
    put(result, c_char_p, _ERRORS.setdefault(status, f"CUDA_ERROR_{status}".encode()))


@implements("cuGetErrorString", c_int, c_void_p)
def error_string(status: int, result: int) -> None:
    text = (
        f"status {status}: {device.failure}" if device.failure else f"status {status}"
    )
    put(result, c_char_p, _ERRORS.setdefault(-status, text.encode()))


_ERRORS: dict[int, bytes] = {}  # keeps what has been handed out alive
