"""How much memory of Redis a row takes."""

from __future__ import annotations

from hps_numba.config.enums import RedisLayout
from hps_numba.types import TAG_PREFIX, TableSpec

# Measured with Redis 7.0: an entry of a hash table with its share of the buckets, and
# around a value that is a key of its own an object and its place in a cluster's list of
# the keys of a slot (16 bytes, which a single server does without).
_ENTRY_BYTES = {RedisLayout.STRINGS: 75, RedisLayout.HASHES: 43}
_USE_BYTES = 75  # what overflow handling notes of a row
_KEY_BYTES = 8
_STRING_BYTES = 2, 5  # of a name and of a value, beside its text


def row_bytes(spec: TableSpec, layout: RedisLayout, *, notes_uses: bool = False) -> int:
    """Return about how many bytes a row takes, its key and its index included.

    Redis' allocator rounds up: a row of 512 bytes takes 640.
    """
    name_bytes = _KEY_BYTES
    if layout is RedisLayout.STRINGS:
        name_bytes += len(f"{TAG_PREFIX}{{{spec.tag}/p0}}")
    of_name, of_value = _STRING_BYTES
    return (
        _ENTRY_BYTES[layout]
        + _allocated(name_bytes + of_name)
        + _allocated(spec.row_bytes + of_value)
        + (_USE_BYTES if notes_uses else 0)
    )


def _allocated(n_bytes: int) -> int:
    """Return what jemalloc takes: four sizes between two powers of two."""
    step = max(16, 1 << max((n_bytes - 1).bit_length() - 3, 0))
    return -(-n_bytes // step) * step
