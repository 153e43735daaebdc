"""What an error of a server means for the keys that it was asked for."""

from __future__ import annotations

from enum import Enum

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    ExecAbortError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from hps_numba.errors import TierError, TierUnavailableError
from hps_numba.tiers.redis.errors import translate
from hps_numba.tiers.redis.topology import Node

_BY_CODE: dict[str, type[RedisError]] = {
    "ASK": AskError,
    "CLUSTERDOWN": ClusterDownError,
    "LOADING": BusyLoadingError,
    "MASTERDOWN": MasterDownError,
    "MOVED": MovedError,
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "TRYAGAIN": TryAgainError,
}
# The server answers, but is not the one to ask, or not now.
_OUTDATED = (ClusterDownError, MasterDownError, ReadOnlyError)
_DOWN = (BusyLoadingError, ConnectionError, TimeoutError, InvalidResponse, OSError)


class Fate(Enum):
    """What is to be done about keys that were not answered."""

    MOVED = "ask the server that has them now"
    MOVING = "ask for each key by itself, wherever it is"
    RECONNECT = "ask again over a new connection"
    OUTDATED = "tell the caller, and find out who has what"
    DOWN = "leave the server alone until it answers"
    REFUSED = "tell the caller"


def as_exception(text: str) -> RedisError:
    """Return an error reply as redis-py would raise it."""
    code, _, rest = text.partition(" ")
    kind = _BY_CODE.get(code)
    try:
        return ResponseError(text) if kind is None else kind(rest)
    except (ValueError, IndexError):  # MOVED, but to nowhere
        return ResponseError(text)


def fate_of(error: Exception) -> Fate:
    """Return what to do about the keys of a command that ended so."""
    if isinstance(error, TierError):
        return Fate.REFUSED
    if isinstance(error, MovedError):  # which is an AskError to redis-py
        return Fate.MOVED
    if isinstance(error, AskError | TryAgainError):
        return Fate.MOVING
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return Fate.RECONNECT
    if isinstance(error, AuthenticationError | NoPermissionError):
        return Fate.REFUSED  # some of these are ConnectionErrors to redis-py
    if isinstance(error, _OUTDATED):
        return Fate.OUTDATED
    if isinstance(error, _DOWN):
        return Fate.DOWN
    return Fate.REFUSED


def tier_error(error: Exception, node: Node, tag: str) -> TierError:
    """Return what a caller is told of an error of a server."""
    if isinstance(error, TierError):
        return error
    found = translate(error, tag=tag, node=node.name)
    if isinstance(found, TierError):
        return found
    # A configuration was right when the tier was opened.
    return TierUnavailableError(str(found), tier="redis", tag=tag)


def first_error(replies: list[object]) -> Exception | None:
    """Return the first error among replies, the cause before what it aborted."""
    found: Exception | None = None
    for reply in replies:
        if isinstance(reply, list):
            reply = first_error(reply)
        if isinstance(reply, Exception):
            if not isinstance(reply, ExecAbortError):
                return reply
            found = found or reply
    return found
