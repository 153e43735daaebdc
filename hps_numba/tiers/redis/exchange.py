"""Sending prepared commands to many servers at once and taking their replies.

For writes, whose replies are few: they are read by redis-py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.connection import Connection
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from hps_numba.errors import TierError, TierTimeoutError
from hps_numba.tiers.redis.client import SPARE_CONNECTIONS
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.layout import Bytes
from hps_numba.tiers.redis.topology import Node

# Units of a server on their way: one is worked on, the next arrives. Of small ones
# there are more, or the server waits until the client is woken.
_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 2, 8
_BYTES_IN_FLIGHT = 256 << 10


@dataclass
class Unit:
    """Commands for one partition that are sent together, and their replies."""

    partition: int
    commands: Sequence[bytes | Bytes]
    n_replies: int
    low: int = 0  # the unit's keys, in the order by partition
    high: int = 0
    replies: list[Any] = field(default_factory=list)
    error: Exception | None = None  # it was not answered
    node: Node | None = None  # who was asked

    @property
    def n_bytes(self) -> int:
        """Size of the commands."""
        return sum(len(command) for command in self.commands)


class Exchange:
    """Sends units to the servers that have their partitions. Thread-safe.

    Parameters
    ----------
    health
        Which servers answer.
    n_replicas
        Replicas of each server that have to confirm what was written.
    timeout_s
        How long they may take.
    """

    def __init__(self, health: Health, *, n_replicas: int, timeout_s: float) -> None:
        self._health = health
        self._n_replicas = n_replicas
        self._timeout_s = timeout_s
        self._turns = threading.Semaphore(SPARE_CONNECTIONS // 2)

    def run(
        self, units: Iterable[Unit], slots: Sequence[int], *, confirmed: bool = False
    ) -> None:
        """Send all units and fill in their replies, or why they have none.

        ``slots`` has the slot of each partition. Units may be made as they are sent.
        ``confirmed`` waits for replicas, if any have to have what is written.
        """
        links: dict[str, _Link] = {}
        self._turns.acquire()  # no more writers than there are connections
        try:
            for unit in units:
                link = self._link(unit, slots, links)
                if link is not None:
                    link.put(unit)
            for link in links.values():
                link.finish(self._n_replicas if confirmed else 0, self._timeout_s)
        finally:
            for link in links.values():
                link.close()
            self._turns.release()

    def _link(
        self, unit: Unit, slots: Sequence[int], links: dict[str, _Link]
    ) -> _Link | None:
        try:
            node = self._health.server_of(slots[unit.partition])
        except TierError as exc:
            unit.error = exc
            return None
        unit.node = node
        if node.name not in links:
            links[node.name] = _Link(node)
        return links[node.name]


class _Link:
    """One connection, and the units whose replies it has to bring.

    An error of the connection ends it: its units have that error from then on.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._flying: deque[Unit] = deque()
        self._done: list[Unit] = []
        self._connection: Connection | None = None
        self._error: Exception | None = None
        try:
            self._connection = node.connection()
        except (RedisError, OSError) as exc:
            self._error = exc

    def put(self, unit: Unit) -> None:
        """Send a unit, once there is room for it."""
        while not self._has_room(unit):
            self._take()
        if self._connection is None:
            unit.error = self._error
            return
        self._flying.append(unit)
        try:
            views = [memoryview(part) for part in unit.commands]  # type: ignore[arg-type]  # NumPy's stubs lack __buffer__
            self._connection.send_packed_command(views)
        except (RedisError, OSError) as exc:
            self._fail(exc)

    def finish(self, n_replicas: int, timeout_s: float) -> None:
        """Take all replies, and wait until so many replicas have what was written."""
        while self._flying:
            self._take()
        if not n_replicas or self._connection is None or not self._done:
            return
        try:
            self._connection.send_command("WAIT", n_replicas, int(timeout_s * 500))
            confirmed = self._connection.read_response()
        except (RedisError, OSError) as exc:
            self._flying.extend(self._done)
            self._fail(exc)
            return
        if confirmed < n_replicas:
            error = TierTimeoutError(
                f"{confirmed} replica(s) of server {self._node.name} confirmed the "
                f"write in time; {n_replicas} have to",
                tier="redis",
            )
            for unit in self._done:
                unit.error = error

    def close(self) -> None:
        """Give the connection back; one with replies on their way is closed."""
        if self._connection is not None:
            if self._flying:
                self._connection.disconnect()
            self._node.give_back(self._connection)
            self._connection = None

    def _has_room(self, unit: Unit) -> bool:
        """Whether one more unit may be on its way."""
        n_units = len(self._flying)
        if n_units < _LEAST_IN_FLIGHT or n_units >= _MOST_IN_FLIGHT:
            return n_units < _LEAST_IN_FLIGHT
        n_bytes = sum(flying.n_bytes for flying in self._flying)
        return n_bytes + unit.n_bytes <= _BYTES_IN_FLIGHT

    def _take(self) -> None:
        """Read the replies of the unit that was sent first."""
        unit = self._flying[0]
        assert self._connection is not None
        try:
            for _ in range(unit.n_replies):
                try:
                    reply = self._connection.read_response(disable_decoding=True)
                except ResponseError as exc:
                    reply = exc
                unit.replies.append(reply)
        except (RedisError, OSError) as exc:
            self._fail(exc)
            return
        except (TypeError, ValueError) as exc:  # redis-py takes replies at their word
            self._fail(InvalidResponse(f"no reply: {exc}"))
            return
        self._done.append(self._flying.popleft())

    def _fail(self, error: Exception) -> None:
        """End the connection; nobody knows what became of what was sent."""
        self._error = error
        for unit in self._flying:
            unit.error = error
        self._flying.clear()
        if self._connection is not None:
            self._connection.disconnect()
            self._node.give_back(self._connection)
            self._connection = None
