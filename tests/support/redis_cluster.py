"""A real Redis Cluster on loopback, with slots that move step by step.

with RedisCluster(masters=3, replicas=1) as cluster:
    cluster.client().set("a", "b")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import redis
from redis.crc import key_slot
from typing_extensions import Self

from tests.support.redis_servers import Config, RedisServer, ServerTls, wait_for

N_SLOTS = 16_384
JOIN_TIMEOUT_S = 30.0
# What one MIGRATE of a test may take, in milliseconds.
MIGRATE_TIMEOUT_MS = 5000


class RedisCluster:
    """Masters with equal shares of the slots, each with the same number of replicas.

    Parameters
    ----------
    masters
        How many nodes own slots.
    replicas
        How many replicas each master has.
    node_timeout_ms
        How long a node is silent before the others call it dead.
    full_coverage
        Whether the whole cluster refuses to serve when a slot has no node.
    config
        Lines of redis.conf of every node, over `DEFAULTS` and those of a cluster.
    tls
        Files to speak TLS with, or None for plain TCP.
    user, password
        What the nodes, and the clients of the nodes, sign in with.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 0,
        *,
        node_timeout_ms: int = 1000,
        full_coverage: bool = False,
        config: Config | None = None,
        tls: ServerTls | None = None,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "cluster-enabled": "yes",
            "cluster-announce-ip": "127.0.0.1",
            "cluster-node-timeout": str(node_timeout_ms),
            "cluster-require-full-coverage": "yes" if full_coverage else "no",
            # A replica takes over however long its master was silent.
            "cluster-replica-validity-factor": "0",
            "cluster-migration-barrier": "100",
            "repl-diskless-sync": "yes",
            "repl-diskless-sync-delay": "0",
            "repl-ping-replica-period": "1",
        }
        if tls is not None:
            settings |= {"tls-cluster": "yes", "tls-replication": "yes"}
        settings |= config or {}
        self._settings = settings
        self._n_masters, self._n_replicas = masters, replicas
        self._clients: list[redis.RedisCluster] = []
        self.nodes = [
            RedisServer(settings, tls=tls, user=user, password=password)
            for _ in range(masters * (1 + replicas))
        ]

    @property
    def address(self) -> str:
        """All nodes as seeds, comma separated."""
        return ",".join(node.address for node in self.nodes)

    @property
    def masters(self) -> list[RedisServer]:
        """The answering nodes that own slots now, in the order of `nodes`."""
        return [node for node in self._answering("master") if self.slots(node)]

    @property
    def replicas(self) -> list[RedisServer]:
        """The answering nodes that follow a master now, in the order of `nodes`."""
        return self._answering("slave")

    def client(self, *, protocol: int = 2) -> redis.RedisCluster:
        """Return a plain cluster client, closed with the cluster: a back door."""
        seed = self._first()
        client = redis.RedisCluster(
            "127.0.0.1",
            seed.port,
            protocol=protocol,
            require_full_coverage=False,
            **seed.options(),
        )
        self._clients.append(client)
        return client

    def view(self, node: RedisServer | None = None) -> dict[str, dict[str, Any]]:
        """Return CLUSTER NODES by address, as one node (the first alive) sees it."""
        with (node or self._first()).client() as client:
            nodes: dict[str, dict[str, Any]] = client.cluster("NODES")
        return nodes

    def slots(self, node: RedisServer) -> list[int]:
        """Return the slots of a node, as the first node alive sees it."""
        return slots_of(self.view()[node.address])

    def master_of(self, key: bytes) -> RedisServer:
        """Return the node that owns a key's slot."""
        return self.owner(key_slot(key))

    def owner(self, slot: int) -> RedisServer:
        """Return the node that owns a slot, as the first node alive sees it."""
        view = self.view()
        return next(node for node in self.nodes if slot in slots_of(view[node.address]))

    def replicas_of(self, master: RedisServer) -> list[RedisServer]:
        """Return the answering replicas of a node."""
        view = self.view()
        name = view[master.address]["node_id"]
        return [
            node
            for node in self._answering("slave")
            if view[node.address]["master_id"] == name
        ]

    def wait_for(
        self, predicate: Callable[[], object], timeout: float = 20.0, *, what: str = ""
    ) -> None:
        """Ask ``predicate`` until it is true, at most ``timeout`` seconds."""
        wait_for(predicate, timeout, what=what or "cluster")

    def wait_until_stable(self, timeout: float = JOIN_TIMEOUT_S) -> None:
        """Wait until every running node serves and agrees with the others on roles."""
        for node in self.nodes:
            if node.answering:
                wait_for(
                    partial(self._stable, node),
                    timeout,
                    what=f"cluster as {node.address} sees it",
                )

    def begin_move(self, slot: int, to: RedisServer) -> SlotMove:
        """Mark a slot as moving to another master; none of its keys has moved yet."""
        source = self.owner(slot)
        assert source is not to, f"slot {slot} is there already"
        view = self.view()
        with to.client() as client:
            command = f"CLUSTER SETSLOT {slot} IMPORTING"
            client.execute_command(command, view[source.address]["node_id"])
        with source.client() as client:
            command = f"CLUSTER SETSLOT {slot} MIGRATING"
            client.execute_command(command, view[to.address]["node_id"])
        return SlotMove(self, slot, source, to)

    def move_slot(self, slot: int, to: RedisServer) -> None:
        """Move a slot with all its keys to another master."""
        move = self.begin_move(slot, to)
        while move.migrate_keys(100):
            pass
        move.end()

    @contextmanager
    def joined(self) -> Iterator[RedisServer]:
        """Let one more master join, without slots; it has to have none when it goes."""
        with RedisServer(self._settings) as server:
            with server.client() as client:
                client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
            try:
                for node in self.nodes:
                    for a, b in ((node, server), (server, node)):
                        known = partial(self._introduced, a, b)
                        wait_for(known, what=f"{a.address} to know {b.address}")
                self.nodes.append(server)
                wait_for(partial(_serves, server), what=f"{server.address} to serve")
                yield server
            finally:
                name = self.view()[server.address]["node_id"]
                self.nodes = [node for node in self.nodes if node is not server]
                server.kill()
                for node in self.nodes:
                    with node.client() as client:
                        client.execute_command("CLUSTER FORGET", name)
                self.wait_until_stable()

    def flush(self) -> None:
        """Remove all keys."""
        for node in self.masters:
            with node.client() as client:
                client.flushall()

    def start(self) -> None:
        """Start the nodes and join them."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.start(wait=False), self.nodes))
        for node in self.nodes:
            node.wait_until_ready(n_starts=1)
        self._assign_slots()
        self._meet()
        self._replicate()
        self.wait_until_stable()

    def _assign_slots(self) -> None:
        bounds = [N_SLOTS * i // self._n_masters for i in range(self._n_masters + 1)]
        for i, node in enumerate(self.nodes):
            with node.client() as client:
                # Distinct epochs from the start: no election among the masters.
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
                if i < self._n_masters:
                    slots = range(bounds[i], bounds[i + 1])
                    client.execute_command("CLUSTER ADDSLOTS", *slots)

    def _meet(self) -> None:
        """Introduce every node to every other: quicker than gossip."""
        for i, node in enumerate(self.nodes):
            with node.client() as client:
                for other in self.nodes[i + 1 :]:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port)

    def _replicate(self) -> None:
        for i, node in enumerate(self.nodes[self._n_masters :]):
            master = self.nodes[i % self._n_masters]
            wait_for(
                partial(self._introduced, node, master),
                JOIN_TIMEOUT_S,
                what=f"{node.address} to know {master.address}",
            )
            name = self.view(node)[master.address]["node_id"]
            with node.client() as client:
                client.execute_command("CLUSTER REPLICATE", name)

    def _introduced(self, node: RedisServer, other: RedisServer) -> bool:
        entry = self.view(node).get(other.address)
        return entry is not None and "handshake" not in entry["flags"]

    def _stable(self, node: RedisServer) -> bool:
        """Return whether a node serves and sees slots, roles and links in order."""
        view = self.view(node)
        if view.keys() != {other.address for other in self.nodes}:
            return False
        alive = [view[other.address] for other in self.nodes if other.answering]
        if any({"handshake", "fail?", "fail"} & set(flags(entry)) for entry in alive):
            return False
        if sum(len(slots_of(entry)) for entry in alive) != N_SLOTS:
            return False
        with node.client() as client:
            state = client.cluster("INFO")["cluster_state"]
            link = client.info("replication").get("master_link_status", "up")
        followers = sum("slave" in flags(entry) for entry in alive)
        masters = sum(bool(slots_of(entry)) for entry in alive)
        return (state, link, followers) == ("ok", "up", len(alive) - masters)

    def _first(self) -> RedisServer:
        return next(node for node in self.nodes if node.answering)

    def _answering(self, role: str) -> list[RedisServer]:
        view = self.view()
        return [
            node
            for node in self.nodes
            if node.answering and role in flags(view[node.address])
        ]

    def close(self) -> None:
        """Stop all nodes and remove their folders; may be called twice."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for node in self.nodes:
            node.kill()  # with nothing to save, quicker than goodbye
            node.close()

    def __enter__(self) -> Self:
        """Start the nodes and join them."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the nodes and remove their folders."""
        self.close()


