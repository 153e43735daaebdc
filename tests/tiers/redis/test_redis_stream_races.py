"""Two servers race through one stream: no row goes back, and the end is the replay.

``HPS_TEST_RACE_S`` sets how long each race lasts at least, and adds more of them.
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
from hps_numba.types import Position
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.racing_follower import (
    N_KEYS,
    SPEC,
    STREAM,
    create,
    mapped,
    open_tier,
    replay,
)

pytestmark = pytest.mark.service

RACE_S = float(os.environ.get("HPS_TEST_RACE_S", "2"))
STRINGS, HASHES = RedisLayout.STRINGS, RedisLayout.HASHES
RACES = [("server", HASHES), ("cluster", STRINGS)]
if "HPS_TEST_RACE_S" in os.environ:
    RACES += [("server", STRINGS), ("cluster", HASHES)]

Race = Callable[..., Counter[str]]


@pytest.fixture
def race(tmp_path: Path) -> Race:
    """Run both servers; return what they counted."""

    def run(address: str, layout: RedisLayout, fault: str = "") -> Counter[str]:
        path = tmp_path / "seen"
        create(path)
        given = address, layout.value, str(path), str(RACE_S), fault
        module = "tests.tiers.redis.racing_follower"
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, me, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for me in "01"
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
    """What Redis holds after the race is what a replay of the stream gives."""
    end = int(mapped(path)[1][1])
    tier = open_tier(address, layout.value)
    assert tier.positions(SPEC.tag) == {STREAM: Position(end)}
    rows = np.zeros((N_KEYS, SPEC.dim), np.float32)
    found = np.zeros(N_KEYS, np.bool_)
    tier.fetch(SPEC.tag, np.arange(N_KEYS, dtype=np.int64), rows, found)
    tier.close()
    stored = {int(key): int(rows[key, 0]) for key in np.flatnonzero(found)}
    assert stored
    assert stored.items() <= replay(end).items()


@pytest.mark.parametrize(("kind", "layout"), RACES)
def test_no_row_goes_back(
    kind: str,
    layout: RedisLayout,
    race: Race,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    servers: RedisServer | RedisCluster = request.getfixturevalue(kind)
    counts = race(servers.address, layout)
    sys.stderr.write(f"{kind} {layout.value}: {dict(counts)}\n")
    assert counts["violations"] == 0
    assert counts["torn"] == 0
    for what in ("written", "known", "deleted", "hits", "backfilled", "refused"):
        assert counts[what] > 0, what
    check_the_end(servers.address, layout, tmp_path / "seen")


def test_a_planted_fault_is_seen(server: RedisServer, race: Race) -> None:
    fault = "every number is a token"
    races = (race(server.address, HASHES, fault) for _ in range(3))
    assert any(counts["violations"] for counts in races)
