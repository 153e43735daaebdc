"""A process that is killed at any instant leaves whole spans and whole loads."""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rocksdict import Options, Rdict

from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.tiers.testing.suite import fetch
from hps_numba.types import Position
from tests.support import kill_writer as writer

pytestmark = pytest.mark.fault

KILLS = 16


def run_and_kill(mode: str, path: str, delay_s: float) -> int | None:
    """Run the writer, kill it after a delay, return the last call that it reported."""
    with subprocess.Popen(
        [sys.executable, writer.__file__, mode, path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        # Not a wait for something to happen: the instant of the kill is the input.
        select.select([], [], [], delay_s)
        process.send_signal(signal.SIGKILL)
        reports = process.stdout.read().split(b"\n")[:-1]
    assert process.returncode == -signal.SIGKILL
    return int(reports[-1]) if reports else None


def check_updates(tier: RocksDBTier, acknowledged: int) -> Position:
    """Check that every row is what the stored position says; return that."""
    position = writer.position(tier)
    assert acknowledged < position.offset <= acknowledged + 2
    for group in range(writer.GROUPS):
        rows, found = fetch(tier, writer.SPEC, writer.group_keys(group))
        np.testing.assert_array_equal(rows, rows[:, :1].repeat(rows.shape[1], axis=1))
        before = writer.group_value(group, position.offset - 1)
        expected = np.full(len(rows), before, np.float32)
        expected[: position.record] = writer.group_value(group, position.offset)
        np.testing.assert_array_equal(np.where(found, rows[:, 0], 0), expected)
    return position


def check_load(tier: RocksDBTier, acknowledged: int) -> int:
    """Check that the table holds one load; return its call."""
    fingerprint = tier.fingerprint(writer.SPEC.tag) or {"call": 0}
    stored: int = fingerprint["call"]
    assert acknowledged <= stored <= acknowledged + 1
    n_rows = writer.LOAD_ROWS if stored else 0
    assert tier.size(writer.SPEC.tag) == n_rows
    assert tier.untouched(writer.SPEC.tag) is (stored > 0)
    keys = writer.load_keys(stored)
    rows, found = fetch(tier, writer.SPEC, keys)
    np.testing.assert_array_equal(found, stored > 0)
    np.testing.assert_array_equal(rows, writer.rows_of(stored, keys.size))
    return stored


def test_killed_updates_leave_rows_and_position_together(tmp_path: Path) -> None:
    path, instants = str(tmp_path / "db"), random.Random(1)
    stored, seen = 0, set()
    for _ in range(KILLS):
        reported = run_and_kill("update", path, instants.uniform(0, 0.1))
        tier = writer.open_tier(path)
        position = check_updates(tier, reported or stored)
        tier.close()
        stored = position.offset - 1
        seen.add(position.record)
    assert stored > KILLS
    assert len(seen) > 1  # it was killed within a message, too


def test_a_killed_load_leaves_the_old_or_the_new_table(tmp_path: Path) -> None:
    path, instants = str(tmp_path / "db"), random.Random(2)
    stored = 0
    for _ in range(KILLS):
        reported = run_and_kill("load", path, instants.uniform(0, 0.15))
        tier = writer.open_tier(path)
        stored = check_load(tier, reported or stored)
        tier.close()
        families = set(Rdict.list_cf(path, Options(raw_mode=True)))
        assert len(families - {"default", "hps_meta"}) == (stored > 0)
        assert not (Path(path) / "hps_load").exists()
    assert stored > 2
