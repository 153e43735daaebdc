"""Fetching rows: rounds over lanes, and what becomes of keys that were not answered."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from redis.exceptions import MovedError

from hps_numba.errors import TierCorruptionError, TierError
from hps_numba.tiers.redis.channel import Batch, Channel, Trouble
from hps_numba.tiers.redis.following import Follower
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.lane import Lanes
from hps_numba.tiers.redis.layout import Bytes, Numbers
from hps_numba.tiers.redis.replies import Fate, as_exception, fate_of, tier_error
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.topology import Node, Topology
from hps_numba.types import Keys, Mask

logger = logging.getLogger(__name__)

_ROUNDS = 4  # a slot may move once more while one follows it


@dataclass
class _Outcome:
    """What a round left over."""

    again: list[Numbers] = field(default_factory=list)  # to ask for in another round
    moving: list[Numbers] = field(default_factory=list)  # in a slot that is moved now
    errors: list[TierError] = field(default_factory=list)


@dataclass(frozen=True)
class Asking:
    """Until when servers are asked, and what is called when they have been."""

    end_s: float = math.inf
    asked: Callable[[], None] | None = None


class Reader:
    """Reads rows of tables. Thread-safe.

    Parameters
    ----------
    topology
        Which server has what.
    health
        Which servers answer.
    lanes
        Connections.
    max_keys
        Most keys of one round to the servers.
    """

    def __init__(
        self, topology: Topology, health: Health, lanes: Lanes, max_keys: int
    ) -> None:
        self._topology = topology
        self._follower = Follower(topology, health)
        self._health = health
        self._lanes = lanes
        self._max_keys = max_keys

    def fetch_all(
        self, table: RedisTable, keys: Keys, out: Bytes, found: Mask, asking: Asking
    ) -> None:
        """Read rows in so many rounds as their number needs; else as ``fetch``."""
        errors: list[TierError] = []
        for low in range(0, keys.size, self._max_keys):
            if monotonic() >= asking.end_s:
                break
            high = low + self._max_keys
            part, last = slice(low, high), high >= keys.size
            asked = asking.asked if last else None
            try:
                self.fetch(table, keys[part], out[part], found[part], asked)
            except TierError as exc:  # of one server; others have more rows
                errors.append(exc)
        if errors:
            raise errors[0]

    def fetch(
        self,
        table: RedisTable,
        keys: Keys,
        out: Bytes,
        found: Mask,
        asked: Callable[[], None] | None = None,
    ) -> None:
        """Read the rows of keys that are not found; mark those that there are.

        ``asked`` is called, perhaps more than once, when all commands are on their way.

        Raises
        ------
        TierError
            If a server did not answer, after the rows of all others were read.
        """
        layout = table.layout
        errors: list[TierError] = []
        wanted = np.flatnonzero(~found)
        for number in range(_ROUNDS):
            order, bounds = table.grouped(
                keys if wanted.size == keys.size else keys[wanted]
            )
            if wanted.size < keys.size:
                order = wanted[order]
            batch = Batch(
                layout.reading,
                layout.row_header,
                keys,
                order,
                bounds,
                out,
                found,
                asked,
            )
            outcome = self._round(table, batch, last=number == _ROUNDS - 1)
            errors += outcome.errors
            if outcome.moving:
                self._follow(table, np.concatenate(outcome.moving), batch, errors)
            if not outcome.again:
                break
            wanted = np.concatenate(outcome.again)
        if errors:
            raise errors[0]

    def _round(self, table: RedisTable, batch: Batch, *, last: bool) -> _Outcome:
        outcome = _Outcome()
        with self._lanes.lane() as lane:
            # Only now: whoever waited for a lane knows what became of a server since.
            work = self._work(table, batch.bounds, outcome)
            channels, troubles = lane.read(batch, work)
            for channel in channels:
                _check_widths(table, channel, batch.keys, outcome)
        for trouble in troubles:
            self._judge(table, trouble, outcome, last=last)
        return outcome

    def _work(
        self, table: RedisTable, bounds: Numbers, outcome: _Outcome
    ) -> Sequence[tuple[Node, Numbers]]:
        """Return who is to be asked for which partitions."""
        nodes: dict[str, Node] = {}
        parts: dict[str, list[int]] = {}
        for partition in np.flatnonzero(np.diff(bounds)).tolist():
            try:
                node = self._health.server_of(table.slots[partition])
            except TierError as exc:
                outcome.errors.append(exc)
                continue
            nodes[node.name] = node
            parts.setdefault(node.name, []).append(partition)
        return [(nodes[name], np.array(p, np.int64)) for name, p in parts.items()]

    def _judge(
        self, table: RedisTable, trouble: Trouble, outcome: _Outcome, *, last: bool
    ) -> None:
        error = trouble.error
        if isinstance(error, str):
            error = as_exception(error)
        fate = fate_of(error)
        logger.debug(
            "redis server=%s keys=%d %s: %r",
            trouble.node.name,
            trouble.targets.size,
            fate.name,
            error,
        )
        if fate is Fate.MOVED and isinstance(error, MovedError) and not last:
            self._topology.moved(error)
            outcome.again.append(trouble.targets)
        elif fate is Fate.RECONNECT and not last:
            outcome.again.append(trouble.targets)
        elif fate is Fate.MOVING:
            outcome.moving.append(trouble.targets)
        else:
            self._health.learn(trouble.node, fate, error)
            outcome.errors.append(tier_error(error, trouble.node, table.spec.tag))

    def _follow(
        self, table: RedisTable, targets: Numbers, batch: Batch, errors: list[TierError]
    ) -> None:
        """Read keys of slots that are being moved, wherever each is."""
        order, bounds = table.grouped(batch.keys[targets])
        for partition in np.flatnonzero(np.diff(bounds)).tolist():
            part = targets[order[bounds[partition] : bounds[partition + 1]]]
            values = self._follower.read(table, partition, batch.keys[part])
            try:
                for target, value in zip(part.tolist(), values, strict=True):
                    if value is None:
                        continue
                    if len(value) == table.spec.row_bytes:
                        batch.out[target] = np.frombuffer(value, np.uint8)
                        batch.found[target] = True
                    else:
                        key = int(batch.keys[target])
                        errors.append(_wrong_width(table, key, len(value)))
            except TierError as exc:
                errors.append(exc)


def _check_widths(
    table: RedisTable, channel: Channel, keys: Keys, outcome: _Outcome
) -> None:
    n_wrong, target, n_bytes = channel.wrong
    if n_wrong:
        outcome.errors.append(_wrong_width(table, int(keys[target]), n_bytes, n_wrong))


def _wrong_width(
    table: RedisTable, key: int, n_bytes: int, n_wrong: int = 1
) -> TierCorruptionError:
    spec = table.spec
    return TierCorruptionError(
        f"{n_wrong} value(s) are no rows of dim {spec.dim}, {spec.dtype.value} "
        f"({spec.row_bytes} bytes); key {key} has {n_bytes} bytes: another table shape "
        f"was written under this name",
        tier="redis",
        tag=spec.tag,
    )
