"""What the stand-in device does: operations in the order that streams and events ask.

Nothing runs when it is queued. Operations wait until somebody synchronises with them,
or asks whether they are done; then those that may run do so in a seeded order, launches
of different streams beside each other. Host code that forgets to wait finds old bytes.
"""

from __future__ import annotations

import bisect
import ctypes
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support import cpuexec
from tests.support.fakegpu.shim import DriverError

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT = 1, 2, 201
INVALID_HANDLE, NOT_FOUND, NOT_READY = 400, 500, 600
ILLEGAL_ADDRESS, MISALIGNED_ADDRESS, LAUNCH_FAILED = 700, 716, 719
CAPTURE_UNSUPPORTED = 900

FRESH = 0xA5  # what every byte of new device memory is


@dataclass(eq=False)
class Operation:
    """Something that a stream does, once all of ``after`` are done.

    ``launch`` is set for a kernel, ``action`` for everything else; neither for a mark.
    """

    what: str
    after: list[Operation] = field(default_factory=list)
    action: Callable[[], None] | None = None
    launch: cpuexec.Launch | None = None
    done: bool = False
    running: bool = False

    def ready(self) -> bool:
        """Return whether it may run now."""
        self.after = [one for one in self.after if not one.done]
        return not (self.after or self.running)


@dataclass(eq=False)
class Graph:
    """Operations that were captured, in an order that respects their dependencies."""

    steps: list[Operation] = field(default_factory=list)
    handle: int = 0


@dataclass(eq=False)
class Stream:
    """The last operation of a stream; while it is captured, the graph it goes to."""

    context: int
    blocking: bool
    tail: Operation = field(default_factory=lambda: Operation("new", done=True))
    graph: Graph | None = None
    origin: bool = False


@dataclass(eq=False)
class Event:
    """The operation that the event was last recorded as."""

    recorded: Operation = field(default_factory=lambda: Operation("new", done=True))
    graph: Graph | None = None


class FakeDevice:
    """Memory, streams and what is queued on them.

    Parameters
    ----------
    seed
        Chooses in which order, of those that the program allows, operations run.

    Attributes
    ----------
    failure
        What a kernel did that a device does not survive; all later calls fail.
    launches
        Names of the kernels that ran, in order of their start.
    eager
        Run every operation when it is queued.
    preempt
        Chance that a thread of a kernel is switched out before a memory access.

    Notes
    -----
    Safe from several threads; kernels run without the lock and without the GIL.
    """

    def __init__(self, seed: int = 0) -> None:
        self.memory = cpuexec.DeviceMemory()
        self.failure: Exception | None = None
        self.launches: list[str] = []
        self.eager = False
        self.preempt = 0.0
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        # guarded by _changed: all below
        self._pending: list[Operation] = []
        self._arrays: dict[int, Any] = {}
        self._bases: list[int] = []
        self._pinned: set[int] = set()

    def reseed(self, seed: int) -> None:
        """Choose other interleavings from now on."""
        self._random.seed(seed)

    def allocate(self, n_bytes: int, *, pinned: bool = False) -> int:
        """Return the address of new memory, filled with what nobody expects."""
        if n_bytes <= 0:
            raise DriverError(INVALID_VALUE)
        with self._changed:
            array = self.memory.array(n_bytes, np.uint8, FRESH)
            base = int(array.ctypes.data)
            self._arrays[base] = array
            bisect.insort(self._bases, base)
            if pinned:
                self._pinned.add(base)
            return base

    def free(self, base: int) -> None:
        """Give memory back: kernels and copies may not touch it any more."""
        with self._changed:
            if base not in self._arrays:
                raise DriverError(INVALID_VALUE)
            self.memory.free(self._arrays.pop(base))
            self._bases.remove(base)
            self._pinned.discard(base)

    def find(self, address: int) -> tuple[int, int] | None:
        """Return base and size of the allocation that an address is in."""
        with self._changed:
            place = bisect.bisect_right(self._bases, address) - 1
            if place < 0:
                return None
            base = self._bases[place]
            n_bytes = self._arrays[base].nbytes
            return (base, n_bytes) if address < base + n_bytes else None

    def is_pinned(self, base: int) -> bool:
        """Return whether an allocation is host memory."""
        return base in self._pinned

    def queue(self, stream: Stream, operation: Operation) -> None:
        """Add an operation to a stream, or to the graph that captures it."""
        self.check()
        with self._changed:
            if stream.graph is not None:
                stream.graph.steps.append(operation)
                return
            operation.after.append(stream.tail)
            stream.tail = operation
            self._pending.append(operation)
        if self.eager:
            self.wait_for(operation)

    def join(self, stream: Stream, graph: Graph) -> None:
        """Let a stream be captured into a graph too."""
        with self._changed:
            stream.graph = graph

    def wait_for(self, operation: Operation) -> None:
        """Run what has to run, and whatever else may, until an operation is done."""
        while not operation.done:
            self.step()
        self.check()

    def wait_for_all(self) -> None:
        """Run everything that is queued."""
        while True:
            with self._changed:
                if not self._pending:
                    break
                last = self._pending[-1]
            self.wait_for(last)
        self.check()

    def check(self) -> None:
        """Fail as a device does that has failed before."""
        if self.failure is not None:
            raise DriverError(_status(self.failure))

    def step(self) -> None:
        """Run one operation that may run, or several launches beside each other."""
        with self._changed:
            self.check()
            ready = [one for one in self._pending if one.ready()]
            if not ready:
                if not any(one.running for one in self._pending):
                    return
                self._changed.wait()
                return
            chosen = [self._random.choice(ready)]
            if chosen[0].launch is not None:
                chosen += [
                    one
                    for one in ready
                    if one.launch
                    and one is not chosen[0]
                    and self._random.random() < 0.5
                ]
            for one in chosen:
                one.running = True
            seed = self._random.getrandbits(63)
        try:
            self._run(chosen, seed)
        except Exception as exc:
            self.failure = exc
        finally:
            with self._changed:
                for one in chosen:
                    one.done, one.running = True, False
                    self._pending.remove(one)
                if self.failure is not None:
                    self._give_up()
                self._changed.notify_all()

    def _run(self, chosen: list[Operation], seed: int) -> None:
        launches = [one.launch for one in chosen if one.launch is not None]
        self.launches += [launch.kernel.name for launch in launches]
        if launches:
            cpuexec.run_together(launches, self.memory, seed=seed, preempt=self.preempt)
        elif chosen[0].action is not None:
            chosen[0].action()

    def _give_up(self) -> None:
        for one in self._pending:
            one.done = True
        self._pending.clear()

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy bytes now; device addresses have to be inside an allocation."""
        for address in (target, source):
            found = self.find(address)
            if found and address + n_bytes > sum(found):
                raise ValueError(
                    f"a copy of {n_bytes} bytes at {address:#x} leaves an allocation "
                    f"of {found[1]} bytes by {address + n_bytes - sum(found)}"
                )
        ctypes.memmove(target, source, n_bytes)


def _status(failure: Exception) -> int:
    text = str(failure)
    if "misaligned" in text:
        return MISALIGNED_ADDRESS
    if "out of bounds" in text or isinstance(failure, ValueError):
        return ILLEGAL_ADDRESS
    return LAUNCH_FAILED
