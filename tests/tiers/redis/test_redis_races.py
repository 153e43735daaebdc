"""Servers at full speed over one Redis: no row goes back once it is acknowledged.

``HPS_TEST_RACE_S`` sets how long each race lasts at least.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.racing_server import (
    N_KEYS,
    SPEC,
    create,
    mapped,
    open_tier,
)

RACE_S = float(os.environ.get("HPS_TEST_RACE_S", "1"))


@pytest.fixture
def race(tmp_path: Path) -> Callable[..., Counter[str]]:
    """Run one server that updates and one that looks up; return what both counted."""

    def run(address: str, layout: RedisLayout, fault: str = "") -> Counter[str]:
        path = tmp_path / "lower"
        create(path)
        extras = {"update": fault, "look up": "2"}
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.tiers.redis.racing_server"),
                    *(role, address, layout.value, str(path), str(RACE_S), extra),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for role, extra in extras.items()
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = [process.communicate(timeout=60.0) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        counts = Counter[str]()
        for out, _ in answers:
            counts.update(json.loads(out))
        return counts

    return run


def check_the_end(address: str, layout: RedisLayout, path: Path) -> None:
    """What Redis holds after the race is what the lower tier holds."""
    lower, acknowledged, _ = mapped(path)
    np.testing.assert_array_equal(lower, acknowledged)
    tier = open_tier(address, layout.value)
    rows = np.zeros((N_KEYS, SPEC.dim), np.float32)
    found = np.zeros(N_KEYS, np.bool_)
    tier.fetch(SPEC.tag, np.arange(N_KEYS, dtype=np.int64), rows, found)
    tier.close()
    assert found.any()
    np.testing.assert_array_equal(rows[found][:, 0], lower[found])


@pytest.mark.parametrize("layout", list(RedisLayout))
@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_no_row_goes_back(
    kind: str,
    layout: RedisLayout,
    race: Callable[..., Counter[str]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    servers: RedisServer | RedisCluster = request.getfixturevalue(kind)
    counts = race(servers.address, layout)
    sys.stderr.write(f"{kind} {layout.value}: {dict(counts)}\n")
    assert counts["violations"] == 0
    assert counts["torn"] == 0
    for what in ("updated", "deleted", "hits", "backfilled", "refused"):
        assert counts[what] > 0, what
    check_the_end(servers.address, layout, tmp_path / "lower")


def test_a_planted_fault_is_seen(
    server: RedisServer, race: Callable[..., Counter[str]]
) -> None:
    races = (race(server.address, RedisLayout.STRINGS, "no stamps") for _ in range(3))
    assert any(counts["violations"] for counts in races)
