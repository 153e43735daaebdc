"""Which servers answer: a circuit breaker for each.

A server that does not answer, or refuses a connection, costs one time-out. From then on
whoever asks for it is refused at once, until a background thread, which asks it with
growing pauses, has had an answer. No lookup is spent on trying.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.redis.replies import Fate
from hps_numba.tiers.redis.topology import Node, Topology

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
GROWTH = 1.25  # a pause is about a fifth of the outage, and so is what it adds to it
CALM_S = 10.0  # a server that fails again within is asked at growing pauses at once


@dataclass
class _Outage:
    node: Node
    reason: str
    since_s: float
    pause_s: float
    next_s: float  # when it is asked again


@dataclass(frozen=True)
class NodeState:
    """A server that is not asked now, and why."""

    name: str
    reason: str
    down_s: float


class Outages:
    """The servers that are down, and when each is asked again. Not thread-safe.

    Parameters
    ----------
    jitter
        A factor for each pause: servers that found it down together ask it in turn.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._known: dict[str, _Outage] = {}
        self._past: dict[str, tuple[float, float]] = {}  # end, and the last pause

    def get(self, name: str) -> _Outage | None:
        """Return the outage of a server; safe beside changes."""
        return self._known.get(name)

    def all(self) -> list[_Outage]:
        """Return all outages, by the name of the server."""
        return [self._known[name] for name in sorted(self._known)]

    def begin(self, node: Node, reason: str, now_s: float) -> bool:
        """Note that a server failed; return whether that is news."""
        if node.name in self._known:
            return False
        ended_s, pause_s = self._past.pop(node.name, (-math.inf, FIRST_PAUSE_S))
        outage = _Outage(node, reason, now_s, FIRST_PAUSE_S, now_s)
        if now_s - ended_s < CALM_S:  # it answers some questions and not others
            outage.pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            outage.next_s = now_s + outage.pause_s * self._jitter()
        self._known[node.name] = outage
        return True

    def fail_again(self, name: str, reason: str, now_s: float) -> None:
        """Note that a server that is down still does not answer."""
        outage = self._known[name]
        outage.reason = reason
        outage.next_s = now_s + outage.pause_s * self._jitter()
        outage.pause_s = min(GROWTH * outage.pause_s, LONGEST_PAUSE_S)

    def end(self, name: str, now_s: float) -> None:
        """Note that a server answers, or is not asked any more."""
        self._past[name] = (now_s, self._known.pop(name).pause_s)
        calm = [n for n, (ended_s, _) in self._past.items() if now_s - ended_s > CALM_S]
        for name in calm:
            del self._past[name]

    def first(self) -> _Outage | None:
        """Return the outage that is to be looked at next."""
        return min(self._known.values(), key=lambda o: o.next_s, default=None)


class Health:
    """The breakers of all servers. Thread-safe.

    Parameters
    ----------
    topology
        Refreshed whenever a server that failed is asked again: another one may have
        taken over.
    monotonic
        Time in s.
    """

    def __init__(
        self, topology: Topology, monotonic: Callable[[], float] = monotonic
    ) -> None:
        self._topology = topology
        self._monotonic = monotonic
        self._changed = threading.Condition(threading.Lock())
        self._outages = Outages(lambda: random.uniform(0.5, 1.0))  # guarded by _changed
        self._refresh_s = math.inf  # when to refresh the topology; guarded by _changed
        self._refreshed_s = -math.inf  # guarded by _changed
        self._thread: threading.Thread | None = None  # guarded by _changed
        self._closed = False  # guarded by _changed
        self.failures = 0  # outages that began; guarded by _changed

    def server_of(self, slot: int) -> Node:
        """Return the server that has a slot.

        Raises
        ------
        TierUnavailableError
            If no server has it, or the one that has is not asked now.
        """
        try:
            node = self._topology.node(slot)
        except TierUnavailableError:
            self.outdated()
            raise
        self.check(node)
        return node

    def check(self, node: Node) -> None:
        """Refuse a server that is not asked now.

        Raises
        ------
        TierUnavailableError
            With the reason.
        """
        outage = self._outages.get(node.name)
        if outage is not None:
            raise TierUnavailableError(
                f"server {node.name} is down since "
                f"{self._monotonic() - outage.since_s:.1f} s ({outage.reason}); it is "
                f"asked again in the background",
                tier="redis",
            )

    def learn(self, node: Node, fate: Fate, reason: object) -> None:
        """Note what an error of a server says about it."""
        if fate is Fate.OUTDATED:
            self.outdated()
        elif fate in (Fate.DOWN, Fate.RECONNECT):
            self.failed(node, reason)

    def failed(self, node: Node, reason: object) -> None:
        """Note that a server did not answer, and ask it in the background."""
        with self._changed:
            now_s = self._monotonic()
            if self._closed or not self._outages.begin(node, str(reason), now_s):
                return
            self.failures += 1
            self._wake_locked()
        logger.warning("redis server=%s down: %s", node.name, reason)

    def outdated(self) -> None:
        """Have the topology refreshed in the background, though not all the time."""
        with self._changed:
            if self._closed:
                return
            due_s = max(self._monotonic(), self._refreshed_s + FIRST_PAUSE_S)
            if due_s < self._refresh_s:
                self._refresh_s = due_s
                self._wake_locked()

    def down(self) -> list[NodeState]:
        """Return the servers that are not asked now."""
        with self._changed:
            now_s = self._monotonic()
            return [
                NodeState(o.node.name, o.reason, now_s - o.since_s)
                for o in self._outages.all()
            ]

    def close(self) -> None:
        """Stop the background thread; the second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _wake_locked(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="hps-redis-health", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while self._wait():
            with self._changed:
                outage = self._outages.first()
                if outage is not None and outage.next_s > self._monotonic():
                    outage = None
            # A server that just came back may not know yet that it was replaced.
            self._topology.refresh(avoid="" if outage is None else outage.node.name)
            with self._changed:
                self._refreshed_s, self._refresh_s = self._monotonic(), math.inf
            if outage is not None:
                self._look(outage)

    def _wait(self) -> bool:
        """Wait until something is due; return False when closed."""
        with self._changed:
            while not self._closed:
                first = self._outages.first()
                due_s = self._refresh_s
                if first is not None:
                    due_s = min(due_s, first.next_s)
                wait_s = due_s - self._monotonic()
                if wait_s <= 0:
                    return True
                self._changed.wait(None if math.isinf(wait_s) else wait_s)
            return False

    def _look(self, outage: _Outage) -> None:
        """Find out whether an outage is over."""
        name = outage.node.name
        gone = name not in self._topology.master_names()
        answer = None if gone else ask(outage.node)
        with self._changed:
            now_s = self._monotonic()
            if answer is not None:
                self._outages.fail_again(name, answer, now_s)
                return
            self._outages.end(name, now_s)
        logger.warning(
            "redis server=%s %s after_s=%.2f",
            name,
            "was replaced" if gone else "answers",
            now_s - outage.since_s,
        )


def ask(node: Node) -> str | None:
    """Return None if a server answers, else why not."""
    try:
        connection = node.connection()
    except Exception as exc:  # or nobody would ask again
        return str(exc)
    try:
        connection.send_command("PING")
        connection.read_response()
    except Exception as exc:
        connection.disconnect()
        return str(exc)
    finally:
        node.give_back(connection)
    return None
