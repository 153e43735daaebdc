"""Steps of overflow handling: one call per partition, to all servers at once."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import time
from typing import Any, NamedTuple

import numpy as np
from redis.exceptions import MovedError

from hps_numba.errors import TierError
from hps_numba.tiers.redis.exchange import Exchange, Unit
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.layout import Numbers, pack
from hps_numba.tiers.redis.overflow_scripts import (
    AGE,
    AGED,
    EVICT,
    NOTE,
    SAMPLE,
    VICTIMS,
)
from hps_numba.tiers.redis.replies import Fate, fate_of, first_error
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.topology import Topology
from hps_numba.types import Keys, OverflowPolicy

logger = logging.getLogger(__name__)

_KEYS_PER_CALL = 1024


@dataclass(frozen=True)
class Answer:
    """What a server said of one partition."""

    partition: int
    value: Any  # None if it did not do it
    again: bool = False  # it may do it later: the partition is on its way elsewhere


class Evicted(NamedTuple):
    """What a step did."""

    removed: int
    rows: int  # that are left


def victims_of(table: RedisTable) -> int:
    """Return how many rows a step removes at most.

    As large a share of a sample as has to go of the partition, so that samples that
    follow each other through it once are enough.
    """
    if table.overflow.policy is OverflowPolicy.EVICT_RANDOM:
        return VICTIMS
    share = math.ceil(SAMPLE * (1 - table.overflow.target))
    return min(max(share, VICTIMS // 4), VICTIMS)


class Evictor:
    """Removes rows and notes uses, in calls of bounded work. Thread-safe.

    Parameters
    ----------
    topology
        Which server has what.
    health
        Which servers answer.
    exchange
        Connections.
    """

    def __init__(self, topology: Topology, health: Health, exchange: Exchange) -> None:
        self._topology = topology
        self._health = health
        self._exchange = exchange

    def evict(self, table: RedisTable, partitions: Iterable[int]) -> list[Answer]:
        """Remove some rows of each; the values are ``Evicted``."""
        layout = table.layout
        policy = table.overflow.policy.value

        def command(p: int) -> bytes:
            keys = (layout.rows_key(p), layout.uses_key(p))
            prefix = b"" if layout.has_hashes else layout.prefixes[p]
            numbers = (table.goal, victims_of(table), SAMPLE)
            cursor = table.cursors.get(p) or random.getrandbits(32)
            return pack(b"EVAL", EVICT, 2, *keys, *numbers, policy, cursor, prefix)

        answers = []
        for answer in self._ask(table, partitions, command):
            if answer.value is not None:
                removed, rows, cursor = answer.value
                with table.lock:
                    table.evictions += removed
                    table.cursors[answer.partition] = cursor
                answer = replace(answer, value=Evicted(removed, rows))
            answers.append(answer)
        return answers

    def age(self, table: RedisTable, cursors: dict[int, bytes]) -> list[Answer]:
        """Halve some numbers of uses of each; the values are the next cursors."""

        def command(p: int) -> bytes:
            return pack(b"EVAL", AGE, 1, table.layout.uses_key(p), cursors[p], AGED)

        return self._ask(table, cursors, command)

    def note(self, table: RedisTable, keys: Keys, counts: Numbers) -> int:
        """Note uses of distinct keys; return how many no server has noted."""
        layout = table.layout
        order, bounds = table.grouped(keys)
        oldest = table.overflow.policy is OverflowPolicy.EVICT_OLDEST
        now = int(time()).to_bytes(8, "little")
        counts = np.minimum(counts, np.iinfo(np.uint32).max)

        def unit(p: int, low: int, high: int) -> Unit:
            part = order[low:high]
            names = (layout.rows_key(p), layout.uses_key(p))
            uses = b"" if oldest else counts[part].astype("<u4").tobytes()
            prefix = b"" if layout.has_hashes else layout.prefixes[p]
            given = (keys[part].tobytes(), now, uses, prefix)
            command = pack(b"EVAL", NOTE, 2, *names, *given)
            return Unit(p, [command], 1, low, high)

        units = [
            unit(p, low, min(low + _KEYS_PER_CALL, int(bounds[p + 1])))
            for p in range(layout.n_partitions)
            for low in range(int(bounds[p]), int(bounds[p + 1]), _KEYS_PER_CALL)
        ]
        self._exchange.run(units, table.slots)
        failed = [u for u in units if self._answer(table, u).value is None]
        return sum(u.high - u.low for u in failed)

    def _ask(
        self,
        table: RedisTable,
        partitions: Iterable[int],
        command: Callable[[int], bytes],
    ) -> list[Answer]:
        units = [Unit(p, [command(p)], 1) for p in partitions]
        self._exchange.run(units, table.slots)
        return [self._answer(table, unit) for unit in units]

    def _answer(self, table: RedisTable, unit: Unit) -> Answer:
        error = unit.error or first_error(unit.replies)
        if error is None:
            return Answer(unit.partition, unit.replies[0])
        logger.debug(
            "overflow tag=%s partition=%d: %r", table.spec.tag, unit.partition, error
        )
        if isinstance(error, TierError):
            return Answer(unit.partition, None)
        fate = fate_of(error)
        if isinstance(error, MovedError) and fate is Fate.MOVED:
            self._topology.moved(error)
        again = fate in (Fate.MOVED, Fate.MOVING, Fate.RECONNECT)
        if unit.node is not None and not again:
            self._health.learn(unit.node, fate, error)
        return Answer(unit.partition, None, again)
