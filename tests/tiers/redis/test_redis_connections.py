"""Connections in use: raw, dirty, busy, timed out, refused, and to a full server."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import redis

from hps_numba.errors import (
    TierCorruptionError,
    TierTimeoutError,
    TierUnavailableError,
)
from hps_numba.tiers.redis.channel import Channel
from hps_numba.tiers.redis.client import (
    SPARE_CONNECTIONS,
    RedisOptions,
    connect,
    map_exceptions,
    raw_socket,
)
from hps_numba.tiers.redis.topology import Topology
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer, wait_for

pytestmark = pytest.mark.service

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3])
SET_SCRIPT = "return redis.call('SET', KEYS[1], ARGV[1])"


@pytest.fixture(scope="module")
def full() -> Iterator[RedisServer]:
    """A server whose memory limit is below what it uses when empty."""
    with RedisServer({"maxmemory": "100kb"}) as server:
        yield server


@PROTOCOLS
def test_the_socket_of_a_connection_can_be_used_raw(
    server: RedisServer, protocol: int
) -> None:
    """Guards the one private name of redis-py that this package uses."""
    with closing(connect(RedisOptions(server.address, protocol=protocol))) as client:
        client.set("key", "value")
        connection = client.connection_pool.get_connection()
        raw = raw_socket(connection)
        raw.sendall(b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n")
        assert receive(raw, 11) == b"$5\r\nvalue\r\n"
        connection.send_command("GET", "key")  # redis-py goes on as if nothing was
        assert connection.read_response() == b"value"
        client.connection_pool.release(connection)
        connection.disconnect()
        with pytest.raises(TierUnavailableError, match="closed"):
            raw_socket(connection)


def receive(raw: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += raw.recv(size - len(data))
    return data


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("kind", ["single", "cluster"])
def test_a_connection_with_unread_data_never_gives_a_stale_reply(
    server: RedisServer, cluster: RedisCluster, kind: str, protocol: int
) -> None:
    address = server.address if kind == "single" else cluster.address
    with closing(connect(RedisOptions(address, protocol=protocol))) as client:
        assert read_after_leaving_data(client) == b"fresh"


def test_with_the_settings_of_redis_py_it_gives_a_stale_reply(
    server: RedisServer,
) -> None:
    """Shows that the test above can fail."""
    with redis.Redis(port=server.port) as client:
        assert read_after_leaving_data(client) == b"stale"


def read_after_leaving_data(client: redis.Redis | redis.RedisCluster) -> bytes:
    """Give a connection back with a reply unread, and read a key over it."""
    client.set("key", "fresh")
    single = client
    if isinstance(client, redis.RedisCluster):
        single = client.get_redis_connection(client.get_node_from_key("key"))
    pool = single.connection_pool
    connection = pool.get_connection()
    connection.send_command("ECHO", "stale")
    assert connection.can_read(timeout=5)
    pool.release(connection)
    found: bytes = client.get("key")
    return found


@pytest.mark.fault
def test_a_server_that_stops_answering_times_out_once(cluster: RedisCluster) -> None:
    """One command waits for one time-out: nothing is retried behind its back."""
    with closing(connect(RedisOptions(cluster.address, timeout_s=0.2))) as client:
        client.set("key", "value")
        node = cluster.master_of(b"key")
        node.client().config_resetstat()
        node.pause()
        try:
            with pytest.raises(TierTimeoutError), map_exceptions():
                client.get("key")
        finally:
            node.resume()
        assert client.get("key") == b"value"
        commands = node.client().info("commandstats")["cmdstat_get"]["calls"]
        assert commands == 2  # the one that timed out, and the one after


@pytest.mark.fault
def test_a_killed_server_is_unavailable_and_comes_back() -> None:
    with (
        RedisServer() as server,
        closing(connect(RedisOptions(server.address))) as client,
    ):
        client.set("key", "value")
        server.kill()
        with (
            pytest.raises(TierUnavailableError, match=server.address) as caught,
            map_exceptions("hps_et.m.t"),
        ):
            client.get("key")
        assert caught.value.tag == "hps_et.m.t"
        server.start()
        assert client.get("key") is None


def test_more_callers_than_connections_wait_for_each_other(
    server: RedisServer,
) -> None:
    options = RedisOptions(server.address, max_connections=1, timeout_s=0.1)
    with closing(connect(options)) as client:
        pool = client.connection_pool
        assert pool.max_connections == 1 + SPARE_CONNECTIONS
        taken = [pool.get_connection() for _ in range(pool.max_connections)]
        with (
            pytest.raises(TierUnavailableError, match="No connection available"),
            map_exceptions(),
        ):
            client.get("key")
        for connection in taken:
            pool.release(connection)
        assert client.get("key") is None


@pytest.mark.parametrize(
    "write",
    [
        lambda client: client.set("key", "value"),
        lambda client: client.eval(SET_SCRIPT, 1, "key", "value"),
        lambda client: client.pipeline(transaction=True).set("key", "value").execute(),
    ],
    ids=["command", "script", "transaction"],
)
def test_a_full_server_says_so(
    full: RedisServer, write: Callable[[redis.Redis], object]
) -> None:
    with closing(connect(RedisOptions(full.address))) as client:
        with (
            pytest.raises(TierUnavailableError, match=r"memory limit.*maxmemory"),
            map_exceptions(),
        ):
            write(client)
        assert client.get("key") is None  # reading goes on


@PROTOCOLS
def test_a_key_of_another_type_is_corruption(
    server: RedisServer, protocol: int
) -> None:
    with closing(connect(RedisOptions(server.address, protocol=protocol))) as client:
        client.set("key", "value")
        with (
            pytest.raises(TierCorruptionError, match="redis_layout"),
            map_exceptions("hps_et.m.t"),
        ):
            client.hmget("key", [b"field"])


@pytest.mark.fault
def test_a_server_that_loads_its_data_is_unavailable() -> None:
    """After a restart with a large file: it accepts connections and says LOADING."""
    slow = {"save": "3600 1", "key-load-delay": "50000"}  # microseconds a key
    with RedisServer(slow) as server:
        with server.client() as back_door:
            # It looks at its connections after each 2 MiB.
            rows = random.Random(0).randbytes(1 << 20)
            back_door.mset({f"{i}": rows for i in range(40)})
        server.stop()
        server.start(wait=False)
        with (
            closing(connect_when_listening(server)) as client,
            pytest.raises(TierUnavailableError, match=r"not ready yet.*loading"),
            map_exceptions(),
        ):
            client.get("1")


def connect_when_listening(server: RedisServer) -> redis.Redis:
    clients: list[redis.Redis] = []

    def connected() -> bool:
        try:
            clients.append(connect(RedisOptions(server.address)))
        except TierUnavailableError:
            return False
        return True

    wait_for(connected, what="a server that listens")
    return clients[0]


def test_a_channel_that_is_closed_twice_gives_its_connection_back_once(
    server: RedisServer,
) -> None:
    with closing(Topology(connect(RedisOptions(server.address)))) as topology:
        node = topology.node(0)
        lent = [node.connection() for _ in range(3)]  # or its pool has no room for two
        channel = Channel(node)
        channel.close()
        channel.close()
        lent += [node.connection() for _ in range(2)]
        assert len({id(connection) for connection in lent}) == 5
        for connection in lent:
            node.give_back(connection)
