"""Each error of redis-py, of sockets and of TLS, and what becomes of it."""

from __future__ import annotations

import ssl

import pytest
import redis
from redis.exceptions import (
    AskError,
    AuthorizationError,
    ClusterError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    RedisClusterException,
    SlotNotCoveredError,
    TryAgainError,
)

from hps_numba.errors import (
    ConfigError,
    TierCorruptionError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from hps_numba.tiers.redis.errors import map_exceptions, translate

TAG = "hps_et.model.table"


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (redis.AuthenticationError("invalid username-password pair"), ConfigError),
        (AuthorizationError("no"), ConfigError),
        (NoPermissionError("this user has no permissions to run 'get'"), ConfigError),
        (redis.TimeoutError("Timeout reading from socket"), TierTimeoutError),
        (TimeoutError("timed out"), TierTimeoutError),
        (redis.ConnectionError("Connection closed by server."), TierUnavailableError),
        (ConnectionResetError(104, "reset"), TierUnavailableError),
        (redis.BusyLoadingError("Redis is loading"), TierUnavailableError),
        (redis.ReadOnlyError("You can't write"), TierUnavailableError),
        (redis.OutOfMemoryError("command not allowed"), TierUnavailableError),
        (redis.ResponseError("MISCONF cannot persist"), TierUnavailableError),
        (redis.ResponseError("NOREPLICAS not enough"), TierUnavailableError),
        (redis.ResponseError("BUSY running a script"), TierUnavailableError),
        (MovedError("1 127.0.0.1:7000"), TierUnavailableError),
        (AskError("1 127.0.0.1:7000"), TierUnavailableError),
        (TryAgainError("Multiple keys request"), TierUnavailableError),
        (MasterDownError("link is down"), TierUnavailableError),
        (ClusterError("TTL exhausted."), TierUnavailableError),
        (SlotNotCoveredError("slot 1"), TierUnavailableError),
        (RedisClusterException("no node"), TierUnavailableError),
        (redis.ResponseError("WRONGTYPE Operation against"), TierCorruptionError),
        (InvalidResponse("Protocol Error: b'x'"), TierCorruptionError),
        (redis.ResponseError("unknown command 'MGET'"), TierError),
        (ssl.SSLEOFError(8, "EOF occurred"), TierUnavailableError),
        (tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), ConfigError),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), ConfigError),
        (tls_error("SSLV3_ALERT_HANDSHAKE_FAILURE"), ConfigError),
        (tls_error("WRONG_VERSION_NUMBER"), ConfigError),
        (tls_error("DECRYPTION_FAILED_OR_BAD_RECORD_MAC"), TierUnavailableError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value)[:50],
)
def test_each_error_has_its_kind(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, map_exceptions(TAG, node="10.0.0.1:7000"):
        raise error
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert "10.0.0.1:7000: " in str(caught.value)
    assert getattr(caught.value, "tag", TAG) == TAG


def test_what_lies_beneath_an_error_decides() -> None:
    """redis-py's cluster client wraps what a node said into one kind of error."""
    wrapped = RedisClusterException("Redis Cluster cannot be connected")
    for beneath, kind in (
        (redis.AuthenticationError("WRONGPASS"), ConfigError),
        (redis.BusyLoadingError("loading"), TierUnavailableError),
        (redis.TimeoutError("Timeout"), TierTimeoutError),
    ):
        wrapped.__cause__ = beneath
        assert type(translate(wrapped)) is kind


def test_errors_that_go_round_in_a_circle_come_to_an_end() -> None:
    first, second = redis.ConnectionError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert type(translate(first)) is TierUnavailableError


def test_our_own_errors_pass_unchanged() -> None:
    """Even those that are built-in errors too."""
    error = TierTimeoutError("late", tier="rocksdb", tag="other")
    with pytest.raises(TierTimeoutError) as caught, map_exceptions(TAG):
        raise error
    assert caught.value is error


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), map_exceptions(TAG):
        _ = 1 // 0
