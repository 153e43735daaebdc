"""Lanes: a connection to every server, for one lookup at a time.

A lane asks all servers at once and takes their answers as they come, in one thread.
There are so many lanes as connections per server are allowed; who finds none waits.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from redis.exceptions import InvalidResponse, RedisError

from hps_numba.errors import ClosedError, TierError, TierTimeoutError
from hps_numba.tiers.redis.channel import Batch, Channel, Trouble
from hps_numba.tiers.redis.layout import Numbers
from hps_numba.tiers.redis.topology import Node

_PATIENCE_S = 30.0  # for a lane; a lookup that has one does not take so long


class Lane:
    """Connections of one lookup at a time.

    Parameters
    ----------
    timeout_s
        Longest silence of a server that is to answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channels: dict[str, Channel] = {}

    def read(
        self, batch: Batch, work: Sequence[tuple[Node, Numbers]]
    ) -> tuple[list[Channel], list[Trouble]]:
        """Read the partitions of each server; return who was asked, and what failed."""
        troubles = []
        busy: dict[int, Channel] = {}
        self._forget_lost()
        for node, partitions in work:
            try:
                channel = self._channel(node)
            except (RedisError, OSError, TierError) as exc:
                targets = [
                    batch.order[batch.bounds[p] : batch.bounds[p + 1]]
                    for p in partitions
                ]
                troubles += [Trouble(node, part, exc) for part in targets if part.size]
                continue
            channel.ask(batch, partitions)
            busy[channel.fileno] = channel
        asked = list(busy.values())
        try:
            self._converse(busy, batch.asked)
        except BaseException:
            for channel in busy.values():
                self._drop(channel, InterruptedError("the lookup was interrupted"))
            raise
        for channel in asked:
            troubles += channel.troubles
        return asked, troubles

    def close(self) -> None:
        """Close all connections."""
        while self._channels:
            self._channels.popitem()[1].close()

    def _forget_lost(self) -> None:
        """Close what servers have closed, also those that left the cluster."""
        for name in [n for n, c in self._channels.items() if not c.quiet]:
            self._channels.pop(name).close()

    def _channel(self, node: Node) -> Channel:
        channel = self._channels.get(node.name)
        if channel is None:
            channel = self._channels[node.name] = Channel(node)
        return channel

    def _converse(
        self, busy: dict[int, Channel], asked: Callable[[], None] | None
    ) -> None:
        """Send and receive until all have answered or failed; empties ``busy``."""
        poller = select.poll()
        heard_s = dict.fromkeys(busy, monotonic())
        for fileno in list(busy):
            poller.register(fileno, select.POLLIN)
            self._step(busy, poller, fileno, receive=False)
        while busy:
            if asked and not any(channel.has_to_send for channel in busy.values()):
                asked()
                asked = None
            wait_s = min(heard_s[f] for f in busy) + self._timeout_s - monotonic()
            events = poller.poll(max(wait_s, 0.0) * 1e3)
            # Looked at before what came is worked on: an answer that lies here while
            # this thread is busy with another one is not late.
            late_s = monotonic() - self._timeout_s
            silent = busy.keys() - {fileno for fileno, _ in events}
            for fileno in [f for f in silent if heard_s[f] <= late_s]:
                poller.unregister(fileno)
                error = TimeoutError(f"no answer in {self._timeout_s:g} s")
                self._drop(busy.pop(fileno), error)
            for fileno, event in events:
                received = bool(event & ~select.POLLOUT)
                self._step(busy, poller, fileno, receive=received)
                heard_s[fileno] = monotonic()  # its next answer may take as long

    def _step(
        self,
        busy: dict[int, Channel],
        poller: select.poll,
        fileno: int,
        *,
        receive: bool,
    ) -> None:
        channel = busy[fileno]
        try:
            if receive and channel.receive():
                poller.unregister(fileno)
                del busy[fileno]
                return
            channel.send()
        except (OSError, InvalidResponse) as exc:
            poller.unregister(fileno)
            self._drop(busy.pop(fileno), exc)
            return
        out = select.POLLOUT if channel.wants_to_send else 0
        poller.modify(fileno, select.POLLIN | out)

    def _drop(self, channel: Channel, error: Exception) -> None:
        self._channels.pop(channel.node.name, None)
        channel.give_up(error)


class Lanes:
    """A bounded pool of lanes. Thread-safe.

    Parameters
    ----------
    n_lanes
        Most lookups at once.
    timeout_s
        Longest silence of a server.
    """

    def __init__(self, n_lanes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._free = threading.Semaphore(n_lanes)
        self._lock = threading.Lock()
        self._idle: list[Lane] = []  # guarded by _lock
        self._closed = False  # guarded by _lock

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Lend a lane; waits for one.

        Raises
        ------
        TierTimeoutError
            If none becomes free.
        ClosedError
            If the pool is closed.
        """
        if not self._free.acquire(timeout=_PATIENCE_S):
            raise TierTimeoutError(
                f"no connection became free in {_PATIENCE_S:g} s; raise "
                f"num_node_connections",
                tier="redis",
            )
        try:
            with self._lock:
                if self._closed:
                    raise ClosedError("the Redis tier is closed")
                lane = self._idle.pop() if self._idle else Lane(self._timeout_s)
            try:
                yield lane
            finally:
                with self._lock:
                    keep = not self._closed
                    if keep:
                        self._idle.append(lane)
                if not keep:
                    lane.close()
        finally:
            self._free.release()

    def close(self) -> None:
        """Close what is idle now, and the rest when it is given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()
