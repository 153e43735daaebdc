"""Where a table lies in Redis: the names of its keys, and the commands that read it.

Partition p of the table with tag T has all its keys in one slot, by the hash tag
``{T/p<p>}``:

========= ====================================== =======================================
          strings                                hashes (HugeCTR's own)
========= ====================================== =======================================
rows      ``hps_et{T/p<p>}`` + key, each a       ``hps_et{T/p<p>}v``: a hash from key to
          string                                 row
use       ``hps_et{T/p<p>}t``: a hash from key to time or number of uses; kept only
          where overflow handling needs it
stamps    ``hps_et{T/p<p>}s``: a hash, see ``scripts``
========= ====================================== =======================================

A key is 8 raw bytes, little-endian; a row is its raw values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hps_numba.config.enums import RedisLayout
from hps_numba.types import TAG_PREFIX, TableSpec

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

KEY_BYTES = 8


@dataclass(frozen=True)
class CommandText:
    """A command for many keys of a partition, as text around them.

    Each partition has a head, which follows the number of arguments, and a lead, which
    precedes each key. Both lie one after another in one array.
    """

    heads: Bytes
    head_at: Numbers  # (n_partitions + 1,)
    leads: Bytes
    lead_at: Numbers
    n_fixed: int  # arguments in the head
    max_head: int
    max_lead: int

    def head(self, partition: int) -> Bytes:
        """Return the head of one partition."""
        return self.heads[self.head_at[partition] : self.head_at[partition + 1]]

    def lead(self, partition: int) -> Bytes:
        """Return the lead of one partition."""
        return self.leads[self.lead_at[partition] : self.lead_at[partition + 1]]


class Layout:
    """Names and commands of one table.

    Parameters
    ----------
    spec
        The table.
    kind
        Strings or hashes.
    n_partitions
        Partitions of the table.
    """

    def __init__(self, spec: TableSpec, kind: RedisLayout, n_partitions: int) -> None:
        self.spec = spec
        self.kind = kind
        self.n_partitions = n_partitions
        self.prefixes = [
            f"{TAG_PREFIX}{{{spec.tag}/p{p}}}".encode() for p in range(n_partitions)
        ]
        self.known_prefixes = frozenset(self.prefixes)

    @property
    def has_hashes(self) -> bool:
        """Whether a partition's rows are fields of one hash."""
        return self.kind is RedisLayout.HASHES

    def rows_key(self, partition: int) -> bytes:
        """Return the key of a partition's hash of rows."""
        return self.prefixes[partition] + b"v"

    def uses_key(self, partition: int) -> bytes:
        """Return the key of a partition's hash of times or numbers of uses."""
        return self.prefixes[partition] + b"t"

    def stamps_key(self, partition: int) -> bytes:
        """Return the key of a partition's update stamps."""
        return self.prefixes[partition] + b"s"

    def row_key(self, partition: int, key: bytes) -> bytes:
        """Return the name of one row in the layout ``strings``."""
        return self.prefixes[partition] + key

    @cached_property
    def reading(self) -> CommandText:
        """``MGET`` or ``HMGET``."""
        return self._command(b"HMGET" if self.has_hashes else b"MGET")

    @cached_property
    def writing(self) -> CommandText:
        """``MSET`` or ``HSET``."""
        return self._command(b"HSET" if self.has_hashes else b"MSET")

    @cached_property
    def deleting(self) -> CommandText:
        """``DEL`` or ``HDEL``."""
        return self._command(b"HDEL" if self.has_hashes else b"DEL")

    @cached_property
    def noting(self) -> CommandText:
        """``HSET`` of times or numbers of uses."""
        keys = [self.uses_key(p) for p in range(self.n_partitions)]
        return _text(b"HSET", keys, [b""] * self.n_partitions)

    @cached_property
    def forgetting(self) -> CommandText:
        """``HDEL`` of times or numbers of uses."""
        keys = [self.uses_key(p) for p in range(self.n_partitions)]
        return _text(b"HDEL", keys, [b""] * self.n_partitions)

    @cached_property
    def row_header(self) -> Bytes:
        """What precedes a row, in replies and in commands."""
        return _array(b"$%d\r\n" % self.spec.row_bytes)

    def _command(self, name: bytes) -> CommandText:
        if not self.has_hashes:
            return _text(name, [None] * self.n_partitions, self.prefixes)
        hashes = [self.rows_key(p) for p in range(self.n_partitions)]
        return _text(name, hashes, [b""] * self.n_partitions)


def _text(
    name: bytes, keys: list[bytes] | list[None], leads: list[bytes]
) -> CommandText:
    """Return a command, which may have one key of each partition for an argument."""
    heads = [_argument(name) + (b"" if k is None else _argument(k)) for k in keys]
    texts = [b"$%d\r\n%s" % (len(lead) + KEY_BYTES, lead) for lead in leads]
    return CommandText(
        heads=_array(b"".join(heads)),
        head_at=_starts(heads),
        leads=_array(b"".join(texts)),
        lead_at=_starts(texts),
        n_fixed=1 if keys[0] is None else 2,
        max_head=max(map(len, heads)),
        max_lead=max(map(len, texts)),
    )


def _argument(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def pack(*arguments: bytes | str | int) -> bytes:
    """Return a command as bytes."""
    return b"*%d\r\n" % len(arguments) + pack_arguments(*arguments)


def pack_arguments(*arguments: bytes | str | int) -> bytes:
    """Return arguments as bytes, without how many they are."""
    given = (a if isinstance(a, bytes) else str(a).encode() for a in arguments)
    return b"".join(map(_argument, given))


def _array(text: bytes) -> Bytes:
    return np.frombuffer(text, np.uint8).copy()


def _starts(texts: list[bytes]) -> Numbers:
    return np.cumsum([0, *map(len, texts)], dtype=np.int64)
