"""TLS to a server: versions, client certificates, names, and what is refused."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis

from hps_numba.errors import ConfigError, TierUnavailableError
from hps_numba.tiers.redis.client import RedisOptions, RedisTls, connect, raw_socket
from tests.support.redis_certificates import SERVER_NAME, Authority, Pair
from tests.support.redis_servers import RedisServer, ServerTls, speaks_tls, wait_for
from tests.support.tls_front import TlsFront

pytestmark = pytest.mark.service

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3])
SECRET = "correct-horse"
ACCOUNTS = {"user": ("default off", f"hps on >{SECRET} ~* &* +@all")}


@dataclass(frozen=True)
class Files:
    """What the tests of this file need signed."""

    authority: Authority
    stranger: Authority
    server: Pair
    expired: Pair
    client: Pair
    foreign: Pair
    encrypted: Pair

    def served(self, **changes: object) -> ServerTls:
        """The server's side."""
        pair = self.server
        tls = ServerTls(self.authority.certificate, pair.certificate, pair.key)
        return replace(tls, **changes)

    def trusted(self, **changes: object) -> RedisTls:
        """The client's side."""
        return replace(RedisTls(str(self.authority.certificate)), **changes)

    def shown(self, pair: Pair) -> RedisTls:
        """The client's side with a client certificate."""
        return self.trusted(certificate=str(pair.certificate), key=str(pair.key))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    authority = Authority(tmp_path_factory.mktemp("ours"))
    stranger = Authority(tmp_path_factory.mktemp("theirs"), "stranger")
    return Files(
        authority,
        stranger,
        server=authority.issue("server", server=SERVER_NAME),
        expired=authority.issue("expired", server=SERVER_NAME, expired=True),
        client=authority.issue("client"),
        foreign=stranger.issue("foreign"),
        encrypted=authority.issue("encrypted", password=b"secret"),
    )


@contextmanager
def tls_server(tls: ServerTls) -> Iterator[str]:
    """Run a server with an account, and return its seed.

    TLS is the server's own if it was built with it, and a front's otherwise.
    """
    if speaks_tls():
        with RedisServer(ACCOUNTS, tls=tls) as server:
            yield server.address
    else:
        with RedisServer(ACCOUNTS) as server, TlsFront(tls, server.port) as front:
            yield front.address


def options(address: str, tls: RedisTls, protocol: int = 3) -> RedisOptions:
    return RedisOptions(address, "hps", SECRET, tls, timeout_s=2.0, protocol=protocol)


