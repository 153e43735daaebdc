"""Contract: what threads see of each other's writes.

Every row that these tests write holds one number in all its values, so a row that mixes
two writes shows. Each test ends after a fixed number of writes, not after a time.
"""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hps_numba.errors import ClosedError
from hps_numba.tiers.base import Tier
from hps_numba.tiers.testing.suite import (
    TierSuite,
    assert_rows,
    fetch,
    filled_rows,
    keys_of,
)
from hps_numba.types import Keys, RowBlock, Rows, TableSpec

WIDE = TableSpec("model", "wide", 64)
KEYS = np.arange(2000, dtype=np.int64)
VERSIONS = 60


class RaceContract(TierSuite):
    """Rows are whole, and what was acknowledged is seen."""

    def test_readers_see_whole_rows_and_what_was_acknowledged(self, tier: Tier) -> None:
        tier.open_table(WIDE)
        tier.insert(WIDE.tag, KEYS, filled_rows(WIDE, KEYS.size, 0))
        acknowledged = [0]

        def write() -> None:
            for version in range(1, VERSIONS):
                tier.insert(WIDE.tag, KEYS, filled_rows(WIDE, KEYS.size, version))
                acknowledged[0] = version

        def read(reader: int) -> None:
            keys = _some_keys(reader)
            floor = acknowledged[0]
            rows, found = fetch(tier, WIDE, keys)
            assert found.all()
            assert _versions(rows).min() >= floor

        run_while(write, read)
        assert_rows(tier, WIDE, KEYS, filled_rows(WIDE, KEYS.size, VERSIONS - 1))

    def test_readers_see_the_old_or_the_new_rows_of_a_load(self, tier: Tier) -> None:
        tier.open_table(WIDE)
        tier.load(WIDE.tag, [_generation(0)])
        acknowledged = [0]

        def write() -> None:
            for version in range(1, VERSIONS // 4):
                tier.load(WIDE.tag, [_generation(version)])
                acknowledged[0] = version

        def read(reader: int) -> None:
            keys = _some_keys(reader)
            floor = acknowledged[0]
            rows, found = fetch(tier, WIDE, keys)
            assert found[keys % 2 == 0].all()
            assert _versions(rows[found]).min() >= floor

        run_while(write, read)

    def test_deleted_keys_are_gone_when_delete_returns(self, tier: Tier) -> None:
        tier.open_table(WIDE)
        deleted = [0]

        def write() -> None:
            for version in range(1, VERSIONS):
                keys = KEYS[:500] + version * 500
                tier.insert(WIDE.tag, keys, filled_rows(WIDE, 500, version))
                assert tier.delete(WIDE.tag, keys) == 500
                deleted[0] = version

        def read(_: int) -> None:
            gone = deleted[0]
            rows, found = fetch(tier, WIDE, KEYS[:1000] + gone * 500)
            assert not found[:500].any()
            np.testing.assert_array_equal(_versions(rows[found]), gone + 1)

        run_while(write, read)
        assert tier.size(WIDE.tag) == 0

    def test_writers_take_turns(self, tier: Tier) -> None:
        tier.open_table(WIDE)

        def write(writer: int) -> None:
            own = KEYS[:500] + writer * 10_000
            both = np.concatenate([own, KEYS[:500] - 10_000])
            for version in range(VERSIONS):
                rows = filled_rows(WIDE, 1000, writer * VERSIONS + version)
                tier.insert(WIDE.tag, both, rows)

        run_all(write, range(3))
        for writer in range(3):
            last = filled_rows(WIDE, 500, writer * VERSIONS + VERSIONS - 1)
            assert_rows(tier, WIDE, KEYS[:500] + writer * 10_000, last)
        rows, found = fetch(tier, WIDE, KEYS[:500] - 10_000)
        assert found.all()
        assert set(_versions(rows)) <= {VERSIONS * n - 1.0 for n in (1, 2, 3)}

    def test_iterate_yields_what_is_not_written_meanwhile(self, tier: Tier) -> None:
        tier.open_table(WIDE)
        tier.insert(WIDE.tag, KEYS, filled_rows(WIDE, KEYS.size, 1))

        def write() -> None:
            for version in range(2, VERSIONS):
                keys = 10_000 * version + KEYS[:300]
                tier.insert(WIDE.tag, keys, filled_rows(WIDE, 300, version))
                tier.delete(WIDE.tag, keys[:150])

        def read(_: int) -> None:
            blocks = list(tier.iterate(WIDE.tag, block_rows=333))
            keys = np.concatenate([block.keys for block in blocks])
            versions = np.concatenate([_versions(block.rows) for block in blocks])
            assert np.unique(keys).size == keys.size
            assert np.isin(KEYS, keys).all()
            np.testing.assert_array_equal(
                versions, np.where(keys < 10_000, 1, keys // 10_000)
            )

        run_while(write, read, readers=1)

    def test_a_backfill_never_undoes_an_update(self, tier: Tier) -> None:
        """The lower tier is a number here: it is read before and after its write."""
        tier.open_table(WIDE)
        key = keys_of(1)
        start = threading.Barrier(2, timeout=60)
        lower = [0.0]

        def update() -> None:
            for version in range(1, 4 * VERSIONS):
                start.wait()
                with tier.hold(WIDE.tag, key):
                    lower[0] = version
                    tier.insert(WIDE.tag, key, filled_rows(WIDE, 1, version))
                start.wait()
                assert_rows(tier, WIDE, key, filled_rows(WIDE, 1, version))

        def backfill() -> None:
            for _ in range(1, 4 * VERSIONS):
                start.wait()
                epoch = tier.epoch(WIDE.tag)
                row = filled_rows(WIDE, 1, lower[0])
                tier.backfill(WIDE.tag, key, row, epoch)
                start.wait()

        run_all(lambda job: job(), [update, backfill])

    def test_close_may_interrupt_readers_and_writers(self, tier: Tier) -> None:
        tier.open_table(WIDE)
        tier.insert(WIDE.tag, KEYS, filled_rows(WIDE, KEYS.size, 1))
        busy = threading.Barrier(4, timeout=60)

        def use(worker: int) -> None:
            busy.wait()
            for _ in range(1_000_000):
                try:
                    if worker == 0:
                        tier.insert(WIDE.tag, KEYS, filled_rows(WIDE, KEYS.size, 1))
                    rows, found = fetch(tier, WIDE, KEYS)
                except ClosedError:
                    return
                assert found.all()
                np.testing.assert_array_equal(_versions(rows), 1)
            raise AssertionError("close was not noticed")

        def close(_: int) -> None:
            busy.wait()
            tier.close()

        run_all(lambda worker: close(3) if worker == 3 else use(worker), range(4))


def run_while(
    write: Callable[[], None], read: Callable[[int], None], *, readers: int = 2
) -> None:
    """Run ``write`` once and ``read`` again and again, until the writer is done."""
    done = threading.Event()

    def write_once() -> None:
        try:
            write()
        finally:
            done.set()

    def read_on(reader: int) -> None:
        while True:
            last = done.is_set()
            read(reader)
            if last:
                return

    def work(worker: int) -> None:
        write_once() if worker == readers else read_on(worker)

    run_all(work, range(readers + 1))


def run_all(work: Callable[..., None], arguments: Iterable[object]) -> None:
    """Call ``work`` with each argument, at once, and raise what it raised."""
    jobs = list(arguments)
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
    for future in futures:
        future.result()


def _some_keys(reader: int) -> Keys:
    """Return keys of one reader: all of them, or some in another order."""
    return KEYS if reader == 0 else np.random.default_rng(reader).choice(KEYS, 500)


def _generation(version: int) -> RowBlock:
    """Return even keys, and odd keys that only this generation has."""
    keys = np.concatenate([KEYS[::2], KEYS[1::2][version::10]])
    return RowBlock(keys, filled_rows(WIDE, keys.size, version))


def _versions(rows: Rows) -> Rows:
    """Return the number in each row; it must be the same in all values."""
    np.testing.assert_array_equal(rows, rows[:, :1].repeat(rows.shape[1], axis=1))
    versions: Rows = rows[:, 0]
    return versions
