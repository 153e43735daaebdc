"""What can go wrong between this process and Redis, in the words of this package."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis
from redis.exceptions import (
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisClusterException,
)

from hps_numba.errors import (
    ConfigError,
    HPSError,
    TierCorruptionError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)

NAME: Final = "redis"
# Replies that redis-py has no class for, or hides in the message of a failed script.
OUT_OF_MEMORY: Final = "OOM command not allowed"
WRONG_TYPE: Final = "WRONGTYPE"
PASSING: Final = ("MISCONF", "NOREPLICAS", "BUSY ", "UNKILLABLE")

Refused = (
    redis.AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
)
Unavailable = (
    redis.ConnectionError,
    redis.ReadOnlyError,
    redis.exceptions.AskError,
    redis.exceptions.ClusterError,
    redis.exceptions.TryAgainError,
    RedisClusterException,
)


@contextmanager
def map_exceptions(tag: str = "", *, user: str = "", node: str = "") -> Iterator[None]:
    """Raise errors of redis-py, of sockets and of TLS as errors of this package.

    Parameters
    ----------
    tag
        Tag of the table it is about, or ``""``.
    user
        Who is signed in, for messages about accounts, if that is known.
    node
        The node it is about, as ``host:port``, where the error may not say so.

    Raises
    ------
    ConfigError
        The account, its rights, a certificate or a key is wrong: trying again will not
        help.
    TierTimeoutError
        There was no answer in time.
    TierUnavailableError
        The node is away, is loading, is read-only, has no memory left, or the cluster
        is being rearranged: trying again later may help.
    TierCorruptionError
        A key has another type than its layout says, or the reply is no RESP.
    TierError
        Any other error reply; the message has it.
    """
    try:
        yield
    except HPSError:
        raise  # TierTimeoutError is a TimeoutError too
    except (redis.RedisError, RedisClusterException, OSError) as error:
        raise translate(error, tag=tag, user=user, node=node) from error


def translate(
    error: BaseException, *, tag: str = "", user: str = "", node: str = ""
) -> HPSError:
    """Return the error of this package that says what ``error`` says."""
    where = f"{node}: " if node else ""
    who = f"user {user!r}" if user else "the configured user"
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, Refused):
            return ConfigError(
                f"{NAME}: {where}{who} was refused ({cause}); check "
                "user_name and the password"
            )
        if isinstance(cause, NoPermissionError):
            return ConfigError(
                f"{NAME}: {where}{who} lacks a right ({cause}); grant it "
                "with ACL SETUSER"
            )
        if isinstance(cause, ssl.SSLError) and (said := _tls_mistake(cause)):
            return ConfigError(f"{NAME}: {where}{said}")
    kind, said = _describe(causes)
    return kind(f"{where}{said}", tier=NAME, tag=tag)


def _describe(causes: list[BaseException]) -> tuple[type[TierError], str]:
    error = causes[0]
    said = str(error) or type(error).__name__
    if isinstance(error, redis.OutOfMemoryError) or OUT_OF_MEMORY in said:
        return TierUnavailableError, (
            "the server has reached its memory limit and takes no rows; raise "
            "maxmemory or lower overflow_margin"
        )
    if isinstance(error, redis.BusyLoadingError) or _caused_by_loading(causes):
        return TierUnavailableError, f"the server is not ready yet: {said}"
    if WRONG_TYPE in said:
        return TierCorruptionError, (
            f"a key of the table has another type than redis_layout says ({said})"
        )
    if isinstance(error, InvalidResponse):
        return TierCorruptionError, f"the reply is no RESP: {said}"
    if any(isinstance(cause, redis.TimeoutError | TimeoutError) for cause in causes):
        return TierTimeoutError, f"no answer in time: {said}"
    if isinstance(error, (*Unavailable, OSError)) or said.startswith(PASSING):
        return TierUnavailableError, said
    return TierError, f"unexpected reply: {said}"


def _caused_by_loading(causes: list[BaseException]) -> bool:
    return any(isinstance(cause, redis.BusyLoadingError) for cause in causes)


def _tls_mistake(error: ssl.SSLError) -> str:
    """Return what is wrong with a certificate or the protocol, ``""`` if neither is."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of the server is not accepted: {error.verify_message}; "
            "check tls_ca_certificate and tls_server_name_identification"
        )
    reason = getattr(error, "reason", None) or ""  # OpenSSL gave none
    if "ALERT" in reason and ("CERT" in reason or "UNKNOWN_CA" in reason):
        return (
            f"the server does not accept the client's certificate ({reason}); check "
            "tls_client_certificate and tls_client_key"
        )
    if "ALERT" in reason or "VERSION" in reason or "PROTOCOL" in reason:
        return (
            f"no TLS with this server ({reason}); check that it speaks TLS 1.2 or 1.3 "
            "on this port, and what certificate it asks for"
        )
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from or during."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
