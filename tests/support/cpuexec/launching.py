"""Runs launches of compiled kernels on the runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.cpuexec.building import runtime
from tests.support.cpuexec.compiling import Kernel
from tests.support.cpuexec.memory import DeviceMemory

Size = int | tuple[int, ...]

_SCHEDULES = {"uniform": 0, "priority": 1, "ordered": 2}
_MOST_THREADS = 1024


class KernelError(RuntimeError):
    """A kernel did what a GPU would not forgive, or forgives in silence.

    Attributes
    ----------
    kernel
        Name of the kernel; empty where no thread is to blame.
    block, thread
        Place of the thread: its block's index, and its own number in the block.
    reason
        What happened.
    """

    def __init__(
        self, kernel: str, block: tuple[int, ...], thread: int, reason: str
    ) -> None:
        where = f"{kernel}, block {block}, thread {thread}: " if kernel else ""
        super().__init__(where + reason)
        self.kernel, self.block, self.thread = kernel, block, thread
        self.reason = reason


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Parameters
    ----------
    kernel
        From :func:`compile_kernel`.
    grid, block
        Blocks and threads, as integers or up to three of them.
    args
        Integers and floats, as the kernel's argument types have them; for an array
        type, an array of the launch's memory.
    after
        Place in the list of :func:`run_together` of the launch that this one waits for.
    shared_bytes
        Size of the dynamic shared memory.
    """

    kernel: Kernel
    grid: Size
    block: Size
    args: tuple[Any, ...]
    after: int | None = None
    shared_bytes: int = 0


class _JobSpec(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("after", ctypes.c_int32),
    )


class _RunSpec(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("preempt", ctypes.c_double),
        ("weak", ctypes.c_double),
        ("max_steps", ctypes.c_uint64),
        ("resident", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("n_jobs", ctypes.c_int32),
        ("n_ranges", ctypes.c_int64),
        ("lows", ctypes.c_void_p),
        ("highs", ctypes.c_void_p),
    )


class _RunResult(ctypes.Structure):
    _fields_ = (
        ("steps", ctypes.c_uint64),
        ("failed", ctypes.c_int32),
        ("job", ctypes.c_int32),
        ("range", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("reason", ctypes.c_char * 480),
    )


def run(launch: Launch, memory: DeviceMemory, **schedule: Any) -> int:
    """Run one launch to its end; see :func:`run_together`."""
    return run_together([launch], memory, **schedule)


def run_together(
    launches: Sequence[Launch],
    memory: DeviceMemory,
    *,
    seed: int = 0,
    preempt: float = 0.05,
    schedule: str | None = None,
    weak: float | None = None,
    workers: int = 1,
    resident: int = 16,
    max_steps: int = 50_000_000,
) -> int:
    """Run launches beside each other, as streams of one device do.

    Parameters
    ----------
    launches
        Their blocks are mixed, but for those that come ``after`` another launch.
    memory
        What the kernels may touch.
    seed
        Chooses the interleaving; with one worker the same seed gives the same one.
    preempt
        Chance that a thread is switched out before a memory access. With 0 it runs
        until it waits for others, or for some thousand accesses.
    schedule
        ``uniform``: the next thread is any that is ready. ``priority``: one of the
        warp of highest priority, with rare changes of priority, so that a warp can be
        held up for long. ``ordered``: the lanes of a warp in turn, then the next warp;
        meant for speed. By default ordered if ``preempt`` is 0, else uniform.
    weak
        Chance that a load returns an older value where PTX allows one, so that the
        stores of a lane become visible to others late and in any order, until fences,
        releases, acquires and barriers bind them; from time to time a warp prefers the
        newest values, or the oldest. None for a memory as strong as this CPU's. Shared
        memory stays strong, and stores to one word are in the order of execution.
    workers
        Operating system threads that run blocks; more than one is not deterministic.
    resident
        Blocks that are under way at once, per worker.
    max_steps
        Switches between threads after which the run is given up.

    Returns
    -------
    int
        Switches between threads.

    Raises
    ------
    KernelError
        If a check fails, or the threads wait for ever.
    ValueError
        If a launch or an option makes no sense.

    Notes
    -----
    Releases the GIL.
    """
    if schedule is None:
        schedule = "uniform" if preempt > 0 else "ordered"
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {sorted(_SCHEDULES)}")
    if not 0 <= preempt <= 1 or workers < 1 or resident < 1:
        raise ValueError(f"{preempt=}, {workers=}, {resident=} make no sense")
    if weak is not None and (not 0 <= weak <= 1 or workers > 1):
        raise ValueError(f"{weak=} is no chance, or has more than one worker")
    lows, highs = memory.ranges()
    packed = [_pack(launch, memory) for launch in launches]
    jobs = (_JobSpec * max(1, len(launches)))()
    for index, (launch, arguments) in enumerate(zip(launches, packed, strict=True)):
        _fill_job(jobs[index], launch, arguments, index)
        code = launch.kernel.code if weak is None else launch.kernel.weak_code
        jobs[index].entry = code.entry
    spec = _RunSpec(
        seed=seed & (2**64 - 1),
        preempt=preempt,
        weak=-1.0 if weak is None else weak,
        max_steps=max_steps,
        resident=resident,
        workers=workers,
        schedule=_SCHEDULES[schedule],
        n_jobs=len(launches),
        n_ranges=len(lows),
        lows=lows.ctypes.data,
        highs=highs.ctypes.data,
    )
    result = _RunResult()
    runtime().nv_run(ctypes.byref(spec), jobs, ctypes.byref(result))
    if result.failed:
        place = "" if result.range < 0 else memory.describe(int(lows[result.range]))
        raise _error(result, launches, place)
    return int(result.steps)


def _three(size: Size) -> tuple[int, int, int]:
    given = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(given) <= 3 or min(given) < 1:
        raise ValueError(f"{size!r} is no size of a grid or block")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _pack(launch: Launch, memory: DeviceMemory) -> np.ndarray[Any, Any]:
    words: list[int] = []
    if len(launch.args) != len(launch.kernel.argtypes):
        raise ValueError(
            f"{launch.kernel.name} takes {len(launch.kernel.argtypes)} arguments, "
            f"not {len(launch.args)}"
        )
    for argtype, arg in zip(launch.kernel.argtypes, launch.args, strict=True):
        words += launch.kernel.words(argtype, arg, memory)
    return np.array([*words, 0], np.uint64)


def _fill_job(
    job: _JobSpec, launch: Launch, arguments: np.ndarray[Any, Any], index: int
) -> None:
    block = _three(launch.block)
    if int(np.prod(block)) > _MOST_THREADS:
        raise ValueError(f"a block of {block} has more than {_MOST_THREADS} threads")
    if launch.after is not None and not 0 <= launch.after < index:
        raise ValueError(f"launch {index} cannot come after launch {launch.after}")
    job.arguments = arguments.ctypes.data
    job.grid[:] = _three(launch.grid)
    job.block[:] = block
    job.shared_bytes = launch.shared_bytes
    job.after = -1 if launch.after is None else launch.after


def _error(result: _RunResult, launches: Sequence[Launch], place: str) -> KernelError:
    reason = f"{result.reason.decode()} {place}".rstrip()
    kernel = launches[result.job].kernel.name if result.job >= 0 else ""
    return KernelError(kernel, tuple(result.block), result.thread, reason)
