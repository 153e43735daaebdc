"""Which tiers a configuration opens, and what it asks of Redis."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hps_numba.config import ParameterServerConfig, RedisLayout
from hps_numba.errors import ConfigError, TierUnavailableError
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.stores import open_stores
from hps_numba.tiers.redis import tier as redis_tier
from hps_numba.types import OverflowPolicy
from tests.runtime.deployments import ITEMS, model, server_config, versions
from tests.support.redis_certificates import SERVER_NAME, Authority
from tests.support.redis_servers import RedisServer, ServerTls, speaks_tls
from tests.support.tls_front import TlsFront


class OpenedError(Exception):
    """Stops where the tier would connect."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the tier is opened with, instead of opening it."""
    given: dict[str, Any] = {}

    def note(self: object, options: object, **settings: Any) -> None:
        given.update(settings, options=options)
        raise OpenedError

    monkeypatch.setattr(redis_tier.RedisTier, "__init__", note)
    return given


def config(root: Path, **volatile: Any) -> ParameterServerConfig:
    return server_config(
        root,
        [model(root, [ITEMS])],
        volatile={"type": "redis_cluster", "num_partitions": 8} | volatile,
    )


def test_every_key_reaches_redis(tmp_path: Path, asked: dict[str, Any]) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    (tmp_path / "password").write_text("secret\n")
    with pytest.raises(OpenedError):
        open_stores(
            config(
                tmp_path,
                address="a:1,b:2",
                user_name="reader",
                password_file=str(tmp_path / "password"),
                num_partitions=12,
                num_node_connections=7,
                max_batch_size=999,
                redis_layout="hashes",
                redis_timeout_ms=250,
                redis_connect_timeout_ms=1500,
                redis_wait_replicas=2,
                enable_tls=True,
                tls_ca_certificate="authorities",
                tls_client_certificate=str(tmp_path / "cert.pem"),
                tls_client_key=str(tmp_path / "key.pem"),
                tls_server_name_identification="redis.example",
                overflow_margin=1000,
                overflow_policy="evict_oldest",
                overflow_resolution_target=0.5,
            )
        )
    options, overflow = asked["options"], asked["overflow"]
    assert options.seeds == [("a", 1), ("b", 2)]
    assert (options.user, options.password) == ("reader", "secret")
    assert (options.timeout_s, options.connect_timeout_s) == (0.25, 1.5)
    assert options.max_connections == 7
    assert options.tls.ca == "authorities"
    assert options.tls.certificate == str(tmp_path / "cert.pem")
    assert options.tls.key == str(tmp_path / "key.pem")
    assert options.tls.server_name == "redis.example"
    assert (asked["num_partitions"], asked["max_batch_size"]) == (12, 999)
    assert asked["layout"] is RedisLayout.HASHES
    assert asked["wait_replicas"] == 2
    assert (overflow.margin, overflow.target) == (1000, 0.5)
    assert overflow.policy is OverflowPolicy.EVICT_OLDEST


def test_defaults_ask_for_no_tls_and_no_margin(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(OpenedError):
        open_stores(config(tmp_path))
    assert asked["options"].tls is None
    assert asked["options"].password == ""
    assert asked["overflow"].margin is None
    assert asked["layout"] is RedisLayout.STRINGS


def test_tls_without_client_certificates_shows_none(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenedError):
        open_stores(config(tmp_path, enable_tls=True))
    tls = asked["options"].tls
    assert (tls.ca, tls.certificate, tls.key) == ("cacertbundle.crt", None, None)
    assert tls.server_name == "redis.localhost"


def test_a_missing_client_certificate_is_told(tmp_path: Path) -> None:
    wanted = config(tmp_path, enable_tls=True, tls_client_certificate="absent.pem")
    with pytest.raises(ConfigError, match=r"tls_client_certificate: absent\.pem"):
        open_stores(wanted)


def test_redis_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "redis" or name.startswith("hps_numba.tiers.redis."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=re.escape('pip install "hps-numba[redis]"')):
        open_stores(config(tmp_path))


def test_redis_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with RedisServer() as server:
        address = server.address
    with pytest.raises(TierUnavailableError, match=re.escape(address)):
        open_stores(config(tmp_path, address=address))


def test_a_database_that_cannot_be_opened_leaves_no_connection(tmp_path: Path) -> None:
    wanted = server_config(
        tmp_path,
        [model(tmp_path, [ITEMS])],
        volatile={"type": "redis_cluster", "num_partitions": 8},
        persistent={"path": "/proc/hps_numba/rocksdb"},
    )
    with RedisServer() as server, server.client() as client:
        before = client.info("clients")["connected_clients"]
        volatile = wanted.volatile_db.replace(address=server.address)
        with pytest.raises(TierUnavailableError, match="rocksdb"):
            open_stores(wanted.replace(volatile_db=volatile))
        assert client.info("clients")["connected_clients"] == before


SECRET = "correct-horse"
ACCOUNTS = {"user": ("default off", f"hps on >{SECRET} ~* &* +@all")}


@contextmanager
def secured(tls: ServerTls) -> Iterator[str]:
    """Run a server that asks for TLS, a client certificate and an account."""
    if speaks_tls():
        with RedisServer(ACCOUNTS, tls=tls) as server:
            yield server.address
    else:
        with RedisServer(ACCOUNTS) as server, TlsFront(tls, server.port) as front:
            yield front.address


def test_a_server_is_reached_by_tls_with_a_certificate_and_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("server", server=SERVER_NAME)
    mine = authority.issue("client")
    tls = ServerTls(authority.certificate, own.certificate, own.key, clients="yes")
    monkeypatch.setenv("HPS_TEST_REDIS_PASSWORD", SECRET)
    with secured(tls) as address:
        wanted = config(
            tmp_path,
            address=address,
            user_name="hps",
            password_env="HPS_TEST_REDIS_PASSWORD",
            enable_tls=True,
            tls_ca_certificate=str(authority.certificate),
            tls_client_certificate=str(mine.certificate),
            tls_client_key=str(mine.key),
            tls_server_name_identification=SERVER_NAME,
        )
        for _ in range(2):
            with HPS(wanted) as server:
                assert server.locate("wdl", 0, [1]) == ["redis"]
                assert versions(server, [1, 2, 5000]) == [1, 1, 0]
        monkeypatch.setenv("HPS_TEST_REDIS_PASSWORD", "battery-staple")
        with pytest.raises(ConfigError, match="hps") as caught:
            HPS(wanted)
        assert "battery-staple" not in str(caught.value)
