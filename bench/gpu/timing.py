"""Timing of what is queued on a device: by its events, interleaved, checked once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.gpu.device import Device, Graph
from bench.gpu.kernels import nap_kernel
from bench.harness import Meter, Plan, Timing, Variant, interleave
from bench.summaries import LAUNCHED
from hps_numba.kernels.cuda.launch import LaunchError

N_NAPS = 100  # some 200 microseconds
WARM_SLICES = 50
# What other processes do on the CPU does not disturb a device.
_METER = Meter(sleep=lambda _: None, machine_cpu=lambda: 0.0, own_cpu=lambda: 0.0)


@dataclass(frozen=True)
class Work:
    """One way to do the work of a benchmark.

    Parameters
    ----------
    name
        How results call it.
    call
        Queues launch i, on inputs and outputs of its own.
    n_launches
        How many there are: so many that their bytes exceed the caches.
    items
        Keys of one launch.
    check
        Looks at what all launches left; fails if it is wrong.
    outputs
        Address and bytes of what launches write, to be poisoned before a check.
    reset
        Queued before each timing, and not timed.
    is_baseline
        Whether it is another library's: one that fails is left out. What fails of ours
        is an error.
    """

    name: str
    call: Callable[[int], None]
    n_launches: int
    items: int
    check: Callable[[], None]
    outputs: tuple[tuple[int, int], ...] = ()
    reset: Callable[[], None] | None = None
    is_baseline: bool = False

    def queue(self) -> None:
        """Queue all launches."""
        for i in range(self.n_launches):
            self.call(i)


@dataclass
class Timed:
    """What the works took, by name, and what did not run, and why."""

    timings: dict[str, Timing]
    absent: dict[str, str]


def measure(device: Device, works: Sequence[Work], plan: Plan) -> Timed:
    """Check each work, then time them round-robin; seconds are those of one launch.

    A baseline that fails is left out, with the reason. What could not be captured, and
    is launched anew each time, is marked.
    """
    absent: dict[str, str] = {}
    graphs: dict[str, Graph] = {}
    try:
        variants = []
        for work in works:
            with _named(work, absent):
                variants.append(_variant(device, work, graphs))
        _warm_up(variants[0], WARM_SLICES * plan.slice_s)
        timings = interleave(variants, plan, _METER)
    finally:
        device.wait()
        for graph in graphs.values():
            graph.close()
    for name in timings.keys() - graphs.keys():
        timings[name] = replace(timings[name], marks=(LAUNCHED,))
    return Timed(timings, absent)


def _warm_up(variant: Variant, seconds: float) -> None:
    """Repeat a call until the clocks of a device that was idle have gone up."""
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        variant.setup()()


@contextlib.contextmanager
def _named(work: Work, absent: dict[str, str]) -> Iterator[None]:
    """Note what fails inside instead of failing, if it is not ours."""
    try:
        yield
    # Other libraries raise what they like.
    except Exception as exc:
        if not work.is_baseline:
            raise
        absent[work.name] = f"{type(exc).__name__}: {exc}"[:300]


def _check(device: Device, work: Work) -> None:
    for address, n_bytes in work.outputs:
        device.poison(address, n_bytes)
    if work.reset is not None:
        work.reset()
    work.queue()
    device.wait()
    work.check()


def _variant(device: Device, work: Work, graphs: dict[str, Graph]) -> Variant:
    """Return the work as replays of a graph, or as launches if it has none."""
    _check(device, work)
    try:
        graph = graphs[work.name] = device.graph(work.queue)
        replay = graph.replay
    except (LaunchError, RuntimeError):
        replay = work.queue

    def setup() -> Callable[[], float]:
        if work.reset is not None:
            work.reset()
        device.wait()
        return call

    def call() -> float:
        # The device naps while the host queues all the rest, so that none of the time
        # between its two events is the host's.
        launch = device.gpu.launcher.launch
        launch(nap_kernel(), (1, 1), (N_NAPS,), device.stream)
        return device.seconds(replay) / work.n_launches

    return Variant(work.name, setup, work.items)


@dataclass(frozen=True)
class HostClock:
    """Times calls with the host's clock, until they return and until they are done."""

    device: Device

    def until_returned(self, work: Callable[[], object]) -> float:
        """Return the seconds of the call alone."""
        self.device.wait()
        start = time.perf_counter()
        work()
        elapsed = time.perf_counter() - start
        self.device.wait()
        return elapsed

    def until_done(self, work: Callable[[], object]) -> float:
        """Return the seconds until the device has done it."""
        self.device.wait()
        start = time.perf_counter()
        work()
        self.device.wait()
        return time.perf_counter() - start


def by_host(
    works: dict[str, Callable[[], float]], items: int, plan: Plan
) -> dict[str, Timing]:
    """Time calls that return their own seconds, round-robin."""
    variants = [
        Variant(name, lambda call=call: call, items)  # type: ignore[misc]
        for name, call in works.items()
    ]
    return interleave(variants, plan, _METER)
