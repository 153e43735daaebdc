"""Connections to a single Redis server or a cluster, through redis-py.

Topology, authentication, TLS and pooling are redis-py's; what is set here is how long
anything may take, that nothing is tried twice behind the caller's back, and that no
connection is reused which still has something to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from socket import socket
from typing import Any, Final, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.cluster import PRIMARY, ClusterNode
from redis.connection import AbstractConnection, Connection
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from hps_numba.errors import (
    ConfigError,
    TierTimeoutError,
    TierUnavailableError,
)
from hps_numba.tiers.redis.errors import NAME, map_exceptions
from hps_numba.tiers.redis.tls import RedisTls, connection_class

__all__ = [
    "Client",
    "RedisOptions",
    "RedisTls",
    "connect",
    "map_exceptions",
    "raw_socket",
]

DEFAULT_PORT: Final = 6379
OLDEST: Final = (6, 2)
SPARE_CONNECTIONS: Final = 8  # beside those of lookups: for writes, lists and checks
# "[::1]:6379", "host:6379" or "host"
_SEED: Final = re.compile(r"^(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]@/]+))(?::(\d{1,5}))?$")

Client: TypeAlias = "redis.Redis | redis.RedisCluster"


@dataclass(frozen=True)
class RedisOptions:
    """Where Redis is and how to talk to it.

    Parameters
    ----------
    address
        One or more seeds ``host:port``, separated by commas. One that answers is
        enough.
    user, password
        The ACL user; an empty password for the user ``default`` means none.
    tls
        Certificates, or None for plain TCP.
    timeout_s, connect_timeout_s
        How long a reply and a connection may take, in seconds.
    max_connections
        Connections to each node for lookups; writes and checks have some more.
    protocol
        The version of RESP, 2 or 3.
    """

    address: str
    user: str = "default"
    password: str = field(default="", repr=False)
    tls: RedisTls | None = None
    timeout_s: float = 1.0
    connect_timeout_s: float = 1.0
    max_connections: int = 5
    protocol: int = 3

    def __post_init__(self) -> None:
        _ = self.seeds
        if not (self.timeout_s > 0 and self.connect_timeout_s > 0):
            raise ConfigError(f"{NAME}: time-outs are positive numbers of seconds")
        if self.max_connections < 1:
            raise ConfigError(f"{NAME}: max_connections is at least 1")
        if self.protocol not in (2, 3):
            raise ConfigError(f"{NAME}: protocol is 2 or 3, not {self.protocol}")

    @property
    def seeds(self) -> list[tuple[str, int]]:
        """Host and port of each seed, in the order of ``address``."""
        return [_seed(text) for text in re.split(r"[,;\s]+", self.address.strip(",; "))]

    def connection_kwargs(self) -> dict[str, Any]:
        """Return what redis-py makes a pool of connections to one node with."""
        account = self.password or self.user != "default"
        return {
            "connection_class": connection_class(self.tls) if self.tls else Connection,
            "username": self.user if account else None,
            "password": self.password if account else None,
            "protocol": self.protocol,
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.connect_timeout_s,
            "max_connections": self.max_connections + SPARE_CONNECTIONS,
            "timeout": self.timeout_s,
            # With notifications redis-py takes unread data for one of them, and a
            # connection that comes back with half a reply unread would give it to the
            # next command.
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            "driver_info": None,  # two round trips less for each connection
        }


def connect(options: RedisOptions) -> Client:
    """Return a client of the server or the cluster behind the first seed that answers.

    Raises
    ------
    ConfigError
        The server is too old, refuses the account, or TLS does not come about.
    TierUnavailableError
        No seed answers.

    Notes
    -----
    Thread-safe clients; close them. Nothing is retried: a command waits for at most
    one time-out per node, and moved slots are followed.
    """
    seeds, settings, silent = options.seeds, options.connection_kwargs(), []
    for i, (host, port) in enumerate(seeds):
        node = f"{host}:{port}"
        try:
            with map_exceptions(user=options.user, node=node):
                return _open(seeds[i:], settings)
        except (TierUnavailableError, TierTimeoutError) as error:
            silent.append(error)
    reasons = "; ".join(str(error).removeprefix(f"{NAME}: ") for error in silent)
    raise TierUnavailableError(
        f"no seed answers: {reasons}; check the address and that the server runs",
        tier=NAME,
    ) from silent[0]


def raw_socket(connection: AbstractConnection) -> socket:
    """Return the connected socket of a connection, plain or TLS.

    redis-py can send bytes but not receive them into a buffer, hence this one look at
    what it keeps to itself. The parser must have nothing buffered: true of a
    connection that its pool just gave out.
    """
    found = connection._sock
    if found is None:
        raise TierUnavailableError("the connection was closed", tier=NAME)
    return found


def _open(seeds: list[tuple[str, int]], settings: dict[str, Any]) -> Client:
    """Ask the first seed what it is, and return the client for that."""
    host, port = seeds[0]
    retry = Retry(NoBackoff(), 0)
    pool = redis.BlockingConnectionPool(host=host, port=port, retry=retry, **settings)
    single = redis.Redis.from_pool(pool)
    try:
        mode = _mode(single, settings["protocol"])
    except BaseException:
        single.close()
        raise
    if mode == "standalone":
        return single
    single.close()
    if mode != "cluster":
        raise ConfigError(f"{NAME}: {host}:{port} is a {mode}; name a server")
    try:
        return _Cluster(
            # By URL, or it takes neither a pool class nor a connection class.
            url=f"redis://{_bracketed(host)}:{port}",
            startup_nodes=[ClusterNode(*seed) for seed in seeds[1:]],
            connection_pool_class=redis.BlockingConnectionPool,
            retry=retry,
            require_full_coverage=False,
            **settings,
        )
    except IndexError as error:  # no node in a map without slots
        raise TierUnavailableError(
            "the cluster has no slots; assign them (redis-cli --cluster create)",
            tier=NAME,
        ) from error


class _Cluster(redis.RedisCluster):
    """A client that follows ``ASK`` to servers it never heard of.

    A slot moves first to a new server, which has none, so no list of slots names it.
    """

    def get_node(
        self,
        host: str | None = None,
        port: str | int | None = None,
        node_name: str | None = None,
    ) -> ClusterNode | None:
        found: ClusterNode | None
        found = super().get_node(host, port, node_name)  # type: ignore[no-untyped-call]  # redis-py's
        if found is None and node_name is not None:
            host, _, port = node_name.rpartition(":")
            new = ClusterNode(host, int(port), PRIMARY)
            found = self.nodes_manager.nodes_cache.setdefault(node_name, new)
        return found


def _mode(client: redis.Redis, protocol: int) -> str:
    """Return what a server says it is, if it is new enough.

    By HELLO, which every account may run; INFO needs a right.
    """
    try:
        reply = client.execute_command("HELLO", protocol)
    except redis.ResponseError as error:
        if "unknown command" not in str(error):
            raise
        raise ConfigError(
            f"{NAME}: the server is older than 6.0; 6.2 is needed"
        ) from error
    pairs = reply if isinstance(reply, dict) else _paired(reply)
    version = pairs[b"version"].decode()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ConfigError(f"{NAME}: the server has version {version}; 6.2 is needed")
    return str(pairs[b"mode"].decode())


def _paired(flat: list[Any]) -> dict[Any, Any]:
    """Return a map as RESP2 sends it, names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _seed(text: str) -> tuple[str, int]:
    match = _SEED.match(text)
    port = int(match[3] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65_536:
        # Not echoed: a URL pasted here may have a password in it.
        raise ConfigError(
            f"{NAME}: address is host:port, or several of them with commas"
        )
    return match[1] or match[2], port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
