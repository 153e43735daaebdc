"""A small cache beside its oracle, under whatever operations Hypothesis thinks of."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from hps_numba.kernels.cuda.layout import Policy, RowLayout, TableLayout
from tests.kernels.cuda.checked import CheckedCache
from tests.kernels.cuda.checked_pooling import pooled_query, pooled_scatter
from tests.kernels.cuda.oracle import Array
from tests.kernels.cuda.sequences import EXTREME, fill, rows_for

# Few stamps and few entries of the doorkeeper, a tick every two keys.
TABLES = [
    TableLayout(1, n_stamps=4, tick_shift=1, n_door=2),
    TableLayout(2, n_stamps=2, tick_shift=0, n_door=4),
]
KEYS = st.one_of(st.integers(0, 40), st.sampled_from(EXTREME))
TABLE = st.integers(0, len(TABLES) - 1)


class CacheMachine(RuleBasedStateMachine):
    """Writes take one key at a time, so that all is exact."""

    policy: ClassVar[Policy]

    def __init__(self) -> None:
        super().__init__()
        self.cache = CheckedCache(RowLayout(4), TABLES, self.policy)
        # Full sets are where it gets interesting.
        for table in range(len(TABLES)):
            fill(
                self.cache, np.arange(26), rows_for(self.cache, 26, seed=1), table=table
            )
        self.seed = 0
        self.epoch = 2

    def rows(self, n: int) -> Array:
        self.seed += 1
        return rows_for(self.cache, n, seed=self.seed)

    @rule(
        keys=st.lists(st.lists(KEYS, max_size=6), min_size=1, max_size=2),
        touch=st.booleans(),
        count_unique=st.booleans(),
    )
    def query(self, keys: list[list[int]], touch: bool, count_unique: bool) -> None:
        parts = [np.array(part, np.int64) for part in keys]
        answer, found = self.cache.query(*parts, touch=touch, count_unique=count_unique)
        self.cache.scatter(answer, found, 0, self.rows(4))

    @rule(bags=st.lists(st.lists(KEYS, max_size=4), max_size=4), mean=st.booleans())
    def pool(self, bags: list[list[int]], mean: bool) -> None:
        run = pooled_query(self.cache, bags, mean=mean)
        pooled_scatter(self.cache, run, 0, self.rows(4))

    @rule(
        table=TABLE,
        key=KEYS,
        behind=st.sampled_from([0, 0, 0, 0, 1, 2]),
        admit=st.booleans(),
        make_room=st.sampled_from([True, True, True, False]),
    )
    def insert(
        self, table: int, key: int, behind: int, admit: bool, make_room: bool
    ) -> None:
        self.cache.insert(
            np.array([key]),
            self.rows(1),
            table=table,
            epoch=self.epoch - behind,
            admit=admit,
            make_room=make_room,
        )

    @rule(table=TABLE, key=KEYS)
    def update(self, table: int, key: int) -> None:
        self.epoch += 1
        keys = np.array([key])
        self.cache.update(keys, self.rows(1), table=table, epoch=self.epoch)

    @rule(table=TABLE, key=KEYS)
    def evict(self, table: int, key: int) -> None:
        self.epoch += 1
        self.cache.evict(np.array([key]), table=table, epoch=self.epoch)

    @rule(table=TABLE, chance=st.integers(0, 9))
    def clear(self, table: int, chance: int) -> None:
        if chance == 0:
            self.epoch += 1
            self.cache.clear(table=table, epoch=self.epoch)

    @rule(table=TABLE)
    def dump(self, table: int) -> None:
        self.cache.dump(table=table)


class LruMachine(CacheMachine):
    policy = Policy.LRU


class LfuMachine(CacheMachine):
    policy = Policy.LFU


SETTINGS = settings(
    max_examples=120, stateful_step_count=50, deadline=None, derandomize=True
)
TestLru = LruMachine.TestCase
TestLru.settings = SETTINGS
TestLfu = LfuMachine.TestCase
TestLfu.settings = SETTINGS
