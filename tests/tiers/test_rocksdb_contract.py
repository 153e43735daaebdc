"""The RocksDB tier keeps every promise of a tier."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from hps_numba.tiers.base import Tier
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.tiers.testing import LastingTierContract
from hps_numba.types import Keys, Mask, Rows


class TestRocksDBTier(LastingTierContract):
    def make_tier(self, directory: Path) -> Tier:
        return RocksDBTier(str(directory), cache_bytes=8 << 20)

    def write_beneath(self, tier: Tier, tag: str, keys: Keys, rows: Rows) -> None:
        family = tier._store._db.get_column_family(tag)
        for key, row in zip(keys, rows, strict=True):
            family[stored_key(key)] = row.tobytes()

    def read_beneath(self, tier: Tier, tag: str, keys: Keys) -> tuple[Rows, Mask]:
        family = tier._store._db.get_column_family(tag)
        values = [family.get(stored_key(key)) for key in keys]
        width = max(len(value or b"") for value in values)
        rows = b"".join(value or bytes(width) for value in values)
        return (
            np.frombuffer(rows, np.float32).reshape(keys.size, -1),
            np.array([value is not None for value in values]),
        )


def stored_key(key: int) -> bytes:
    """Return a key's bytes: big-endian, the sign bit flipped."""
    return struct.pack(">Q", int(key) + (1 << 63))
