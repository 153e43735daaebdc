"""Contract: every record of an update stream reaches a lasting tier exactly once."""

# ruff: noqa: D102  # a test's name is its documentation

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import StreamGapError, UnknownTableError
from hps_numba.tiers.base import LastingTier
from hps_numba.tiers.testing.suite import (
    EXTREME_KEYS,
    SPEC,
    TierSuite,
    assert_absent,
    assert_rows,
    fetch,
    filled_rows,
    keys_of,
    random_rows,
)
from hps_numba.types import Keys, Position, RowBlock, StreamSpan, TableSpec

KEY = keys_of(5)
KEYS = np.arange(300, dtype=np.int64)
WIDE = TableSpec("model", "wide", 256)
FAR = (1 << 63) - 1

# What happens to rows, and to no position.
UPHEAVALS: dict[str, Callable[[LastingTier], object]] = {
    "load": lambda tier: tier.load(SPEC.tag, [RowBlock(KEYS, random_rows(SPEC, 300))]),
    "load of nothing": lambda tier: tier.load(SPEC.tag, []),
    "evict": lambda tier: tier.evict(SPEC.tag, KEYS),
    "evict all": lambda tier: tier.evict(SPEC.tag),
    "insert": lambda tier: tier.insert(SPEC.tag, KEYS, random_rows(SPEC, 300)),
    "delete": lambda tier: tier.delete(SPEC.tag, KEYS),
}


def span(since: int, until: int, *, partition: int = 0) -> StreamSpan:
    """Return the span of the messages from ``since`` up to ``until``."""
    return StreamSpan(partition, Position(since), Position(until))


def put(tier: LastingTier, keys: Keys, value: float, over: StreamSpan) -> int:
    """Apply a span that brings rows of one value."""
    return tier.apply(SPEC.tag, keys, filled_rows(SPEC, keys.size, value), over)


def assert_values(tier: LastingTier, keys: Keys, value: float) -> None:
    """Check that all rows have one value."""
    assert_rows(tier, SPEC, keys, filled_rows(SPEC, keys.size, value))


