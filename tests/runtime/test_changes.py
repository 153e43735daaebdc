"""What tiers and caches are given of a stream that some of them are ahead of."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import (
    FailureMode,
    Keys,
    Position,
    Rows,
    StreamSpan,
    TableSpec,
)

SPEC = TableSpec("model", "table", 4)
KEY = np.array([7])


def row(version: int) -> Rows:
    return np.full((1, SPEC.dim), version, np.float32)


def span(since: int, until: int) -> StreamSpan:
    return StreamSpan(0, Position(since), Position(until))


@dataclass
class Cache:
    """A cache that holds the key, and tells what became of it."""

    version: float | None = 1.0
    told: list[str] = field(default_factory=list)

    def update(self, keys: Keys, rows: Rows) -> int:
        self.told.append("update")
        self.version = float(rows[0, 0])
        return keys.size

    def evict(self, keys: Keys) -> None:
        self.told.append("evict")
        self.version = None


@pytest.mark.parametrize(
    ("ahead", "told", "cached", "above"),
    [
        pytest.param((), ["update"], 2.0, 2.0, id="nobody is ahead"),
        pytest.param(("lower",), ["evict"], None, None, id="the lower one is ahead"),
        pytest.param(("upper",), ["evict"], None, 3.0, id="the upper one is ahead"),
        pytest.param(("lower", "upper"), ["evict"], None, 3.0, id="both are"),
    ],
)
def test_a_cache_gets_no_row_that_a_tier_has_a_newer_one_of(
    ahead: tuple[str, ...],
    told: list[str],
    cached: float | None,
    above: float | None,
    tmp_path: Path,
) -> None:
    with (
        closing(RocksDBTier(str(tmp_path / "upper"))) as upper,
        closing(RocksDBTier(str(tmp_path / "lower"))) as lower,
    ):
        tiers = {"upper": upper, "lower": lower}
        for name, tier in tiers.items():
            tier.open_table(SPEC)
            tier.apply(SPEC.tag, KEY, row(1), span(0, 1))
            if name in ahead:
                tier.apply(SPEC.tag, KEY, row(3), span(1, 3))
        table = Hierarchy(
            SPEC,
            list(tiers.values()),
            backfills=None,
            on_failure=FailureMode.RAISE,
            write_rows=8,
        )
        cache = Cache()
        table.caches = (cache,)  # type: ignore[assignment]

        table.apply(KEY, row(2), span(1, 2), list(tiers.values()))

        out, found = np.zeros((1, SPEC.dim), np.float32), np.zeros(1, np.bool_)
        upper.fetch(SPEC.tag, KEY, out, found)
        assert (out[0, 0] if found[0] else None) == above
        assert (cache.told, cache.version) == (told, cached)
        rows, _ = table.fetch(KEY)
        assert rows[0, 0] == (3.0 if ahead else 2.0)
