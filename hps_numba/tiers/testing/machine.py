"""Contract: random operations, beside a dict that does the same.

An epoch that the machine remembers stands for a lookup that began then. A backfill with
it must not store keys that were written since, must store all of them if nothing was,
and may do either with the rest.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from hps_numba.tiers.base import Epoch, Tier
from hps_numba.tiers.testing.suite import (
    INT64,
    SPEC,
    TierSuite,
    fetch,
    filled_rows,
    keys_of,
)
from hps_numba.types import RowBlock

_KEY_RANGE = [INT64.min, -7, -1, *range(12), 1 << 40, INT64.max]
_keys = st.lists(st.sampled_from(_KEY_RANGE), unique=True, max_size=8)
_repeated_keys = st.lists(st.sampled_from(_KEY_RANGE), max_size=12)


class TierMachine(RuleBasedStateMachine):
    """One table, and a dict from its keys to the number in their rows."""

    def __init__(self, make_tier: Callable[[Path], Tier], *, persistent: bool) -> None:
        super().__init__()
        self._make_tier = make_tier
        self._persistent = persistent
        self._directory = Path(tempfile.mkdtemp())
        self._numbers = itertools.count(1)
        self._rows: dict[int, int] = {}
        self._written: dict[int, Epoch] = {}  # the epoch after a key's last write
        self._tier = self._opened()
        self._load_epoch = self._tier.epoch(SPEC.tag)
        self._epochs = [self._load_epoch]

    def teardown(self) -> None:
        """Check the last state and remove the tier."""
        self._check_all()
        self._tier.close()
        shutil.rmtree(self._directory)

    @rule(keys=_keys)
    def insert(self, keys: list[int]) -> None:
        """Give keys new rows."""
        block = self._block(keys)
        self._tier.insert(SPEC.tag, block.keys, block.rows)
        self._rows.update(_numbers(block))
        self._note_written(keys)

    @rule(keys=_keys)
    def delete(self, keys: list[int]) -> None:
        """Delete keys, some of them absent."""
        known = [key for key in keys if self._rows.pop(key, None) is not None]
        assert self._tier.delete(SPEC.tag, keys_of(*keys)) == len(known)
        self._note_written(keys)

    @rule(first=_repeated_keys, second=_repeated_keys)
    def load(self, first: list[int], second: list[int]) -> None:
        """Replace the table by two blocks in which keys repeat."""
        blocks = [self._block(first), self._block(second)]
        assert self._tier.load(SPEC.tag, blocks) == len(first) + len(second)
        self._rows = {**_numbers(blocks[0]), **_numbers(blocks[1])}
        self._load_epoch = self._tier.epoch(SPEC.tag)

    @rule()
    def begin_backfill(self) -> None:
        """Remember the epoch."""
        self._epochs.append(self._tier.epoch(SPEC.tag))

    @rule(keys=_keys, pick=st.integers(0, 1 << 16))
    def backfill(self, keys: list[int], pick: int) -> None:
        """Backfill with an epoch that was remembered."""
        epoch: Any = self._epochs[pick % len(self._epochs)]  # ordered, of any kind
        current = self._tier.epoch(SPEC.tag)
        block = self._block(keys)
        stored = self._tier.backfill(SPEC.tag, block.keys, block.rows, epoch)
        given = _numbers(block)
        rows, found = fetch(self._tier, SPEC, block.keys)
        taken = [
            key
            for key, row, there in zip(keys, rows, found, strict=True)
            if there and row[0] == given[key]
        ]
        assert len(taken) == stored
        assert epoch < current or stored == len(keys)
        for key in taken:
            assert self._load_epoch <= epoch
            assert self._written.get(key, self._load_epoch) <= epoch
            self._rows[key] = given[key]

    @rule(keys=_keys)
    def refuse_while_held(self, keys: list[int]) -> None:
        """Backfill while the keys are held."""
        block = self._block(keys)
        with self._tier.hold(SPEC.tag, block.keys):
            epoch = self._tier.epoch(SPEC.tag)
            assert self._tier.backfill(SPEC.tag, block.keys, block.rows, epoch) == 0

    @rule(keys=st.none() | _keys)
    def evict(self, keys: list[int] | None) -> None:
        """Forget some keys, or all."""
        known = set(self._rows) & set(self._rows if keys is None else keys)
        evicted = None if keys is None else keys_of(*keys)
        assert self._tier.evict(SPEC.tag, evicted) == len(known)
        for key in known:
            del self._rows[key]

    @rule(keys=_repeated_keys)
    def look(self, keys: list[int]) -> None:
        """Fetch keys, some repeated or absent."""
        rows, found = fetch(self._tier, SPEC, keys_of(*keys))
        np.testing.assert_array_equal(found, [key in self._rows for key in keys])
        expected = np.array([self._rows.get(key, 0) for key in keys], SPEC.dtype.value)
        np.testing.assert_array_equal(rows, expected[:, None].repeat(SPEC.dim, axis=1))

    @rule()
    def reopen(self) -> None:
        """Close the tier and make it again."""
        self._tier.close()
        self._tier = self._opened()
        if not self._persistent:
            self._rows = {}
        self._written = {}
        self._load_epoch = self._tier.epoch(SPEC.tag)
        self._epochs = [self._load_epoch]

    @rule(block_rows=st.integers(1, 9))
    def iterate(self, block_rows: int) -> None:
        """Read the whole table."""
        self._check_all(block_rows)

    def _check_all(self, block_rows: int = 4) -> None:
        seen: dict[int, int] = {}
        for block in self._tier.iterate(SPEC.tag, block_rows=block_rows):
            assert not seen.keys() & set(block.keys.tolist())
            seen.update(_numbers(block))
        assert seen == self._rows
        assert self._tier.size(SPEC.tag) == len(self._rows)

    def _opened(self) -> Tier:
        tier = self._make_tier(self._directory / "tier")
        tier.open_table(SPEC)
        return tier

    def _block(self, keys: list[int]) -> RowBlock:
        """Return the keys with rows that no other block has."""
        rows = filled_rows(SPEC, len(keys), 0)
        rows += np.array([next(self._numbers) for _ in keys], np.float32)[:, None]
        return RowBlock(keys_of(*keys), rows)

    def _note_written(self, keys: list[int]) -> None:
        epoch = self._tier.epoch(SPEC.tag)
        self._written.update(dict.fromkeys(keys, epoch))


class MachineContract(TierSuite):
    """Random operations agree with a dict."""

    def test_random_operations_agree_with_a_dict(self) -> None:
        """Run the machine; hypothesis prints the shortest failing steps."""
        suite = self

        class Machine(TierMachine):
            def __init__(self) -> None:
                super().__init__(suite.make_tier, persistent=suite.persistent)

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def _numbers(block: RowBlock) -> dict[int, int]:
    return {
        int(key): int(row[0]) for key, row in zip(block.keys, block.rows, strict=True)
    }