class StreamContract(TierSuite):
    """``apply``, ``positions`` and ``seek``."""

    @pytest.fixture
    def stream_tier(self, tmp_path: Path) -> Iterator[LastingTier]:
        """Yield a tier with the empty table ``SPEC``."""
        tier = self._opened(tmp_path)
        yield tier
        tier.close()

    def _opened(self, directory: Path) -> LastingTier:
        tier = self.make_tier(directory / "tier")
        assert isinstance(tier, LastingTier)
        tier.open_table(SPEC)
        return tier

    def test_a_new_table_has_no_positions(self, stream_tier: LastingTier) -> None:
        assert stream_tier.positions(SPEC.tag) == {}

    def test_a_span_brings_rows_and_its_position(
        self, stream_tier: LastingTier
    ) -> None:
        rows = random_rows(SPEC, KEYS.size)
        shuffled = np.random.default_rng(0).permutation(KEYS)
        brought = stream_tier.apply(SPEC.tag, shuffled, rows[shuffled], span(7, 9))
        assert brought == KEYS.size
        assert_rows(stream_tier, SPEC, KEYS, rows)
        assert stream_tier.positions(SPEC.tag) == {0: Position(9)}

    @pytest.mark.parametrize("since", [0, 3, 7])
    @pytest.mark.parametrize("until", [8, 9])
    def test_what_was_applied_is_not_applied_again(
        self, stream_tier: LastingTier, since: int, until: int
    ) -> None:
        put(stream_tier, KEYS, 1.0, span(7, 9))
        assert put(stream_tier, KEYS, 2.0, span(since, until)) == 0
        assert stream_tier.apply(SPEC.tag, KEYS, None, span(since, until)) == 0
        assert_values(stream_tier, KEYS, 1.0)
        assert stream_tier.positions(SPEC.tag) == {0: Position(9)}

    def test_a_span_that_goes_on_later_is_applied(
        self, stream_tier: LastingTier
    ) -> None:
        """It holds the newest rows as of its end, whatever was applied before."""
        put(stream_tier, KEYS, 1.0, span(7, 9))
        assert put(stream_tier, KEYS[:200], 2.0, span(8, 10)) == 200
        assert_values(stream_tier, KEYS[:200], 2.0)
        assert_values(stream_tier, KEYS[200:], 1.0)
        assert stream_tier.positions(SPEC.tag) == {0: Position(10)}

    def test_a_gap_is_refused(self, stream_tier: LastingTier) -> None:
        until = Position(9, 40)
        stream_tier.seek(SPEC.tag, {0: until})
        put(stream_tier, KEYS, 1.0, StreamSpan(0, until, Position(9, 50)))
        for since in (Position(9, 51), Position(10), Position(FAR - 1)):
            late = StreamSpan(0, since, Position(FAR))
            for rows in (filled_rows(SPEC, KEYS.size, 2.0), None):
                with pytest.raises(StreamGapError, match="9:50") as raised:
                    stream_tier.apply(SPEC.tag, KEYS, rows, late)
                assert (raised.value.offset, raised.value.record) == (9, 50)
        assert_values(stream_tier, KEYS, 1.0)
        assert stream_tier.positions(SPEC.tag) == {0: Position(9, 50)}
        assert put(stream_tier, KEYS, 3.0, StreamSpan(0, Position(9, 50), late.until))
        assert_values(stream_tier, KEYS, 3.0)

    def test_parts_of_a_message_follow_each_other(
        self, stream_tier: LastingTier
    ) -> None:
        cuts = [Position(3), Position(3, 100), Position(3, 200), Position(4)]
        for number, (since, until) in enumerate(pairwise(cuts)):
            keys = KEYS[100 * number : 100 * number + 100]
            piece = StreamSpan(0, since, until)
            assert put(stream_tier, keys, number, piece) == 100
            assert put(stream_tier, keys, -1.0, piece) == 0
            assert stream_tier.positions(SPEC.tag) == {0: until}
        for number in range(3):
            assert_values(stream_tier, KEYS[100 * number : 100 * number + 100], number)

    def test_deletes_remove_keys(self, stream_tier: LastingTier) -> None:
        put(stream_tier, KEYS, 1.0, span(0, 1))
        gone = np.concatenate([KEYS[:100], KEYS[:100] + 1000])
        assert stream_tier.apply(SPEC.tag, gone, None, span(1, 2)) == gone.size
        assert_absent(stream_tier, SPEC, gone)
        assert_values(stream_tier, KEYS[100:], 1.0)
        put(stream_tier, KEYS[:1], 2.0, span(2, 3))
        assert_values(stream_tier, KEYS[:1], 2.0)
        assert stream_tier.positions(SPEC.tag) == {0: Position(3)}

    def test_deletes_may_come_first(self, stream_tier: LastingTier) -> None:
        stream_tier.apply(SPEC.tag, KEYS, None, span(4, 5))
        assert stream_tier.positions(SPEC.tag) == {0: Position(5)}
        assert stream_tier.size(SPEC.tag) == 0

    @pytest.mark.parametrize("deletes", [False, True])
    def test_a_span_without_keys_is_a_position(
        self, stream_tier: LastingTier, deletes: bool
    ) -> None:
        none = keys_of()
        rows = None if deletes else filled_rows(SPEC, 0, 0.0)
        assert stream_tier.apply(SPEC.tag, none, rows, span(4, 5)) == 0
        assert stream_tier.positions(SPEC.tag) == {0: Position(5)}
        with pytest.raises(StreamGapError):
            stream_tier.apply(SPEC.tag, none, rows, span(6, 7))
        put(stream_tier, KEY, 1.0, span(5, 6))
        assert stream_tier.apply(SPEC.tag, none, rows, span(6, 7)) == 0
        assert stream_tier.positions(SPEC.tag) == {0: Position(7)}
        assert_values(stream_tier, KEY, 1.0)

    def test_any_int64_is_a_key_of_a_span(self, stream_tier: LastingTier) -> None:
        put(stream_tier, EXTREME_KEYS, 1.0, span(0, 1))
        stream_tier.apply(SPEC.tag, EXTREME_KEYS[:3], None, span(1, 2))
        assert_absent(stream_tier, SPEC, EXTREME_KEYS[:3])
        assert_values(stream_tier, EXTREME_KEYS[3:], 1.0)
        assert stream_tier.positions(SPEC.tag) == {0: Position(2)}

    def test_positions_are_not_rows(self, stream_tier: LastingTier) -> None:
        for partition in range(20):
            put(stream_tier, EXTREME_KEYS, 1.0, span(0, 1, partition=partition))
        assert stream_tier.size(SPEC.tag) == EXTREME_KEYS.size
        for block_rows in (1, EXTREME_KEYS.size, 1000):
            blocks = list(stream_tier.iterate(SPEC.tag, block_rows=block_rows))
            keys = np.concatenate([block.keys for block in blocks])
            np.testing.assert_array_equal(np.sort(keys), EXTREME_KEYS)
        assert stream_tier.evict(SPEC.tag) == EXTREME_KEYS.size
        assert stream_tier.size(SPEC.tag) == 0
        assert stream_tier.tables(SPEC.model) == [SPEC.name]

    def test_partitions_of_the_stream_do_not_mix(
        self, stream_tier: LastingTier
    ) -> None:
        expected = {}
        for number, partition in enumerate([10, 0, 1, 100, (1 << 31) - 1]):
            put(stream_tier, KEYS, number, span(50, 60 + number, partition=partition))
            expected[partition] = Position(60 + number)
            assert stream_tier.positions(SPEC.tag) == expected
        assert put(stream_tier, KEY, 9.0, span(60, 64, partition=100)) == 1
        assert put(stream_tier, KEY, 8.0, span(60, 61, partition=1)) == 0
        assert_values(stream_tier, KEY, 9.0)

    def test_tables_do_not_share_positions(self, stream_tier: LastingTier) -> None:
        other = TableSpec("model", "table2", 4)
        stream_tier.open_table(other)
        put(stream_tier, KEY, 1.0, span(0, 1))
        assert stream_tier.positions(other.tag) == {}
        rows = filled_rows(other, 1, 2.0)
        stream_tier.apply(other.tag, KEY, rows, span(8, 9))
        assert stream_tier.positions(SPEC.tag) == {0: Position(1)}
        assert stream_tier.positions(other.tag) == {0: Position(9)}

    @pytest.mark.parametrize("upheaval", list(UPHEAVALS))
    @pytest.mark.parametrize("used", [False, True])
    def test_positions_outlive_what_happens_to_rows(
        self, stream_tier: LastingTier, tmp_path: Path, upheaval: str, used: bool
    ) -> None:
        expected = {0: Position(3, 7), 12: Position(FAR, 1)}
        if used:
            put(stream_tier, KEYS, 1.0, StreamSpan(0, Position(0), expected[0]))
            put(stream_tier, KEYS, 2.0, StreamSpan(12, Position(0), expected[12]))
        else:
            stream_tier.seek(SPEC.tag, expected)
        UPHEAVALS[upheaval](stream_tier)
        assert stream_tier.positions(SPEC.tag) == expected
        n_rows = stream_tier.size(SPEC.tag)
        stream_tier.close()
        again = self._opened(tmp_path)
        assert again.positions(SPEC.tag) == expected
        assert again.size(SPEC.tag) == n_rows
        assert put(again, KEY, 3.0, StreamSpan(0, Position(3), Position(3, 7))) == 0
        assert put(again, KEY, 3.0, StreamSpan(0, Position(3), Position(4))) == 1
        assert_values(again, KEY, 3.0)
        again.close()

    def test_a_dropped_table_forgets_its_positions(
        self, stream_tier: LastingTier
    ) -> None:
        put(stream_tier, KEYS, 1.0, span(0, 9))
        stream_tier.drop_table(SPEC.tag)
        stream_tier.open_table(SPEC)
        assert stream_tier.positions(SPEC.tag) == {}
        assert put(stream_tier, KEY, 2.0, span(3, 4)) == 1

    def test_seek_goes_back_and_forth(self, stream_tier: LastingTier) -> None:
        put(stream_tier, KEYS, 1.0, span(0, 9))
        put(stream_tier, KEYS, 2.0, span(0, 9, partition=1))
        stream_tier.seek(SPEC.tag, {0: Position(4, 2)})
        assert stream_tier.positions(SPEC.tag) == {0: Position(4, 2), 1: Position(9)}
        assert_values(stream_tier, KEYS, 2.0)
        assert put(stream_tier, KEYS, 3.0, span(4, 5)) == KEYS.size
        with pytest.raises(StreamGapError):
            put(stream_tier, KEYS, 4.0, span(6, 7))
        stream_tier.seek(SPEC.tag, {0: Position(6), 2: Position(1)})
        assert put(stream_tier, KEYS, 5.0, span(6, 7)) == KEYS.size
        assert put(stream_tier, KEYS, 6.0, span(0, 1, partition=2)) == 0
        assert_values(stream_tier, KEYS, 5.0)
        stream_tier.seek(SPEC.tag, {})
        assert stream_tier.positions(SPEC.tag) == {
            0: Position(7),
            1: Position(9),
            2: Position(1),
        }

    @pytest.mark.parametrize("deletes", [False, True])
    def test_a_span_refuses_backfills_that_began_before(
        self, stream_tier: LastingTier, deletes: bool
    ) -> None:
        before = stream_tier.epoch(SPEC.tag)
        rows = None if deletes else filled_rows(SPEC, KEYS.size, 2.0)
        stream_tier.apply(SPEC.tag, KEYS, rows, span(0, 1))
        stream_tier.evict(SPEC.tag, KEYS)
        old = filled_rows(SPEC, KEYS.size, 1.0)
        assert stream_tier.backfill(SPEC.tag, KEYS, old, before) == 0
        assert_absent(stream_tier, SPEC, KEYS)

    @pytest.mark.parametrize("n_rows", [3, 1024, 12_000])
    def test_a_span_may_be_large(self, stream_tier: LastingTier, n_rows: int) -> None:
        """Some tiers take large ones another way."""
        stream_tier.open_table(WIDE)
        keys: Keys = np.random.default_rng(1).permutation(np.arange(n_rows)) * 7 - 20
        rows = random_rows(WIDE, n_rows)
        assert stream_tier.apply(WIDE.tag, keys, rows, span(0, 1)) == n_rows
        assert stream_tier.apply(WIDE.tag, keys, rows[::-1].copy(), span(0, 1)) == 0
        assert_rows(stream_tier, WIDE, keys, rows)
        some, fewer = keys[: n_rows // 2 + 1], filled_rows(WIDE, n_rows // 2 + 1, 2.0)
        assert stream_tier.apply(WIDE.tag, some, fewer, span(1, 2)) == some.size
        assert_rows(stream_tier, WIDE, some, fewer)
        assert stream_tier.size(WIDE.tag) == n_rows
        assert stream_tier.apply(WIDE.tag, keys, None, span(2, 3)) == n_rows
        assert_absent(stream_tier, WIDE, keys)
        assert stream_tier.size(WIDE.tag) == 0
        assert stream_tier.positions(WIDE.tag) == {0: Position(3)}

    def test_arrays_of_another_shape_are_refused(
        self, stream_tier: LastingTier
    ) -> None:
        good, none = filled_rows(SPEC, 3, 1.0), keys_of()
        keys = KEYS[:3]
        wrong: tuple[tuple[Any, Any], ...] = (
            (keys, good[:2]),
            (keys, good[:, :2].copy()),
            (keys, good.astype(np.float64)),
            (keys.astype(np.int32), good),
            (keys.astype(np.int32), None),
            (KEYS[:6:2], good),
            (none, good),
        )
        for bad_keys, bad_rows in wrong:
            with pytest.raises(ValueError, match=SPEC.tag):
                stream_tier.apply(SPEC.tag, bad_keys, bad_rows, span(0, 1))
        assert stream_tier.positions(SPEC.tag) == {}
        assert stream_tier.size(SPEC.tag) == 0

    def test_unknown_tables_have_no_stream(self, stream_tier: LastingTier) -> None:
        calls: tuple[Callable[[], object], ...] = (
            lambda: stream_tier.apply("hps_et.m.t", KEY, None, span(0, 1)),
            lambda: stream_tier.positions("hps_et.m.t"),
            lambda: stream_tier.seek("hps_et.m.t", {0: Position(1)}),
        )
        for call in calls:
            with pytest.raises(UnknownTableError):
                call()

    def test_two_readers_of_a_stream_apply_it_once(
        self, stream_tier: LastingTier
    ) -> None:
        """Which of the two brings a span does not matter."""
        start = threading.Barrier(2, timeout=60)

        def read(_: int) -> int:
            start.wait()
            return sum(put(stream_tier, KEYS, i, span(i, i + 1)) for i in range(40))

        stream_tier.seek(SPEC.tag, {0: Position(0)})
        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(read, range(2))) == 40 * KEYS.size
        assert_values(stream_tier, KEYS, 39)
        assert stream_tier.positions(SPEC.tag) == {0: Position(40)}

    def test_random_spans_leave_what_a_replay_leaves(
        self, stream_tier: LastingTier, tmp_path: Path
    ) -> None:
        """Spans come twice, overlap, lack records, and the tier is made again."""
        random = np.random.default_rng(3)
        log = [int(key) for key in random.integers(0, 40, 400)]  # negative: deletes
        log = [key if random.random() < 0.8 else -key - 1 for key in log]
        at = 0
        stream_tier.seek(SPEC.tag, {0: Position(0)})
        while at < len(log):
            since = max(0, at + int(random.integers(-6, 4)))
            until = min(len(log), since + int(random.integers(0, 12)))
            deletes = since < len(log) and log[since] < 0
            part = [i for i in range(since, until) if (log[i] < 0) == deletes]
            until = next((i for i in range(since, until) if i not in part), until)
            newest = {log[i]: i for i in range(since, until)}
            keys = keys_of(*(-key - 1 if deletes else key for key in newest))
            rows = np.repeat(np.array([*newest.values()], np.float32)[:, None], 4, 1)
            given = None if deletes else rows
            if since > at:
                with pytest.raises(StreamGapError, match=f"{at}:0"):
                    stream_tier.apply(SPEC.tag, keys, given, span(since, until))
            else:
                n_keys = stream_tier.apply(SPEC.tag, keys, given, span(since, until))
                assert n_keys == (keys.size if until > at else 0)
                at = max(at, until)
            if random.random() < 0.03:
                stream_tier.close()
                stream_tier = self._opened(tmp_path)
            assert stream_tier.positions(SPEC.tag) == {0: Position(at)}
            self._check_replay(stream_tier, log[:at])
        stream_tier.close()

    def _check_replay(self, tier: LastingTier, log: list[int]) -> None:
        replay: dict[int, int] = {}
        for number, key in enumerate(log):
            if key < 0:
                replay.pop(-key - 1, None)
            else:
                replay[key] = number
        rows, found = fetch(tier, SPEC, KEYS[:40])
        stored = {int(key): int(rows[key, 0]) for key in KEYS[:40][found]}
        assert stored == replay
