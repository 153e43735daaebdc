"""Streams and events."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_uint, c_void_p

from tests.support.fakegpu.device import (
    CAPTURE_UNSUPPORTED,
    NOT_READY,
    Event,
    Operation,
    Stream,
)
from tests.support.fakegpu.driver.state import (
    PRIMARY,
    current_context,
    device,
    lock,
    look_up,
    new_handle,
    objects,
    put,
    queue,
    stream_of,
)
from tests.support.fakegpu.shim import DriverError, implements


def _creating_stream(result: int, flags: int, priority: int = 0) -> None:
    put(result, c_void_p, new_handle(Stream(current_context(), blocking=not flags & 1)))


implements("cuStreamCreate", c_void_p, c_uint)(_creating_stream)
implements("cuStreamCreateWithPriority", c_void_p, c_uint, c_int)(_creating_stream)


@implements("cuStreamDestroy", c_void_p)
def stream_destroy(stream: int | None) -> None:
    look_up(stream, Stream)
    with lock:
        del objects[stream or 0]


@implements("cuStreamGetCtx", c_void_p, c_void_p)
def stream_context(stream: int | None, result: int) -> None:
    put(result, c_void_p, stream_of(stream).context)


@implements("cuStreamGetCtx", c_void_p, c_void_p, c_void_p, version=12050)
def stream_contexts(stream: int | None, result: int, green: int) -> None:
    put(result, c_void_p, stream_of(stream).context)
    put(green, c_void_p, 0)


@implements("cuStreamGetDevice", c_void_p, c_void_p)
def stream_device(stream: int | None, result: int) -> None:
    put(result, c_int, stream_of(stream).context - PRIMARY)


@implements("cuStreamGetFlags", c_void_p, c_void_p)
def stream_flags(stream: int | None, result: int) -> None:
    put(result, c_uint, 0 if stream_of(stream).blocking else 1)


@implements("cuStreamGetPriority", c_void_p, c_void_p)
def stream_priority(stream: int | None, result: int) -> None:
    put(result, c_int, 0)


def _tail(stream: int | None) -> Operation:
    found = stream_of(stream)
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
    found: Event = look_up(event, Event)
    waiting = stream_of(stream)
    if found.graph is not None:
        device.join(waiting, found.graph)
    else:
        queue(stream, Operation("wait", after=[found.recorded]))


def _creating_event(result: int, flags: int) -> None:
    put(result, c_void_p, new_handle(Event()))


implements("cuEventCreate", c_void_p, c_uint)(_creating_event)


@implements("cuEventDestroy", c_void_p)
def event_destroy(event: int | None) -> None:
    look_up(event, Event)
    with lock:
        del objects[event or 0]


def _recording(event: int | None, stream: int | None, flags: int = 0) -> None:
    found: Event = look_up(event, Event)
    graph = stream_of(stream).graph
    found.graph = graph
    if graph is None:
        found.recorded = queue(stream, Operation("record"))


implements("cuEventRecord", c_void_p, c_void_p)(_recording)
implements("cuEventRecordWithFlags", c_void_p, c_void_p, c_uint)(_recording)


@implements("cuEventSynchronize", c_void_p)
def event_synchronize(event: int | None) -> None:
    device.wait_for(look_up(event, Event).recorded)


@implements("cuEventQuery", c_void_p)
def event_query(event: int | None) -> int:
    return _progress(look_up(event, Event).recorded)


@implements("cuEventElapsedTime", c_void_p, c_void_p, c_void_p)
def event_elapsed(result: int, begin: int | None, end: int | None) -> None:
    if not (look_up(begin, Event).recorded.done and look_up(end, Event).recorded.done):
        raise DriverError(NOT_READY)
    put(result, ctypes.c_float, 1.0)