@PROTOCOLS
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_an_account_signs_in_over_tls(
    files: Files, version: str, protocol: int
) -> None:
    with (
        tls_server(files.served(protocols=version)) as address,
        closing(connect(options(address, files.trusted(), protocol))) as client,
    ):
        client.set("key", "value")
        connection = client.connection_pool.get_connection()
        raw = raw_socket(connection)
        assert isinstance(raw, ssl.SSLSocket)
        assert raw.version() == version
        raw.sendall(b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n")
        received = bytearray(11)
        assert raw.recv_into(received) == 11
        assert received == b"$5\r\nvalue\r\n"
        client.connection_pool.release(connection)


def test_a_reply_left_unread_over_tls_is_never_given_to_the_next(files: Files) -> None:
    with (
        tls_server(files.served()) as address,
        closing(connect(options(address, files.trusted()))) as client,
    ):
        client.set("key", "fresh")
        connection = client.connection_pool.get_connection()
        connection.send_command("ECHO", "stale")
        assert connection.can_read(timeout=5)
        client.connection_pool.release(connection)
        assert client.get("key") == b"fresh"


@PROTOCOLS
def test_a_server_may_ask_for_a_client_certificate(files: Files, protocol: int) -> None:
    with (
        tls_server(files.served(clients="yes")) as address,
        closing(
            connect(options(address, files.shown(files.client), protocol))
        ) as client,
    ):
        assert client.ping()


@PROTOCOLS
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_missing_client_certificate_is_named(
    files: Files, version: str, protocol: int
) -> None:
    with (
        tls_server(files.served(clients="yes", protocols=version)) as address,
        pytest.raises(ConfigError, match="certificate"),
    ):
        connect(options(address, files.trusted(), protocol))


def test_a_client_certificate_of_another_authority_is_refused(files: Files) -> None:
    with (
        tls_server(files.served(clients="yes")) as address,
        pytest.raises(ConfigError, match="does not accept the client's certificate"),
    ):
        connect(options(address, files.shown(files.foreign)))


def test_a_server_of_another_authority_is_not_accepted(files: Files) -> None:
    tls = RedisTls(str(files.stranger.certificate))
    with (
        tls_server(files.served()) as address,
        pytest.raises(ConfigError, match=r"not accepted.*tls_ca_certificate"),
    ):
        connect(options(address, tls))


def test_an_expired_certificate_is_not_accepted(files: Files) -> None:
    expired = files.expired
    tls = files.served(certificate=expired.certificate, key=expired.key)
    with (
        tls_server(tls) as address,
        pytest.raises(ConfigError, match=f"{address}.*expired"),
    ):
        connect(options(address, files.trusted()))


def test_the_server_name_is_asked_for_and_verified(files: Files) -> None:
    with (
        RedisServer(ACCOUNTS) as server,
        TlsFront(files.served(), server.port) as front,
    ):
        named = files.trusted(server_name=SERVER_NAME)
        with closing(connect(options(front.address, named))) as client:
            assert client.ping()
        assert set(front.seen_names) == {SERVER_NAME}
        wrong = files.trusted(server_name="other.test")
        with pytest.raises(ConfigError, match=r"other\.test.*server_name"):
            connect(options(front.address, wrong))
        assert front.seen_names[-1] == "other.test"


def test_without_a_server_name_the_address_is_verified(files: Files) -> None:
    with (
        tls_server(files.served()) as address,
        pytest.raises(ConfigError, match=r"localhost.*server_name"),
    ):
        connect(options(address.replace("127.0.0.1", "localhost"), files.trusted()))


def test_every_node_of_a_cluster_is_reached_by_the_server_name(files: Files) -> None:
    with TlsFront(files.served()) as front:
        cluster = {
            "cluster-enabled": "yes",
            "cluster-announce-ip": "127.0.0.1",
            "cluster-announce-port": str(front.port),
        }
        with RedisServer(cluster) as server:
            front.target = server.port
            with server.client() as back_door:
                back_door.execute_command("CLUSTER ADDSLOTS", *range(16_384))
                wait_for(
                    lambda: back_door.cluster("INFO")["cluster_state"] == "ok",
                    what="a cluster of one",
                )
            named = files.trusted(server_name=SERVER_NAME)
            with closing(connect(RedisOptions(front.address, tls=named))) as client:
                assert isinstance(client, redis.RedisCluster)
                client.set("key", "value")
                assert client.get("key") == b"value"
            assert set(front.seen_names) == {SERVER_NAME}


def test_the_authorities_may_be_a_directory(files: Files, tmp_path: Path) -> None:
    for authority in (files.stranger, files.authority):
        copied = tmp_path / authority.certificate.name
        copied.write_bytes(authority.certificate.read_bytes())
    (tmp_path / "README").write_text("no certificate")
    with (
        tls_server(files.served()) as address,
        closing(connect(options(address, RedisTls(str(tmp_path))))) as client,
    ):
        assert client.ping()


def test_only_the_configured_authorities_are_trusted(files: Files) -> None:
    """Not those of the system, which redis-py adds to them."""
    context = files.trusted().context()
    assert [dict(ca["subject"][0]) for ca in context.get_ca_certs()] == [
        {"commonName": "authority"}
    ]


def test_plain_tcp_where_tls_is_expected_ends_soon(files: Files) -> None:
    with RedisServer() as plain, pytest.raises((ConfigError, TierUnavailableError)):
        connect(options(plain.address, files.trusted()))
    with (
        tls_server(files.served()) as address,
        pytest.raises(TierUnavailableError, match=address),
    ):
        connect(RedisOptions(address))


def test_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for tls, said in (
        (RedisTls("/no/such/file"), "/no/such/file"),
        (RedisTls(str(files.server.key)), "tls_ca_certificate"),
        (RedisTls(str(empty)), "no CA certificate"),
        (files.trusted(key=str(files.client.key)), "the certificate is missing"),
        (files.trusted(certificate=str(files.client.certificate)), "the key is"),
        (files.shown(Pair(files.client.certificate, files.server.key)), "together"),
        (files.shown(files.encrypted), "encrypted"),
    ):
        with pytest.raises(ConfigError, match=said):
            connect(RedisOptions("127.0.0.1:1", tls=tls))