def _serves(node: RedisServer) -> bool:
    with node.client() as client:
        return bool(client.cluster("INFO")["cluster_state"] == "ok")


def flags(entry: dict[str, Any]) -> list[str]:
    """Return the flags of one node of CLUSTER NODES."""
    return str(entry["flags"]).split(",")


def slots_of(entry: dict[str, Any]) -> list[int]:
    """Return the slots of one node of CLUSTER NODES."""
    return [
        slot
        for first, *last in entry["slots"]
        for slot in range(int(first), int(last[0] if last else first) + 1)
    ]


@dataclass(frozen=True)
class SlotMove:
    """A slot on its way from one master to another."""

    cluster: RedisCluster
    slot: int
    source: RedisServer
    to: RedisServer

    def migrate_keys(self, count: int) -> int:
        """Move at most ``count`` keys; return how many there were to move."""
        with self.source.client() as client:
            # redis-py would decode the names, some of which are no text.
            client.response_callbacks.pop("CLUSTER GETKEYSINSLOT", None)
            keys = client.execute_command("CLUSTER GETKEYSINSLOT", self.slot, count)
        self.migrate(*keys)
        return len(keys)

    def migrate(self, *keys: bytes) -> None:
        """Move some keys of the slot."""
        if not keys:
            return
        with self.source.client() as client:
            client.execute_command(
                *("MIGRATE", "127.0.0.1", self.to.port, "", 0, MIGRATE_TIMEOUT_MS),
                *("KEYS", *keys),
            )

    def end(self) -> None:
        """Hand the slot over: to its new owner first, so that it always has one."""
        name = self.cluster.view()[self.to.address]["node_id"]
        others = [node for node in self.cluster.masters if node is not self.to]
        for node in (self.to, *others):
            with node.client() as client:
                try:
                    client.execute_command(f"CLUSTER SETSLOT {self.slot} NODE", name)
                except redis.ResponseError as error:
                    # It knows by gossip, and with its last slot it lost its role.
                    if "only with masters" not in str(error):
                        raise
