"""The host memory tier keeps every promise of a tier."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hps_numba.kernels.host import table as kernel
from hps_numba.tiers.base import Epoch, Tier
from hps_numba.tiers.host import HostTier
from hps_numba.tiers.testing import TierContract
from hps_numba.types import Keys, Mask, OverflowPolicy, Rows


class TestHostTier(TierContract):
    def make_tier(self, directory: Path) -> Tier:
        return HostTier()

    def write_beneath(self, tier: Tier, tag: str, keys: Keys, rows: Rows) -> None:
        tier._tables[tag].upsert_locked(keys, rows)

    def read_beneath(self, tier: Tier, tag: str, keys: Keys) -> tuple[Rows, Mask]:
        table = tier._tables[tag]
        stored = dict(pair for p in table._partitions for pair in rows_in(p))
        blank = np.zeros(table.spec.row_bytes, np.uint8)
        rows = np.array([stored.get(key, blank) for key in keys.tolist()])
        return (
            rows.view(table.spec.numpy_dtype).reshape(keys.size, -1),
            np.isin(keys, np.array(list(stored), np.int64)),
        )


class TestHostTierThatKeepsScores(TestHostTier):
    def make_tier(self, directory: Path) -> Tier:
        return HostTier(
            num_partitions=3,
            overflow_policy=OverflowPolicy.EVICT_LEAST_USED,
            num_threads=2,
        )


class TestHostTierOfOnePartition(TestHostTier):
    def make_tier(self, directory: Path) -> Tier:
        return HostTier(num_partitions=1, overflow_policy=OverflowPolicy.EVICT_OLDEST)


class TupleTier(HostTier):
    """Its epochs have a second part, of which the first one says nothing."""

    def epoch(self, tag: str) -> Epoch:
        local = super().epoch(tag)
        assert isinstance(local, int)
        return (local, -local, 7)

    def backfill(self, tag: str, keys: Keys, rows: Rows, epoch: Epoch) -> int:
        assert isinstance(epoch, tuple)
        local, other, seven = epoch
        assert (other, seven) == (-local, 7)
        return super().backfill(tag, keys, rows, local)

    def arrange(self, tag: str, keys: Keys) -> np.ndarray:
        return np.argsort(keys % 5, kind="stable")


class TestTierWithEpochsOfSeveralParts(TestHostTier):
    def make_tier(self, directory: Path) -> Tier:
        return TupleTier()


def rows_in(partition) -> list[tuple[int, np.ndarray]]:
    """Return keys and row bytes as they lie in memory, without probing for them."""
    slots = partition.index.view(np.int64)[kernel.HEADER_BYTES // 8 :].reshape(-1, 2)
    segments = [s.reshape(-1, partition._row_bytes) for s in partition._segments]
    if not segments:
        return []
    rows = np.concatenate(segments)
    numbers = slots[:, 1] & kernel.LOW
    live = numbers < kernel.TOMBSTONE
    return list(zip(slots[live, 0].tolist(), rows[numbers[live]], strict=True))
