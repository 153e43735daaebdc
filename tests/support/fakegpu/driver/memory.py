"""Memory, copies and fills.

What the host holds in ordinary memory is read when a copy is queued, and a copy into it
is waited for; pinned memory is read and written when the copy runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from typing import Any

from tests.support.fakegpu.device import (
    CAPTURE_UNSUPPORTED,
    INVALID_VALUE,
    Operation,
    Stream,
)
from tests.support.fakegpu.driver.state import (
    PRIMARY,
    constant,
    current_context,
    device,
    lock,
    new_handle,
    objects,
    put,
    queue,
    stream_of,
)
from tests.support.fakegpu.shim import DriverError, implements

# By address, on which device an allocation is, as far as pointers are asked.
_ordinals: dict[int, int] = {}


def _allocating(
    result: int, n_bytes: int, *, pinned: bool = False, ordinal: int | None = None
) -> None:
    context = current_context()
    with lock:
        captured = any(
            isinstance(one, Stream) and one.graph and one.context == context
            for one in objects.values()
        )
    if captured:
        raise DriverError(CAPTURE_UNSUPPORTED)
    address = device.allocate(n_bytes, pinned=pinned)
    _ordinals[address] = context - PRIMARY if ordinal is None else ordinal
    put(result, c_ulonglong, address)


@implements("cuMemAlloc", c_void_p, c_size_t)
def memory_allocate(result: int, n_bytes: int) -> None:
    _allocating(result, n_bytes)


@implements("cuMemAllocAsync", c_void_p, c_size_t, c_void_p)
def memory_allocate_on(result: int, n_bytes: int, stream: int | None) -> None:
    _allocating(result, n_bytes, ordinal=stream_of(stream).context - PRIMARY)


@implements("cuMemAllocFromPoolAsync", c_void_p, c_size_t, c_void_p, c_void_p)
def memory_allocate_from(
    result: int, n_bytes: int, pool: int | None, stream: int | None
) -> None:
    thing = objects.get(pool or 0)
    ordinal = stream_of(stream).context - PRIMARY
    _allocating(result, n_bytes, pinned=thing == "host pool", ordinal=ordinal)


@implements("cuMemFree", c_ulonglong)
def memory_free(address: int) -> None:
    device.wait_for_all()
    device.free(address)


@implements("cuMemFreeAsync", c_ulonglong, c_void_p)
def memory_free_on(address: int, stream: int | None) -> None:
    queue(stream, Operation("free", action=lambda: device.free(address)))


@implements("cuMemAllocHost", c_void_p, c_size_t)
def memory_allocate_host(result: int, n_bytes: int) -> None:
    _allocating(result, n_bytes, pinned=True)


@implements("cuMemHostAlloc", c_void_p, c_size_t, c_uint)
def memory_host_allocate(result: int, n_bytes: int, flags: int) -> None:
    _allocating(result, n_bytes, pinned=True)


@implements("cuMemFreeHost", c_ulonglong)
def memory_free_host(address: int) -> None:
    device.wait_for_all()
    device.free(address)


@implements("cuMemGetInfo", c_void_p, c_void_p)
def memory_info(free: int, total: int) -> None:
    put(free, c_size_t, 1 << 36)
    put(total, c_size_t, 1 << 37)


def _new_pool(result: int, kind: str) -> None:
    put(result, c_void_p, new_handle(kind))


@implements("cuDeviceGetDefaultMemPool", c_void_p, c_int)
def default_pool(result: int, ordinal: int) -> None:
    _new_pool(result, "device pool")


@implements("cuDeviceGetMemPool", c_void_p, c_int)
def current_pool(result: int, ordinal: int) -> None:
    _new_pool(result, "device pool")


@implements("cuMemGetMemPool", c_void_p, c_void_p, c_int)
def pool_of(result: int, location: int, kind: int) -> None:
    host = c_int.from_address(location).value in (2, 3)
    _new_pool(result, "host pool" if host else "device pool")


@implements("cuMemPoolCreate", c_void_p, c_void_p)
def pool_create(result: int, properties: int) -> None:
    # allocType, handleTypes, then the location's type: 1 is a device
    host = c_int.from_address(properties + 8).value in (2, 3)
    _new_pool(result, "host pool" if host else "device pool")


constant("cuMemPoolDestroy", c_void_p, writes={})
constant("cuMemPoolTrimTo", c_void_p, c_size_t, writes={})
constant("cuMemPoolSetAccess", c_void_p, c_void_p, c_size_t, writes={})


@implements("cuPointerGetAttribute", c_void_p, c_int, c_ulonglong)
def pointer_attribute(result: int, which: int, address: int) -> None:
    found = device.find(address)
    if which == 1:
        put(result, c_void_p, PRIMARY if found else 0)
    elif which == 2:
        if not found:
            raise DriverError(INVALID_VALUE)
        put(result, c_uint, 1 if device.is_pinned(found[0]) else 2)
    elif which in (3, 4, 11):
        put(result, c_ulonglong, address if found and which != 11 else sum(found or ()))
    elif which == 7:
        put(result, c_ulonglong, found[0] if found else 0)
    elif which == 9:
        if not found:
            raise DriverError(INVALID_VALUE)
        put(result, c_int, _ordinals[found[0]])
    else:
        put(result, c_int, 0)


@implements("cuPointerGetAttributes", c_uint, c_void_p, c_void_p, c_ulonglong)
def pointer_attributes(n: int, which: int, results: int, address: int) -> None:
    for i in range(n):
        kind = c_int.from_address(which + 4 * i).value
        place = c_void_p.from_address(results + 8 * i).value
        if kind in (2, 9) and not device.find(address):
            put(place, c_uint, 0)
        elif place:
            pointer_attribute(place, kind, address)


def _copying(target: int, source: int, n_bytes: int, stream: int | None) -> None:
    """Queue a copy; what the host holds in ordinary memory is read or written now."""
    if device.find(source) is None:
        staged = ctypes.create_string_buffer(n_bytes)
        ctypes.memmove(staged, source, n_bytes)
        source = ctypes.addressof(staged)
    else:
        staged = None

    def action(keep: Any = staged) -> None:
        device.copy(target, source, n_bytes)

    operation = queue(stream, Operation("copy", action=action))
    if device.find(target) is None and stream_of(stream).graph is None:
        device.wait_for(operation)


for _name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync"):
    implements(_name, c_ulonglong, c_ulonglong, c_size_t, c_void_p)(_copying)
implements("cuMemcpyAsync", c_ulonglong, c_ulonglong, c_size_t, c_void_p)(_copying)


def _copying_now(target: int, source: int, n_bytes: int) -> None:
    _copying(target, source, n_bytes, 0)
    device.wait_for(stream_of(0).tail)


for _name in ("cuMemcpyHtoD", "cuMemcpyDtoH", "cuMemcpyDtoD", "cuMemcpy"):
    implements(_name, c_ulonglong, c_ulonglong, c_size_t)(_copying_now)


def _filling(kind: Any) -> Callable[..., None]:
    def fill(address: int, value: int, n: int, stream: int | None = 0) -> None:
        words = (kind * n)(*[value] * n)
        source, n_bytes = ctypes.addressof(words), ctypes.sizeof(words)

        def action(keep: Any = words) -> None:
            device.copy(address, source, n_bytes)

        queue(stream, Operation("fill", action=action))

    return fill


for _bits, _kind in ((8, c_ubyte), (16, ctypes.c_ushort), (32, c_uint)):
    implements(f"cuMemsetD{_bits}", c_ulonglong, _kind, c_size_t)(_filling(_kind))
    implements(f"cuMemsetD{_bits}Async", c_ulonglong, _kind, c_size_t, c_void_p)(
        _filling(_kind)
    )
