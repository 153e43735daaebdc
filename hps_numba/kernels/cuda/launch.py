"""Launches of kernels: on a given stream, without waiting and without allocating."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cuda.bindings import driver
from cuda.core import Device, ObjectCode

from hps_numba.kernels.cuda.arguments import PackedArguments
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.cubins import CubinCache, default_directory

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Handles up to this one name a default stream of the current context.
_LAST_DEFAULT_STREAM = 2


class DeviceUnavailableError(RuntimeError):
    """There is no driver, or no such device."""


class LaunchError(RuntimeError):
    """The driver refused a kernel, or reports an earlier failure of the device."""


class CudaStream(Protocol):
    """A stream of any library: cuda.core, torch, cupy."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version, 0, and the handle."""


@dataclass
class _Loaded:
    """A kernel on the device.

    ``free`` has the argument blocks that no launch is using. The driver copies the
    arguments during a launch, so that a block is free again when the call returns.
    """

    spec: KernelSpec
    code: ObjectCode
    handle: Any
    free: list[PackedArguments] = field(default_factory=list)


class _Threads(threading.local):
    """Whether the calling thread has a context."""

    entered = False


class CudaLauncher:
    """Loads kernels onto one device and launches them.

    Parameters
    ----------
    device
        Ordinal of the device.
    cubins
        Where compiled kernels come from; the user's cache directory if None.

    Raises
    ------
    DeviceUnavailableError
        If there is no CUDA driver, or no such device, or it cannot be used.

    Notes
    -----
    Safe from several threads. The current device of the calling thread stays what it
    is, unless it has none: then it becomes this one.
    """

    def __init__(self, device: int = 0, *, cubins: CubinCache | None = None) -> None:
        self.device = _open(device)
        with _restored_context():
            try:
                self.device.set_current()
            # As of a device that another process has for itself, or that is full.
            except Exception as exc:
                raise DeviceUnavailableError(
                    f"CUDA device {device} cannot be used: {exc}"
                ) from exc
            self._context = int(checked(driver.cuCtxGetCurrent(), "device"))
        self.cc: tuple[int, int] = tuple(self.device.compute_capability)
        self._cubins = cubins or CubinCache(default_directory())
        # guards loading; a dictionary is read without it
        self._lock = threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._threads = _Threads()

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: CudaStream | int | None = None,
    ) -> None:
        """Launch a kernel.

        Parameters
        ----------
        spec
            The kernel; compiled and loaded if this is its first launch.
        grid
            Blocks in x and y. Nothing happens if either is 0.
        args
            Addresses and numbers, one per parameter.
        stream
            A stream, its handle, or None for the default stream of the device.

        Raises
        ------
        ValueError
            If an argument does not fit its parameter, or another kernel has the name.
        KernelCompileError
            If the kernel does not compile.
        LaunchError
            If the driver refuses the launch.

        Notes
        -----
        Returns once the launch is queued. After :meth:`warm_up` it neither allocates
        nor waits, so that it may be captured into a graph.
        """
        loaded = self._loaded.get(spec.name)
        if loaded is None or loaded.spec is not spec:
            loaded = self._load(spec)
        if not (grid[0] and grid[1]):
            return
        handle = stream if isinstance(stream, int) else stream_handle(stream)
        packed = _taken(loaded)
        try:
            packed.fill(args)
            self.on(handle, self._queue, loaded, grid, packed, handle)
        finally:
            loaded.free.append(packed)

    def on(self, stream: int, call: Callable[..., _T], *args: Any) -> _T:
        """Call a function that works on a stream of this device."""
        if not self._threads.entered:
            self._enter_thread()
        # A default stream is that of whichever device is current.
        if stream > _LAST_DEFAULT_STREAM or self._is_current():
            return call(*args)
        with self.current():
            return call(*args)

    def warm_up(
        self,
        specs: Iterable[KernelSpec],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compile and load kernels before their first launch.

        Parameters
        ----------
        specs
            The kernels; those that are loaded cost nothing.
        progress
            Called with how many are loaded and how many there are, first with 0.

        Raises
        ------
        KernelCompileError
            If a kernel does not compile.
        LaunchError
            If the driver refuses one.
        """
        todo = list(specs)
        for n_done, spec in enumerate(todo):
            if progress is not None:
                progress(n_done, len(todo))
            self._load(spec)
        if progress is not None:
            progress(len(todo), len(todo))

    def _queue(
        self,
        loaded: _Loaded,
        grid: tuple[int, int],
        packed: PackedArguments,
        stream: int,
    ) -> None:
        spec = loaded.spec
        (status,) = driver.cuLaunchKernel(
            loaded.handle,
            *(grid[0], grid[1], 1, spec.block, 1, 1),
            *(0, stream, packed.pointers, 0),
        )
        if status:
            raise LaunchError(f"kernel {spec.name}, grid {grid}: {_reason(status)}")

    def _load(self, spec: KernelSpec) -> _Loaded:
        with self._lock:
            loaded = self._loaded.get(spec.name)
            if loaded is None:
                loaded = self._loaded[spec.name] = self._load_locked(spec)
            elif loaded.spec != spec:
                raise ValueError(f"two different kernels are named {spec.name}")
            return loaded

    def _load_locked(self, spec: KernelSpec) -> _Loaded:
        cubin = self._cubins.get(spec, self.cc)
        code = ObjectCode.from_cubin(cubin.code, name=spec.name)
        with self.current():
            try:
                kernel = code.get_kernel(spec.name)
            # cuda.core raises its own, which differ by version.
            except Exception as exc:
                raise LaunchError(f"kernel {spec.name} was not loaded: {exc}") from exc
            handle = driver.CUkernel(int(kernel.handle))
            # The driver loads lazily: left to the first launch, loading would allocate
            # and wait there, which a stream that is being captured does not allow.
            function = checked(driver.cuKernelGetFunction(handle), spec.name)
            checked(driver.cuFuncLoad(function), spec.name)
        logger.debug("kernel=%s device=%d loaded", spec.name, self.device.device_id)
        return _Loaded(spec, code, driver.CUfunction(int(handle)))

    def _enter_thread(self) -> None:
        """Give the calling thread a current context if it has none."""
        if not self._threads.entered:
            if not int(checked(driver.cuCtxGetCurrent(), "thread")):
                self.device.set_current()
            self._threads.entered = True

    def _is_current(self) -> bool:
        return int(checked(driver.cuCtxGetCurrent(), "thread")) == self._context

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this device the thread's current one for a moment."""
        self._enter_thread()
        if self._is_current():
            yield
            return
        with _restored_context():
            checked(driver.cuCtxSetCurrent(self._context), "thread")
            yield


def count_devices() -> int:
    """Return how many devices the driver shows; takes no memory on any of them.

    Raises
    ------
    DeviceUnavailableError
        If there is no driver that can be used.
    """
    try:
        return len(Device.get_all_devices())
    # Each layer below has its own error for a driver that is missing or too old.
    except Exception as exc:
        raise DeviceUnavailableError(
            f"no CUDA driver on this machine, or none that can be used: {exc}"
        ) from exc


def _open(ordinal: int) -> Any:
    n_devices = count_devices()
    if not 0 <= ordinal < n_devices:
        raise DeviceUnavailableError(
            f"no CUDA device {ordinal}: the driver shows {n_devices}"
        )
    return Device(ordinal)


@contextlib.contextmanager
def _restored_context() -> Iterator[None]:
    """Leave the thread with the context that it came with, if it came with one."""
    before = driver.cuCtxGetCurrent()[1]
    try:
        yield
    finally:
        if before is not None and int(before):
            checked(driver.cuCtxSetCurrent(before), "thread")


def _taken(loaded: _Loaded) -> PackedArguments:
    try:
        return loaded.free.pop()
    except IndexError:
        return PackedArguments(loaded.spec)


def stream_handle(stream: CudaStream | None) -> int:
    """Return a stream's number, which is 0 for None."""
    if stream is None:
        return 0
    ask = getattr(stream, "__cuda_stream__", None)
    if ask is None:
        raise TypeError(f"a stream is a handle, or has __cuda_stream__; got {stream!r}")
    return int(ask()[1])


def checked(result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver call gives beside its status; raise LaunchError of it."""
    status, *values = result
    if status:
        raise LaunchError(f"{what}: {_reason(status)}")
    return values[0] if values else None


def _reason(status: Any) -> str:
    text = driver.cuGetErrorString(status)[1]
    return f"{status.name}: {text.decode() if text else 'no explanation'}"
