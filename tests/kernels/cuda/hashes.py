"""What a cache derives from the hash of a key, on Python's integers."""

from __future__ import annotations

from functools import lru_cache

_WORD = 2**64 - 1


def _turned_right(x: int, n: int) -> int:
    return (x >> n | x << (64 - n)) & _WORD


@lru_cache(maxsize=1 << 16)
def hash_of(key: int) -> int:
    """Return the 64-bit hash of a key: rrxmrrxmsx_0."""
    x = key & _WORD
    x ^= _turned_right(x, 25) ^ _turned_right(x, 50)
    x = x * 0xA24BAED4963EE407 & _WORD
    x ^= _turned_right(x, 24) ^ _turned_right(x, 49)
    x = x * 0x9FB21C651E98DF25 & _WORD
    return x ^ x >> 28


def set_of(key: int, n_sets: int) -> int:
    """Return the key's set: the hash as a fraction of one, times the sets."""
    return hash_of(key) * n_sets // 2**64


def second_set_of(key: int, n_sets: int) -> int:
    """Return the other set of a static table's key, by the hash's lowest 40 bits.

    All sets but the home set are as likely; of one set it is that one.
    """
    step = (hash_of(key) % 2**40) * (n_sets - 1) // 2**40
    return (set_of(key, n_sets) + 1 + step) % n_sets


def _one_to_255(bits: int) -> int:
    return 1 + bits % 256 * 255 // 256


def digest_of(key: int) -> int:
    """Return 1 to 255, from the hash's lowest 8 bits."""
    return _one_to_255(hash_of(key))


def stamp_of(key: int, n_stamps: int) -> int:
    """Return which update stamp a key has: by the hash from bit 8 on."""
    return (hash_of(key) >> 8) % n_stamps


def door_of(key: int, n_door: int) -> int:
    """Return the doorkeeper's entry of a key: by the hash from bit 10 on."""
    return (hash_of(key) >> 10) % n_door


def door_mark_of(key: int) -> int:
    """Return what the doorkeeper notes of a key, from bits 36 to 43."""
    return _one_to_255(hash_of(key) >> 36)


def claim_of(key: int, table: int, n_claims: int) -> int:
    """Return where a launch begins to look for a key's other occurrences."""
    return ((hash_of(key) >> 20) + table * 0x9E3779B1) % n_claims
