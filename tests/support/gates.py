"""Threads that stop at named points.

``Scheduler`` runs tasks one at a time, from one stop point to the next, as its caller
decides. ``StopPoints`` holds a thread of an ordinary test at a point until the test
lets it go.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

_PATIENCE_S = 30.0  # a thread that takes longer hangs: the test fails


@dataclass
class _Task:
    call: Callable[[], None]
    pending: str | None
    ready: Callable[[], bool] = lambda: True
    started: bool = False
    go: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None


class Abandoned(BaseException):
    """Ends a task whose schedule is not followed further."""


class Scheduler:
    """Runs tasks one at a time, each from one stop point to its next.

    Nothing but ``SteppedLock`` and ``SteppedEvent`` may block a task, so that the
    scheduler knows which tasks can go on and needs no time limit to find out.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._tasks: dict[str, _Task] = {}
        self._current = threading.local()
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._abandoned = False

    def spawn(self, name: str, call: Callable[[], None], *, label: str) -> None:
        """Add a task that waits at ``label`` before it begins."""
        task = _Task(call, label)
        task.go.acquire()
        self._tasks[name] = task

    def point(self, label: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Stop the calling task until it is its turn; others pass through."""
        task: _Task | None = getattr(self._current, "task", None)
        if task is None:
            return
        if self._abandoned:
            raise Abandoned
        task.ready, task.pending = ready, label
        self._arrived.release()
        task.go.acquire()
        if self._abandoned:
            raise Abandoned

    def enabled(self) -> dict[str, str]:
        """Return where each task stands that can go on."""
        return {
            name: task.pending
            for name, task in self._tasks.items()
            if task.pending is not None and task.ready()
        }

    @property
    def n_tasks(self) -> int:
        """Number of tasks so far."""
        return len(self._tasks)

    @property
    def finished(self) -> bool:
        """Whether all tasks have ended."""
        return all(task.pending is None for task in self._tasks.values())

    def step(self, name: str) -> None:
        """Let one task run to its next stop point or its end."""
        task = self._tasks[name]
        label, task.pending = task.pending, None
        if task.started:
            task.go.release()
        else:
            task.started = True
            self._threads.submit(self._run, task)
        if not self._arrived.acquire(timeout=_PATIENCE_S):
            raise AssertionError(f"task {name} never came back from {label}")
        if task.error is not None:
            raise task.error

    def where(self) -> dict[str, str]:
        """Return where each task stands that has not ended."""
        return {n: t.pending for n, t in self._tasks.items() if t.pending is not None}

    def abandon(self) -> None:
        """End all tasks where they stand."""
        self._abandoned = True
        for task in self._tasks.values():
            while task.started and task.pending is not None:
                task.pending = None
                task.go.release()
                self._arrived.acquire(timeout=_PATIENCE_S)

    def _run(self, task: _Task) -> None:
        self._current.task = task
        try:
            task.call()
        except Abandoned:
            pass
        except BaseException as exc:
            task.error = exc
        finally:
            self._current.task = None
            task.pending = None
            self._arrived.release()


class SteppedLock:
    """Stands for a ``threading.Lock`` that is held across stop points."""

    def __init__(self, scheduler: Scheduler, label: str) -> None:
        self._scheduler = scheduler
        self._label = label
        self._held = False

    def __enter__(self) -> None:
        self._scheduler.point(self._label, lambda: not self._held)
        assert not self._held
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class SteppedEvent:
    """Stands for a ``threading.Event`` that tasks wait for."""

    def __init__(self, scheduler: Scheduler, label: str) -> None:
        self._scheduler = scheduler
        self._label = label
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def wait(self) -> None:
        self._scheduler.point(self._label, self.is_set)


class StopPoints:
    """Holds threads at chosen points of an ordinary test. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._armed: set[str] = set()  # this and all below: guarded by _changed
        self._held: dict[str, list[int]] = {}  # tickets, the oldest first
        self._passed: Counter[str] = Counter()
        self._let_go: set[int] = set()

    def __call__(self, label: str) -> None:
        """Stop here if the point is armed, until it is released."""
        with self._changed:
            self._passed[label] += 1
            ticket = self._passed.total()
            held = self._held.setdefault(label, [])
            held.append(ticket)
            self._changed.notify_all()
            released = self._changed.wait_for(
                lambda: label not in self._armed or ticket in self._let_go, _PATIENCE_S
            )
            held.remove(ticket)
        assert released, f"nobody released {label}"

    def passed(self, label: str) -> int:
        """Return how often threads came to a point."""
        with self._changed:
            return self._passed[label]

    def arm(self, label: str) -> None:
        """Stop threads that come to a point from now on."""
        with self._changed:
            self._armed.add(label)

    def release(self, label: str) -> None:
        """Let the threads at a point go on, and those that come later."""
        with self._changed:
            self._armed.discard(label)
            self._changed.notify_all()

    def release_first(self, label: str) -> None:
        """Let the thread go on that has been at a point the longest."""
        with self._changed:
            self._let_go.add(self._held[label][0])
            self._changed.notify_all()

    def wait_held(self, label: str, n_threads: int = 1) -> None:
        """Wait until threads stand at an armed point."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: len(self._held.get(label, ())) >= n_threads, _PATIENCE_S
            )
        assert arrived, f"nobody came to {label}"
