"""Which servers answer: a circuit breaker for each.

A server that does not answer, or refuses a connection, costs one time-out. From then on
whoever asks for it is refused at once, until a background thread, which asks it with
growing pauses, has had an answer. No lookup is spent on trying.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from redis.exceptions import RedisError

from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.redis.topology import Node, Topology

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


@dataclass
class _Outage:
    node: Node
    reason: str
    since_s: float
    pause_s: float = _FIRST_PAUSE_S
    next_s: float = 0.0


@dataclass(frozen=True)
class NodeState:
    """A server that is not asked now, and why."""

    name: str
    reason: str
    down_s: float


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
        self._outages: dict[str, _Outage] = {}  # guarded by _changed
        self._thread: threading.Thread | None = None  # guarded by _changed
        self._closed = False  # guarded by _changed
        self.failures = 0  # outages that began; guarded by _changed

    def check(self, node: Node) -> None:
        """Refuse a server that is not asked now.

        Raises
        ------
        TierUnavailableError
            With the reason.
        """
        outage = self._outages.get(node.name) if self._outages else None
        if outage is not None:
            raise TierUnavailableError(
                f"server {node.name} is down since "
                f"{self._monotonic() - outage.since_s:.1f} s ({outage.reason}); it is "
                f"asked again in the background",
                tier="redis",
            )

    def failed(self, node: Node, reason: object) -> None:
        """Note that a server did not answer, and ask it in the background."""
        with self._changed:
            if node.name in self._outages or self._closed:
                return
            now_s = self._monotonic()
            self._outages[node.name] = _Outage(node, str(reason), now_s, next_s=now_s)
            self.failures += 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="hps-redis-health", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        logger.warning("redis server=%s down: %s", node.name, reason)

    def down(self) -> list[NodeState]:
        """Return the servers that are not asked now."""
        with self._changed:
            now_s = self._monotonic()
            return [
                NodeState(name, outage.reason, now_s - outage.since_s)
                for name, outage in sorted(self._outages.items())
            ]

    def close(self) -> None:
        """Stop the background thread; the second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (outage := self._due()) is not None:
            self._topology.refresh()
            answer = _ask(outage.node)
            gone = all(n.name != outage.node.name for n in self._topology.masters())
            with self._changed:
                if answer is None or gone:
                    self._outages.pop(outage.node.name, None)
                    took_s = self._monotonic() - outage.since_s
                else:
                    outage.reason = answer
                    outage.pause_s = min(2 * outage.pause_s, _LONGEST_PAUSE_S)
                    pause_s = outage.pause_s * random.uniform(0.5, 1.0)
                    outage.next_s = self._monotonic() + pause_s
            if answer is None or gone:
                state = "answers" if answer is None else "was replaced"
                logger.warning(
                    "redis server=%s %s after_s=%.2f", outage.node.name, state, took_s
                )

    def _due(self) -> _Outage | None:
        """Wait for the outage that is to be looked at next; None when closed."""
        with self._changed:
            while not self._closed:
                if not self._outages:
                    self._changed.wait()
                    continue
                first = min(self._outages.values(), key=lambda outage: outage.next_s)
                wait_s = first.next_s - self._monotonic()
                if wait_s <= 0:
                    return first
                self._changed.wait(wait_s)
            return None


def _ask(node: Node) -> str | None:
    """Return None if a server answers, else why not."""
    try:
        connection = node.connection()
    except (RedisError, OSError) as exc:
        return str(exc)
    try:
        connection.send_command("PING")
        connection.read_response()
    except (RedisError, OSError) as exc:
        connection.disconnect()
        return str(exc)
    finally:
        node.give_back(connection)
    return None
