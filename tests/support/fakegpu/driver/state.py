"""What the functions of the driver share: the device, handles, and where results go."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from tests.support.fakegpu.device import (
    INVALID_CONTEXT,
    INVALID_HANDLE,
    FakeDevice,
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
thread_state = threading.local()
_handles = itertools.count(0x10000, 0x10)
objects: dict[int, Any] = {}
# A thread that collects garbage while it has it may take it again.
lock = threading.RLock()


def new_handle(thing: Any) -> int:
    """Return a number that stands for an object from now on."""
    with lock:
        handle = next(_handles)
        objects[handle] = thing
    return handle


def look_up(handle: int | None, kind: type) -> Any:
    """Return what a handle stands for, which has to be of this kind."""
    thing = objects.get(handle or 0)
    if not isinstance(thing, kind):
        raise DriverError(INVALID_HANDLE)
    return thing


def put(address: int | None, kind: Any, value: Any) -> None:
    """Write a result where the caller wants it, if it does."""
    if address:
        kind.from_address(address).value = value


def current_context() -> int:
    """Return the context of the calling thread; it has to have one."""
    found: int = getattr(thread_state, "context", 0)
    if not found:
        raise DriverError(INVALID_CONTEXT)
    return found


def stream_of(handle: int | None) -> Stream:
    """Return a stream; the default ones are made when they are first named."""
    if (handle or 0) not in DEFAULT_STREAMS:
        stream: Stream = look_up(handle, Stream)
        return stream
    context = current_context()
    # Handles 0 and 1 are the legacy stream, which all threads share.
    owner = threading.get_ident() if handle == 2 else 0
    key = ("default", context, owner)
    with lock:
        return default_streams.setdefault(key, Stream(context, blocking=True))


default_streams: dict[Any, Stream] = {}


def queue(handle: int | None, operation: Operation) -> Operation:
    """Queue an operation, with what the legacy stream waits for and makes wait."""
    stream = stream_of(handle)
    if stream.blocking and stream.graph is None:
        legacy = default_streams.get(("default", stream.context, 0))
        if stream is legacy:
            with lock:
                everyone = [*objects.values(), *default_streams.values()]
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


def constant(name: str, *kinds: Any, writes: dict[int, tuple[Any, Any]]) -> None:
    """Register a function that only writes constants."""

    def write(*args: Any) -> None:
        for place, (kind, value) in writes.items():
            put(args[place], kind, value)

    implements(name, *kinds)(write)
