"""The tables that are stored in Redis, and the locks among servers that load them.

One hash, ``hps_et.tables``, has an entry in JSON for each tag.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

import redis
from redis.exceptions import LockError, RedisError
from redis.lock import Lock

from hps_numba.errors import (
    ConfigError,
    TierCorruptionError,
    TierUnavailableError,
    UnknownTableError,
)
from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.layout import Layout
from hps_numba.tiers.redis.scripts import SWAP
from hps_numba.types import TAG_PREFIX, TableSpec

logger = logging.getLogger(__name__)

TABLES_KEY = f"{TAG_PREFIX}.tables"
_RENEWALS = 5  # before a lock would end
_POLL_S = 0.2


@dataclass(frozen=True)
class Entry:
    """What is stored about a table."""

    model: str
    name: str
    dim: int
    dtype: str
    layout: str
    num_partitions: int
    fingerprint: dict[str, Any] | None = None
    load: str | None = None  # the load that began last

    def __str__(self) -> str:
        """Return the shape, as messages give it."""
        return (
            f"dim {self.dim}, {self.dtype}, {self.num_partitions} partitions, layout "
            f"{self.layout}"
        )


class Registry:
    """The entries of all tables. Thread-safe.

    Parameters
    ----------
    client
        Of the cluster or the server.
    lock_s
        After which a server that died is not waited for.
    """

    def __init__(
        self, client: redis.Redis | redis.RedisCluster, *, lock_s: float = 15.0
    ) -> None:
        self._client = client
        self._lock_s = lock_s

    def add(self, layout: Layout) -> None:
        """Enter a table, or check that it is entered with the same shape.

        Raises
        ------
        ConfigError
            If it is stored with another shape.
        """
        spec = layout.spec
        if set("{}") & set(spec.tag):
            raise ConfigError(
                f"table {spec.tag}: in Redis a name has no braces; they mark what "
                f"decides about the slot of a key"
            )
        ours = Entry(
            spec.model,
            spec.name,
            spec.dim,
            spec.dtype.value,
            layout.kind.value,
            layout.n_partitions,
        )
        with map_exceptions(spec.tag):
            self._client.hsetnx(TABLES_KEY, spec.tag, _to_json(ours))
        stored = self.entry(spec.tag)
        if stored is not None and (stored.model, stored.name) != (
            spec.model,
            spec.name,
        ):
            raise ConfigError(
                f"the tag {spec.tag} is that of table {stored.name!r} of model "
                f"{stored.model!r} in Redis, so table {spec.name!r} of model "
                f"{spec.model!r} needs another name"
            )
        if stored is not None and replace(stored, fingerprint=None, load=None) != ours:
            raise ConfigError(
                f"table {spec.tag} is stored in Redis with {stored}; it cannot be "
                f"opened with {ours}. Drop the table first, or configure it as it is"
            )

    def entry(self, tag: str) -> Entry | None:
        """Return what is stored about a table."""
        with map_exceptions(tag):
            stored = self._client.hget(TABLES_KEY, tag)
        return None if stored is None else _from_json(stored)

    def begin_load(self, tag: str) -> str:
        """Forget where a table's rows come from; return what ``end_load`` asks for.

        Raises
        ------
        UnknownTableError
            If another server dropped the table.
        """
        entry = self.entry(tag)
        if entry is None:
            raise UnknownTableError(f"table {tag} was dropped in Redis; open it again")
        begun = _to_json(replace(entry, fingerprint=None, load=uuid4().hex))
        with map_exceptions(tag):
            self._client.hset(TABLES_KEY, tag, begun)
        return begun

    def end_load(
        self, tag: str, begun: str, fingerprint: Mapping[str, Any] | None
    ) -> None:
        """Store where a table's rows come from, unless another load began meanwhile.

        Raises
        ------
        TierUnavailableError
            If one did: the rows may be some of this one, some of that.
        """
        given = None if fingerprint is None else dict(fingerprint)
        entry = replace(_from_json(begun), fingerprint=given)
        with map_exceptions(tag):
            swapped = self._client.eval(
                SWAP, 1, TABLES_KEY, tag, begun, _to_json(entry)
            )
        if not swapped:
            raise TierUnavailableError(
                "another server loaded or dropped the table meanwhile; load it again",
                tier="redis",
                tag=tag,
            )

    def names(self, model: str) -> list[str]:
        """Return the sorted names of a model's tables."""
        with map_exceptions(""):
            stored = self._client.hvals(TABLES_KEY)
        entries = [_from_json(each) for each in stored]
        return sorted(entry.name for entry in entries if entry.model == model)

    def remove(self, tag: str) -> None:
        """Forget a table."""
        with map_exceptions(tag):
            self._client.hdel(TABLES_KEY, tag)

    @contextmanager
    def loading(self, spec: TableSpec) -> Iterator[None]:
        """Let no other server load a table meanwhile; waits for one that does."""
        lock = Lock(
            self._client,
            f"{TAG_PREFIX}{{{spec.tag}}}loading",
            timeout=self._lock_s,
            sleep=_POLL_S,
            thread_local=False,
        )
        with map_exceptions(spec.tag):
            if not lock.acquire(blocking=False):
                logger.info("table=%s is loaded by another server; waiting", spec.tag)
                lock.acquire()
        done = threading.Event()
        renewing = threading.Thread(
            target=_renew,
            args=(lock, done, self._lock_s, spec.tag),
            name="hps-redis-lock",
            daemon=True,
        )
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            try:
                lock.release()
            except (LockError, RedisError, OSError) as exc:
                logger.warning("table=%s lock not released: %s", spec.tag, exc)


def _renew(lock: Lock, done: threading.Event, lock_s: float, tag: str) -> None:
    while not done.wait(lock_s / _RENEWALS):
        _renew_once(lock, lock_s, tag)


def _renew_once(lock: Lock, lock_s: float, tag: str) -> None:
    try:
        lock.extend(lock_s, replace_ttl=True)
    except (LockError, RedisError, OSError) as exc:
        logger.warning("table=%s lock not renewed: %s", tag, exc)


def _from_json(stored: bytes | str) -> Entry:
    try:
        return Entry(**json.loads(stored))
    except (ValueError, TypeError) as exc:
        raise TierCorruptionError(
            f"an entry of {TABLES_KEY} is not understood: {exc}; it was written by "
            f"another program or a later version",
            tier="redis",
        ) from exc


def _to_json(entry: Entry) -> str:
    return json.dumps(asdict(entry), separators=(",", ":"))
