"""Connecting to a single server and to a cluster, and what is said when it fails."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import redis

from hps_numba.errors import (
    ConfigError,
    TierUnavailableError,
)
from hps_numba.tiers.redis.client import (
    RedisOptions,
    connect,
    map_exceptions,
)
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer

pytestmark = pytest.mark.service

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3])
SECRET = "correct-horse"
ACCOUNTS = {
    "user": (
        f"default on >{SECRET} ~* &* +@all",
        f"hps on >{SECRET} ~hps_et* +@all",
        "guest on nopass ~* +@read",
    )
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A server with accounts: no sign-in without a password, but for the guest."""
    with RedisServer(ACCOUNTS, user="default", password=SECRET) as server:
        yield server


@contextmanager
def refusing_port() -> Iterator[str]:
    """A seed that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def answering_port(reply: bytes) -> Iterator[str]:
    """A seed that answers each command with ``reply``: a server we do not have."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                while peer.recv(4096):
                    peer.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@PROTOCOLS
def test_a_single_server_gives_a_plain_client(
    server: RedisServer, protocol: int
) -> None:
    options = RedisOptions(server.address, protocol=protocol)
    with closing(connect(options)) as client:
        assert type(client) is redis.Redis
        client.set(b"\x00\r\n", b"\xff")
        assert client.get(b"\x00\r\n") == b"\xff"


@PROTOCOLS
def test_a_cluster_gives_a_cluster_client(cluster: RedisCluster, protocol: int) -> None:
    options = RedisOptions(cluster.nodes[1].address, protocol=protocol)
    with closing(connect(options)) as client:
        assert isinstance(client, redis.RedisCluster)
        assert {node.port for node in client.get_primaries()} == {
            node.port for node in cluster.nodes
        }
        for key in (b"a", b"b", b"c", b"d"):
            client.set(key, key)
            assert cluster.master_of(key).client().get(key) == key


def test_the_first_seed_that_answers_decides(
    server: RedisServer, cluster: RedisCluster
) -> None:
    with refusing_port() as dead:
        with closing(connect(RedisOptions(f"{dead},{server.address}"))) as client:
            assert type(client) is redis.Redis
        with closing(connect(RedisOptions(f"{dead}, {cluster.address}"))) as client:
            assert isinstance(client, redis.RedisCluster)


def test_a_seed_that_hangs_costs_one_time_out() -> None:
    with RedisServer() as hanging, RedisServer() as server:
        hanging.pause()
        seeds = f"{hanging.address},{server.address}"
        with closing(connect(RedisOptions(seeds, timeout_s=0.1))) as client:
            assert client.ping()


def test_without_a_seed_that_answers_all_are_named() -> None:
    with refusing_port() as first, refusing_port() as second:
        with pytest.raises(TierUnavailableError) as caught:
            connect(RedisOptions(f"{first},{second}"))
        assert first in str(caught.value)
        assert second in str(caught.value)
        assert caught.value.tier == "redis"


@PROTOCOLS
def test_an_account_may_do_what_it_has_the_right_to(
    guarded: RedisServer, protocol: int
) -> None:
    options = RedisOptions(
        guarded.address, user="hps", password=SECRET, protocol=protocol
    )
    with closing(connect(options)) as client:
        client.set("hps_et", "row")
        with (
            pytest.raises(ConfigError, match=r"'hps' lacks a right.*ACL SETUSER"),
            map_exceptions(user="hps"),
        ):
            client.set("other", "row")


@PROTOCOLS
def test_an_account_without_password_can_sign_in(
    guarded: RedisServer, protocol: int
) -> None:
    options = RedisOptions(guarded.address, user="guest", protocol=protocol)
    with closing(connect(options)) as client:
        assert client.get("hps_et.none") is None
        with (
            pytest.raises(ConfigError, match="user 'guest' lacks a right"),
            map_exceptions(user="guest"),
        ):
            client.set("hps_et", "row")


@PROTOCOLS
@pytest.mark.parametrize(
    ("user", "password"),
    [("hps", "wrong-secret"), ("nobody", "wrong-secret"), ("default", "")],
    ids=["wrong password", "wrong user", "no password"],
)
def test_a_wrong_account_is_a_configuration_error(
    guarded: RedisServer, user: str, password: str, protocol: int
) -> None:
    options = RedisOptions(guarded.address, user, password, protocol=protocol)
    with pytest.raises(ConfigError, match=f"user '{user}' was refused") as caught:
        connect(options)
    shown = "".join(traceback.format_exception(caught.value)) + repr(options)
    assert "wrong-secret" not in shown


def test_a_password_is_never_shown(guarded: RedisServer) -> None:
    options = RedisOptions(guarded.address, user="hps", password=SECRET)
    assert SECRET not in repr(options)
    with closing(connect(options)) as client:
        assert SECRET not in repr(client)
    with pytest.raises(ConfigError, match="address") as caught:
        RedisOptions(f"redis://hps:{SECRET}@host:6379")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "seeds"),
    [
        ("host", [("host", 6379)]),
        ("a:1,b:2", [("a", 1), ("b", 2)]),
        (" a:1 ; b:2; ", [("a", 1), ("b", 2)]),
        ("[::1]:7000,10.0.0.1:7001", [("::1", 7000), ("10.0.0.1", 7001)]),
    ],
)
def test_an_address_is_a_list_of_seeds(
    address: str, seeds: list[tuple[str, int]]
) -> None:
    assert RedisOptions(address).seeds == seeds


@pytest.mark.parametrize(
    "address", ["", "host:0", "host:65536", "a:b", "a::1", "a@b:1"]
)
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        RedisOptions(address)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"connect_timeout_s": -1},
        {"max_connections": 0},
        {"protocol": 1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="redis: "):
        RedisOptions("host", **options)  # type: ignore[arg-type]


def test_an_old_server_is_refused_with_its_version() -> None:
    hello = (
        b"%3\r\n$7\r\nversion\r\n$6\r\n6.0.16\r\n"
        b"$5\r\nproto\r\n:3\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n"
    )
    with (
        answering_port(hello) as address,
        pytest.raises(ConfigError, match=r"version 6\.0\.16; 6\.2 is needed"),
    ):
        connect(RedisOptions(address))
    with (
        answering_port(b"-ERR unknown command `HELLO`\r\n") as address,
        pytest.raises(ConfigError, match=r"older than 6\.0"),
    ):
        connect(RedisOptions(address, protocol=2))


def test_a_sentinel_is_no_server() -> None:
    hello = b"*4\r\n$7\r\nversion\r\n$3\r\n7.0\r\n$4\r\nmode\r\n$8\r\nsentinel\r\n"
    with (
        answering_port(hello) as address,
        pytest.raises(ConfigError, match="is a sentinel"),
    ):
        connect(RedisOptions(address, protocol=2))


def test_a_cluster_without_slots_is_unavailable() -> None:
    with (
        RedisServer({"cluster-enabled": "yes"}) as server,
        pytest.raises(TierUnavailableError, match="no slots"),
    ):
        connect(RedisOptions(server.address))
