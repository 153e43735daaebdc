"""The functions of the driver that cuda.core calls, over the stand-in device.

Parameters are those of ``cuda.h``; results go to the addresses that are passed in.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from ctypes import (
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from typing import Any

from tests.support.fakegpu import kernels
from tests.support.fakegpu.device import (
    CAPTURE_UNSUPPORTED,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_READY,
    Event,
    FakeDevice,
    Graph,
    Operation,
    Stream,
)
from tests.support.fakegpu.shim import DriverError, implements

N_DEVICES = 2
NAME = b"stand-in"
VERSION = 13000
PRIMARY = 0x1000  # contexts: this and the device's number
DEFAULT_STREAMS = (0, 1, 2)  # the third is a thread's own

# Attributes of a device that are not 1.
ATTRIBUTES = {
    1: 1024,  # threads per block
    2: 1024,  # block x
    3: 1024,
    4: 64,
    5: 2**31 - 1,  # grid x
    6: 65535,
    7: 65535,
    8: 48 << 10,  # shared memory per block
    10: 32,  # threads per warp
    16: 132,  # multiprocessors
    39: 2048,  # threads per multiprocessor
    75: 9,  # compute capability
    76: 0,
    97: 227 << 10,  # shared memory per block, on demand
}

device = FakeDevice()
_thread = threading.local()
_handles = itertools.count(0x10000, 0x10)
_objects: dict[int, Any] = {}
_lock = threading.Lock()


def _new(thing: Any) -> int:
    with _lock:
        handle = next(_handles)
        _objects[handle] = thing
    return handle


def _object(handle: int | None, kind: type) -> Any:
    thing = _objects.get(handle or 0)
    if not isinstance(thing, kind):
        raise DriverError(INVALID_HANDLE)
    return thing


def _put(address: int | None, kind: Any, value: Any) -> None:
    if address:
        kind.from_address(address).value = value


def _context() -> int:
    found: int = getattr(_thread, "context", 0)
    if not found:
        raise DriverError(INVALID_CONTEXT)
    return found


def _stream(handle: int | None) -> Stream:
    """Return a stream; the default ones are made when they are first named."""
    if (handle or 0) not in DEFAULT_STREAMS:
        stream: Stream = _object(handle, Stream)
        return stream
    context = _context()
    # Handles 0 and 1 are the legacy stream, which all threads share.
    owner = threading.get_ident() if handle == 2 else 0
    key = ("default", context, owner)
    with _lock:
        return _defaults.setdefault(key, Stream(context, blocking=True))


_defaults: dict[Any, Stream] = {}


def _queue(handle: int | None, operation: Operation) -> Operation:
    """Queue an operation, with what the legacy stream waits for and makes wait."""
    stream = _stream(handle)
    if stream.blocking and stream.graph is None:
        legacy = _defaults.get(("default", stream.context, 0))
        if stream is legacy:
            with _lock:
                everyone = [*_objects.values(), *_defaults.values()]
            operation.after += [
                one.tail
                for one in everyone
                if isinstance(one, Stream)
                and one.blocking
                and one.context == stream.context
                and one is not stream
            ]
        elif legacy is not None:
            operation.after.append(legacy.tail)
    device.queue(stream, operation)
    return operation


def _simple(name: str, *kinds: Any, writes: dict[int, tuple[Any, Any]]) -> None:
    """Register a function that only writes constants."""

    def constant(*args: Any) -> None:
        for place, (kind, value) in writes.items():
            _put(args[place], kind, value)

    implements(name, *kinds)(constant)


_simple("cuInit", c_uint, writes={})
_simple("cuDriverGetVersion", c_void_p, writes={0: (c_int, VERSION)})
_simple("cuDeviceGetCount", c_void_p, writes={0: (c_int, N_DEVICES)})
_simple("cuDeviceTotalMem", c_void_p, c_int, writes={0: (c_size_t, 1 << 37)})
_simple("cuCtxGetStreamPriorityRange", c_void_p, c_void_p, writes={1: (c_int, -5)})
_simple("cuMemPoolSetAttribute", c_void_p, c_int, c_void_p, writes={})
_simple(
    "cuMemPoolGetAttribute", c_void_p, c_int, c_void_p, writes={2: (c_ulonglong, 0)}
)
_simple("cuLibraryUnload", c_void_p, writes={})
_simple("cuFuncLoad", c_void_p, writes={})
_simple("cuGraphUpload", c_void_p, c_void_p, writes={})
_simple("cuDevicePrimaryCtxRelease", c_int, writes={})


@implements("cuDeviceGet", c_void_p, c_int)
def device_get(result: int, ordinal: int) -> None:
    if not 0 <= ordinal < N_DEVICES:
        raise DriverError(101)
    _put(result, c_int, ordinal)


@implements("cuDeviceGetName", c_void_p, c_int, c_int)
def device_get_name(result: int, n_bytes: int, ordinal: int) -> None:
    ctypes.memmove(result, NAME + b"\0", len(NAME) + 1)


@implements("cuDeviceGetUuid", c_void_p, c_int)
def device_get_uuid(result: int, ordinal: int) -> None:
    ctypes.memset(result, 7 + ordinal, 16)


@implements("cuDeviceGetAttribute", c_void_p, c_int, c_int)
def device_get_attribute(result: int, which: int, ordinal: int) -> None:
    _put(result, c_int, ATTRIBUTES.get(which, 1))


@implements("cuDevicePrimaryCtxRetain", c_void_p, c_int)
def primary_context(result: int, ordinal: int) -> None:
    _put(result, c_void_p, PRIMARY + ordinal)


@implements("cuCtxGetCurrent", c_void_p)
def context_get(result: int) -> None:
    _put(result, c_void_p, getattr(_thread, "context", 0))


@implements("cuCtxSetCurrent", c_void_p)
def context_set(context: int | None) -> None:
    _thread.context = context or 0


@implements("cuCtxGetDevice", c_void_p)
def context_device(result: int) -> None:
    _put(result, c_int, _context() - PRIMARY)


@implements("cuCtxGetDevice", c_void_p, c_void_p, version=13000)
def context_device_of(result: int, context: int | None) -> None:
    _put(result, c_int, (context or _context()) - PRIMARY)


@implements("cuCtxSynchronize")
def context_synchronize() -> None:
    _context()
    device.wait_for_all()


@implements("cuCtxSynchronize", c_void_p, version=13000)
def context_synchronize_of(context: int | None) -> None:
    device.wait_for_all()


@implements("cuGetErrorName", c_int, c_void_p)
def error_name(status: int, result: int) -> None:
    _put(result, c_char_p, _ERRORS.setdefault(status, f"CUDA_ERROR_{status}".encode()))


@implements("cuGetErrorString", c_int, c_void_p)
def error_string(status: int, result: int) -> None:
    text = (
        f"status {status}: {device.failure}" if device.failure else f"status {status}"
    )
    _put(result, c_char_p, _ERRORS.setdefault(-status, text.encode()))


_ERRORS: dict[int, bytes] = {}  # keeps what has been handed out alive


# Memory


def _allocating(result: int, n_bytes: int, *, pinned: bool = False) -> None:
    context = _context()
    with _lock:
        captured = any(
            isinstance(one, Stream) and one.graph and one.context == context
            for one in _objects.values()
        )
    if captured:
        raise DriverError(CAPTURE_UNSUPPORTED)
    _put(result, c_ulonglong, device.allocate(n_bytes, pinned=pinned))


@implements("cuMemAlloc", c_void_p, c_size_t)
def memory_allocate(result: int, n_bytes: int) -> None:
    _allocating(result, n_bytes)


@implements("cuMemAllocAsync", c_void_p, c_size_t, c_void_p)
def memory_allocate_on(result: int, n_bytes: int, stream: int | None) -> None:
    _allocating(result, n_bytes)


@implements("cuMemAllocFromPoolAsync", c_void_p, c_size_t, c_void_p, c_void_p)
def memory_allocate_from(
    result: int, n_bytes: int, pool: int | None, stream: int | None
) -> None:
    thing = _objects.get(pool or 0)
    _allocating(result, n_bytes, pinned=thing == "host pool")


@implements("cuMemFree", c_ulonglong)
def memory_free(address: int) -> None:
    device.wait_for_all()
    device.free(address)


@implements("cuMemFreeAsync", c_ulonglong, c_void_p)
def memory_free_on(address: int, stream: int | None) -> None:
    _queue(stream, Operation("free", action=lambda: device.free(address)))


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
    _put(free, c_size_t, 1 << 36)
    _put(total, c_size_t, 1 << 37)


def _new_pool(result: int, kind: str) -> None:
    _put(result, c_void_p, _new(kind))


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


_simple("cuMemPoolDestroy", c_void_p, writes={})
_simple("cuMemPoolTrimTo", c_void_p, c_size_t, writes={})
_simple("cuMemPoolSetAccess", c_void_p, c_void_p, c_size_t, writes={})


@implements("cuPointerGetAttribute", c_void_p, c_int, c_ulonglong)
def pointer_attribute(result: int, which: int, address: int) -> None:
    found = device.find(address)
    if which == 1:
        _put(result, c_void_p, PRIMARY if found else 0)
    elif which == 2:
        if not found:
            raise DriverError(INVALID_VALUE)
        _put(result, c_uint, 1 if device.is_pinned(found[0]) else 2)
    elif which in (3, 4, 11):
        _put(
            result, c_ulonglong, address if found and which != 11 else sum(found or ())
        )
    elif which == 7:
        _put(result, c_ulonglong, found[0] if found else 0)
    else:
        _put(result, c_int, 0)


@implements("cuPointerGetAttributes", c_uint, c_void_p, c_void_p, c_ulonglong)
def pointer_attributes(n: int, which: int, results: int, address: int) -> None:
    for i in range(n):
        kind = c_int.from_address(which + 4 * i).value
        place = c_void_p.from_address(results + 8 * i).value
        if kind == 2 and not device.find(address):
            _put(place, c_uint, 0)
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

    operation = _queue(stream, Operation("copy", action=action))
    if device.find(target) is None and _stream(stream).graph is None:
        device.wait_for(operation)


for _name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync"):
    implements(_name, c_ulonglong, c_ulonglong, c_size_t, c_void_p)(_copying)
implements("cuMemcpyAsync", c_ulonglong, c_ulonglong, c_size_t, c_void_p)(_copying)


def _copying_now(target: int, source: int, n_bytes: int) -> None:
    _copying(target, source, n_bytes, 0)
    device.wait_for(_stream(0).tail)


for _name in ("cuMemcpyHtoD", "cuMemcpyDtoH", "cuMemcpyDtoD", "cuMemcpy"):
    implements(_name, c_ulonglong, c_ulonglong, c_size_t)(_copying_now)


def _filling(kind: Any) -> Callable[..., None]:
    def fill(address: int, value: int, n: int, stream: int | None = 0) -> None:
        words = (kind * n)(*[value] * n)
        source, n_bytes = ctypes.addressof(words), ctypes.sizeof(words)

        def action(keep: Any = words) -> None:
            device.copy(address, source, n_bytes)

        _queue(stream, Operation("fill", action=action))

    return fill


for _bits, _kind in ((8, c_ubyte), (16, ctypes.c_ushort), (32, c_uint)):
    implements(f"cuMemsetD{_bits}", c_ulonglong, _kind, c_size_t)(_filling(_kind))
    implements(f"cuMemsetD{_bits}Async", c_ulonglong, _kind, c_size_t, c_void_p)(
        _filling(_kind)
    )


# Streams and events


def _creating_stream(result: int, flags: int, priority: int = 0) -> None:
    _put(result, c_void_p, _new(Stream(_context(), blocking=not flags & 1)))


implements("cuStreamCreate", c_void_p, c_uint)(_creating_stream)
implements("cuStreamCreateWithPriority", c_void_p, c_uint, c_int)(_creating_stream)


@implements("cuStreamDestroy", c_void_p)
def stream_destroy(stream: int | None) -> None:
    _object(stream, Stream)
    with _lock:
        del _objects[stream or 0]


@implements("cuStreamGetCtx", c_void_p, c_void_p)
def stream_context(stream: int | None, result: int) -> None:
    _put(result, c_void_p, _stream(stream).context)


@implements("cuStreamGetCtx", c_void_p, c_void_p, c_void_p, version=12050)
def stream_contexts(stream: int | None, result: int, green: int) -> None:
    _put(result, c_void_p, _stream(stream).context)
    _put(green, c_void_p, 0)


@implements("cuStreamGetDevice", c_void_p, c_void_p)
def stream_device(stream: int | None, result: int) -> None:
    _put(result, c_int, _stream(stream).context - PRIMARY)


@implements("cuStreamGetFlags", c_void_p, c_void_p)
def stream_flags(stream: int | None, result: int) -> None:
    _put(result, c_uint, 0 if _stream(stream).blocking else 1)


@implements("cuStreamGetPriority", c_void_p, c_void_p)
def stream_priority(stream: int | None, result: int) -> None:
    _put(result, c_int, 0)


def _tail(stream: int | None) -> Operation:
    found = _stream(stream)
    if found.graph is not None:
        raise DriverError(CAPTURE_UNSUPPORTED)
    return found.tail


@implements("cuStreamSynchronize", c_void_p)
def stream_synchronize(stream: int | None) -> None:
    device.wait_for(_tail(stream))


@implements("cuStreamQuery", c_void_p)
def stream_query(stream: int | None) -> int:
    return _progress(_tail(stream))


def _progress(operation: Operation) -> int:
    """Say whether an operation is done; asking lets time pass."""
    device.check()
    if operation.done:
        return 0
    device.step()
    return NOT_READY


@implements("cuStreamWaitEvent", c_void_p, c_void_p, c_uint)
def stream_wait_event(stream: int | None, event: int | None, flags: int) -> None:
    found: Event = _object(event, Event)
    waiting = _stream(stream)
    if found.graph is not None:
        device.join(waiting, found.graph)
    else:
        _queue(stream, Operation("wait", after=[found.recorded]))


def _creating_event(result: int, flags: int) -> None:
    _put(result, c_void_p, _new(Event()))


implements("cuEventCreate", c_void_p, c_uint)(_creating_event)


@implements("cuEventDestroy", c_void_p)
def event_destroy(event: int | None) -> None:
    _object(event, Event)
    with _lock:
        del _objects[event or 0]


def _recording(event: int | None, stream: int | None, flags: int = 0) -> None:
    found: Event = _object(event, Event)
    graph = _stream(stream).graph
    found.graph = graph
    if graph is None:
        found.recorded = _queue(stream, Operation("record"))


implements("cuEventRecord", c_void_p, c_void_p)(_recording)
implements("cuEventRecordWithFlags", c_void_p, c_void_p, c_uint)(_recording)


@implements("cuEventSynchronize", c_void_p)
def event_synchronize(event: int | None) -> None:
    device.wait_for(_object(event, Event).recorded)


@implements("cuEventQuery", c_void_p)
def event_query(event: int | None) -> int:
    return _progress(_object(event, Event).recorded)


@implements("cuEventElapsedTime", c_void_p, c_void_p, c_void_p)
def event_elapsed(result: int, begin: int | None, end: int | None) -> None:
    if not (_object(begin, Event).recorded.done and _object(end, Event).recorded.done):
        raise DriverError(NOT_READY)
    _put(result, ctypes.c_float, 1.0)


# Code and launches


@implements(
    "cuLibraryLoadData",
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint),
)
def library_load(result: int, image: int, *options: Any) -> None:
    magic = (c_char * 4).from_address(image).raw
    if magic != b"\x7fELF":
        raise DriverError(200)
    _put(result, c_void_p, _new("library"))


@implements("cuLibraryGetKernel", c_void_p, c_void_p, c_char_p)
def library_kernel(result: int, library: int | None, name: bytes) -> None:
    _put(result, c_void_p, _new(kernels.find(name.decode())))


@implements("cuLibraryGetModule", c_void_p, c_void_p)
def library_module(result: int, library: int | None) -> None:
    _put(result, c_void_p, library)


@implements("cuKernelGetFunction", c_void_p, c_void_p)
def kernel_function(result: int, kernel: int | None) -> None:
    _put(result, c_void_p, kernel)


@implements("cuKernelGetAttribute", c_void_p, c_int, c_void_p, c_int)
def kernel_attribute(result: int, which: int, kernel: int | None, ordinal: int) -> None:
    _put(result, c_int, 1024 if which == 0 else 32)


def _launching(
    function: int | None,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int | None,
    parameters: int,
) -> None:
    device.check()
    kernel: kernels.LoadedKernel = _object(function, kernels.LoadedKernel)
    if min(grid + block) < 1 or block[0] * block[1] * block[2] > kernel.spec.block:
        raise DriverError(INVALID_VALUE)
    if grid[0] > ATTRIBUTES[5] or max(grid[1:]) > ATTRIBUTES[6]:
        raise DriverError(INVALID_VALUE)
    launch = kernel.launch(grid, block, shared_bytes, parameters)
    _queue(stream, Operation(kernel.spec.name, launch=launch))


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
    _queue(stream, Operation("host function", action=lambda: called(data)))


# Graphs


@implements("cuStreamBeginCapture", c_void_p, c_int)
def begin_capture(stream: int | None, mode: int) -> None:
    found = _stream(stream)
    if found.graph is not None or (stream or 0) in DEFAULT_STREAMS:
        raise DriverError(CAPTURE_UNSUPPORTED)
    graph = Graph()
    graph.handle = _new(graph)
    found.origin = True
    device.join(found, graph)


@implements("cuStreamEndCapture", c_void_p, c_void_p)
def end_capture(stream: int | None, result: int) -> None:
    graph = _stream(stream).graph
    if graph is None or not _stream(stream).origin:
        raise DriverError(CAPTURE_UNSUPPORTED)
    for one in list(_objects.values()):
        if isinstance(one, Stream) and one.graph is graph:
            one.graph, one.origin = None, False
    _put(result, c_void_p, graph.handle)


@implements("cuStreamIsCapturing", c_void_p, c_void_p)
def is_capturing(stream: int | None, result: int) -> None:
    _put(result, c_int, int(_stream(stream).graph is not None))


def _capture_info(
    stream: int | None, status: int, number: int, graph: int, *rest: int
) -> None:
    found = _stream(stream).graph
    _put(status, c_int, int(found is not None))
    _put(number, c_ulonglong, found.handle if found else 0)
    _put(graph, c_void_p, found.handle if found else 0)


implements("cuStreamGetCaptureInfo", *[c_void_p] * 6)(_capture_info)
implements("cuStreamGetCaptureInfo", *[c_void_p] * 7, version=12030)(_capture_info)


def _instantiating(result: int, graph: int | None, *options: Any) -> None:
    steps = _object(graph, Graph).steps
    _put(result, c_void_p, _new(Graph(list(steps))))


implements("cuGraphInstantiateWithFlags", c_void_p, c_void_p, c_ulonglong)(
    _instantiating
)
implements("cuGraphInstantiateWithParams", c_void_p, c_void_p, c_void_p)(_instantiating)
implements("cuGraphInstantiate", c_void_p, c_void_p, c_ulonglong)(_instantiating)


@implements("cuGraphLaunch", c_void_p, c_void_p)
def graph_launch(graph: int | None, stream: int | None) -> None:
    for step in _object(graph, Graph).steps:
        again = Operation(step.what, action=step.action, launch=step.launch)
        _queue(stream, again)


# What a graph keeps alive: it is never let go here.
_simple(
    "cuUserObjectCreate",
    *(c_void_p, c_void_p, c_void_p, c_uint, c_uint),
    writes={0: (c_void_p, 1)},
)
_simple("cuUserObjectRelease", c_void_p, c_uint, writes={})
_simple("cuGraphRetainUserObject", c_void_p, c_void_p, c_uint, c_uint, writes={})
_simple("cuGraphReleaseUserObject", c_void_p, c_void_p, c_uint, writes={})


def _destroying(handle: int | None) -> None:
    with _lock:
        _objects.pop(handle or 0, None)


implements("cuGraphDestroy", c_void_p)(_destroying)
implements("cuGraphExecDestroy", c_void_p)(_destroying)
