"""Which server has which partition, as redis-py knows it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import redis
from redis.cluster import ClusterNode
from redis.connection import Connection, ConnectionPool
from redis.exceptions import ConnectionError, InvalidResponse, MovedError

from hps_numba.errors import TierTimeoutError, TierUnavailableError

logger = logging.getLogger(__name__)

_ALL_LENT = "No connection available."  # as redis-py says it


@dataclass(frozen=True)
class Node:
    """A server that writes may go to."""

    name: str  # host:port
    pool: ConnectionPool
    closing: threading.Event  # no connection is kept once it is set

    def connection(self) -> Connection:
        """Return a connected connection; the caller gives it back.

        Raises
        ------
        TierTimeoutError
            If all are in use, which says nothing about the server.
        InvalidResponse
            If its greeting is none.
        """
        try:
            return self.pool.get_connection()
        except (AttributeError, LookupError, TypeError, ValueError) as exc:
            # redis-py looks into replies that are no map; and keeps the connection.
            self.pool.disconnect(inuse_connections=False)
            raise InvalidResponse(f"no greeting of a server: {exc!r}") from exc
        except ConnectionError as exc:
            if str(exc) != _ALL_LENT:
                raise
            raise TierTimeoutError(
                f"all connections to {self.name} are in use", tier="redis"
            ) from exc

    def give_back(self, connection: Connection) -> None:
        """Return a connection; one with unread replies must be disconnected before."""
        self.pool.release(connection)
        if self.closing.is_set():
            connection.disconnect()


class Topology:
    """The servers of a client. Thread-safe.

    Parameters
    ----------
    client
        Of a cluster or of a single server.
    """

    def __init__(self, client: redis.Redis | redis.RedisCluster) -> None:
        self.client = client
        self._closing = threading.Event()
        self._cluster: redis.RedisCluster | None = None
        self._single: Node | None = None
        if isinstance(client, redis.RedisCluster):
            self._cluster = client
        else:
            where = client.connection_pool.connection_kwargs
            name = f"{where['host']}:{where['port']}"
            self._single = Node(name, client.connection_pool, self._closing)

    def slot(self, key: bytes) -> int:
        """Return the slot of a key; a single server has one slot."""
        return int(self._cluster.keyslot(key)) if self._cluster else 0

    def node(self, slot: int) -> Node:
        """Return the server of a slot.

        Raises
        ------
        TierUnavailableError
            If no server has it now.
        """
        if self._cluster is None:
            assert self._single is not None
            return self._single
        owners = self._cluster.nodes_manager.slots_cache.get(slot)
        if not owners:
            raise TierUnavailableError(
                f"no server of the cluster has slot {slot}; see CLUSTER NODES",
                tier="redis",
            )
        return self._node(owners[0])

    def server_at(self, name: str) -> Node:
        """Return the server with an address, one that has no slots too."""
        if self._cluster is None:
            assert self._single is not None
            return self._single
        return self._node(self._cluster.get_node(node_name=name))

    def masters(self) -> list[Node]:
        """Return every server that has slots."""
        if self._cluster is None:
            assert self._single is not None
            return [self._single]
        return [self._node(node) for node in self._cluster.get_primaries()]

    def master_names(self) -> set[str]:
        """Return the name of every server that has slots."""
        return {node.name for node in self.masters()}

    def moved(self, error: MovedError) -> None:
        """Note what the reply ``MOVED <slot> <host:port>`` says."""
        if self._cluster is None:
            return
        manager = self._cluster.nodes_manager
        # One that nobody had when the topology was refreshed is no news to redis-py.
        manager.slots_cache.setdefault(error.slot_id, [])
        manager.move_slot(error)

    def refresh(self, *, avoid: str = "") -> None:
        """Ask the cluster who has what; keeps what is known if it cannot be asked.

        Parameters
        ----------
        avoid
            The name of a server that is asked last.
        """
        if self._cluster is None:
            return
        try:
            self._cluster.nodes_manager.initialize(
                disconnect_startup_nodes_pools=False, last_failed_node_name=avoid
            )
        except Exception as exc:  # a server may say anything, and redis-py follows it
            logger.warning("redis topology unknown: %r", exc)

    def close(self) -> None:
        """Close idle connections now, and others when they are given back."""
        self._closing.set()
        for node in self._known():
            node.pool.disconnect(inuse_connections=False)

    def _known(self) -> list[Node]:
        if self._cluster is None:
            return self.masters()
        return [self._node(node) for node in self._cluster.get_nodes()]

    def _node(self, node: ClusterNode) -> Node:
        assert self._cluster is not None
        pool = self._cluster.get_redis_connection(node).connection_pool
        return Node(node.name, pool, self._closing)
