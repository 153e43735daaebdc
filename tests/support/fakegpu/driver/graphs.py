"""Capture into graphs, and their replay: the same operations once more."""

from __future__ import annotations

from ctypes import c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

from tests.support.fakegpu.device import CAPTURE_UNSUPPORTED, Graph, Operation, Stream
from tests.support.fakegpu.driver.state import (
    DEFAULT_STREAMS,
    constant,
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


@implements("cuStreamBeginCapture", c_void_p, c_int)
def begin_capture(stream: int | None, mode: int) -> None:
    found = stream_of(stream)
    if found.graph is not None or (stream or 0) in DEFAULT_STREAMS:
        raise DriverError(CAPTURE_UNSUPPORTED)
    graph = Graph()
    graph.handle = new_handle(graph)
    found.origin = True
    device.join(found, graph)


@implements("cuStreamEndCapture", c_void_p, c_void_p)
def end_capture(stream: int | None, result: int) -> None:
    graph = stream_of(stream).graph
    if graph is None or not stream_of(stream).origin:
        raise DriverError(CAPTURE_UNSUPPORTED)
    for one in list(objects.values()):
        if isinstance(one, Stream) and one.graph is graph:
            one.graph, one.origin = None, False
    put(result, c_void_p, graph.handle)


@implements("cuStreamIsCapturing", c_void_p, c_void_p)
def is_capturing(stream: int | None, result: int) -> None:
    put(result, c_int, int(stream_of(stream).graph is not None))


def _capture_info(
    stream: int | None, status: int, number: int, graph: int, *rest: int
) -> None:
    found = stream_of(stream).graph
    put(status, c_int, int(found is not None))
    put(number, c_ulonglong, found.handle if found else 0)
    put(graph, c_void_p, found.handle if found else 0)


implements("cuStreamGetCaptureInfo", *[c_void_p] * 6)(_capture_info)
implements("cuStreamGetCaptureInfo", *[c_void_p] * 7, version=12030)(_capture_info)


def _instantiating(result: int, graph: int | None, *options: Any) -> None:
    steps = look_up(graph, Graph).steps
    put(result, c_void_p, new_handle(Graph(list(steps))))


implements("cuGraphInstantiateWithFlags", c_void_p, c_void_p, c_ulonglong)(
    _instantiating
)
implements("cuGraphInstantiateWithParams", c_void_p, c_void_p, c_void_p)(_instantiating)
implements("cuGraphInstantiate", c_void_p, c_void_p, c_ulonglong)(_instantiating)


@implements("cuGraphLaunch", c_void_p, c_void_p)
def graph_launch(graph: int | None, stream: int | None) -> None:
    for step in look_up(graph, Graph).steps:
        again = Operation(step.what, action=step.action, launch=step.launch)
        queue(stream, again)


# What a graph keeps alive: it is never let go here.
constant(
    "cuUserObjectCreate",
    *(c_void_p, c_void_p, c_void_p, c_uint, c_uint),
    writes={0: (c_void_p, 1)},
)
constant("cuUserObjectRelease", c_void_p, c_uint, writes={})
constant("cuGraphRetainUserObject", c_void_p, c_void_p, c_uint, c_uint, writes={})
constant("cuGraphReleaseUserObject", c_void_p, c_void_p, c_uint, writes={})


def _destroying(handle: int | None) -> None:
    with lock:
        objects.pop(handle or 0, None)


implements("cuGraphDestroy", c_void_p)(_destroying)
implements("cuGraphExecDestroy", c_void_p)(_destroying)
