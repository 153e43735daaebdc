"""The GPU cache of a whole server hits as exact LRU does, or 3 points less at most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.records import origin
from bench.trace_cache import rates, replay
from bench.workloads import zipf

pytestmark = pytest.mark.device

N_ROWS = 3000


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_hit_rates_are_at_most_3_points_below_exact_lru(
    tmp_path: Path, share: float
) -> None:
    keys = zipf(N_ROWS, seed=1)(20_000)
    found = replay(keys, share, 500, tmp_path / "keys")
    for of in ("per occurrence", "per unique key"):
        assert found[of] > 0.1
        # Where a batch has more keys than the cache rows, exact LRU falls far behind.
        assert found[of] >= found[f"{of}, exact LRU"] - 0.03


def test_a_cache_as_large_as_the_distinct_keys_hits_all_but_the_first(
    tmp_path: Path,
) -> None:
    keys = np.tile(np.arange(400), 5)
    found = replay(keys, 1.0, 400, tmp_path / "keys")
    assert found["per occurrence"] == pytest.approx(0.8)
    assert found["per unique key"] == pytest.approx(0.8)


def test_rates_name_the_trace_and_what_they_count(tmp_path: Path) -> None:
    keys = np.arange(200) % 50
    results = list(rates("round", keys, 0.5, 100, origin("smoke")))
    assert [result.variant for result in results] == [
        "per occurrence",
        "per unique key",
        "per occurrence, exact LRU",
        "per unique key, exact LRU",
    ]
    assert {result.params["trace"] for result in results} == {"round"}
    assert all(0 <= result.median <= 1 for result in results)
