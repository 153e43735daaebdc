"""Changing rows: transactions of a stamp and rows, and plain writes without stamps.

Work on a batch is cut into pieces of one partition each. A piece of an update is one
transaction: the stamps of its keys and the rows change together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from redis.exceptions import InvalidResponse, MovedError

from hps_numba.errors import TierError
from hps_numba.tiers.arguments import for_kernel
from hps_numba.tiers.redis.bodies import Bodies, Piece, Work
from hps_numba.tiers.redis.channel import KEYS_PER_COMMAND
from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.exchange import Exchange, Unit
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.layout import pack
from hps_numba.tiers.redis.moving import Moved, write_moving
from hps_numba.tiers.redis.replies import Fate, fate_of, first_error, tier_error
from hps_numba.tiers.redis.scripts import BACKFILL, STAMP
from hps_numba.tiers.redis.table import RedisTable, Seen, buckets_of, buckets_to_stamp
from hps_numba.tiers.redis.topology import Topology
from hps_numba.types import Keys, Rows

_ATTEMPTS = 5
_MULTI, _EXEC = pack(b"MULTI"), pack(b"EXEC")


class Writer:
    """Writes rows of tables, whose locks the callers hold.

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

    def update(self, table: RedisTable, keys: Keys, rows: Rows | None) -> int:
        """Put rows or (without rows) delete keys, and stamp them; count the deleted.

        Raises
        ------
        TierError
            If not all were written.
        """
        work = work_on(table, keys, rows)
        removed = 0

        def settle(unit: Unit) -> None:
            nonlocal removed
            done = unit.replies[-1]
            if not isinstance(done, list) or len(done) != unit.n_replies - 2:
                raise ValueError("EXEC did not answer for each command")
            seen, *counts = done
            table.see_locked(unit.partition, seen)
            n_deleting = -(-(unit.high - unit.low) // KEYS_PER_COMMAND)
            removed += sum(counts[:n_deleting]) if rows is None else 0
            if rows is not None and table.limited:
                table.see_rows_locked(unit.partition, counts[-1], unit.high - unit.low)

        def follow(unit: Unit) -> None:
            nonlocal removed
            done = self._follow(work, unit)
            table.see_locked(unit.partition, done.seen)
            removed += done.removed

        self.run(work, self._updates(work), settle, follow, confirmed=True)
        return removed

    def put(self, table: RedisTable, keys: Keys, rows: Rows) -> None:
        """Put rows without stamps, for a load."""
        work = work_on(table, keys, rows)

        def settle(unit: Unit) -> None:
            if table.limited:
                n_rows = unit.replies[-1]
                table.see_rows_locked(unit.partition, n_rows, unit.high - unit.low)

        def follow(unit: Unit) -> None:
            self._follow(work, unit)

        self.run(work, Bodies(work).unit, settle, follow, confirmed=True)

    def evict(self, table: RedisTable, keys: Keys) -> int:
        """Delete rows without stamps; return how many there were."""
        work = work_on(table, keys, None)
        removed = 0

        def settle(unit: Unit) -> None:
            nonlocal removed
            n_deleting = -(-(unit.high - unit.low) // KEYS_PER_COMMAND)
            removed += sum(unit.replies[:n_deleting])

        def follow(unit: Unit) -> None:
            nonlocal removed
            removed += self._follow(work, unit).removed

        self.run(work, Bodies(work).unit, settle, follow)
        return removed

    def stamp_all(self, table: RedisTable, lease_us: int) -> None:
        """Refuse every backfill that began before, and for a lease."""
        n = table.layout.n_partitions

        def build(piece: Piece) -> Unit:
            key = table.layout.stamps_key(piece[0])
            stamp = pack(b"EVAL", STAMP, 1, key, b"", b"loading", lease_us)
            return Unit(piece[0], [stamp], 1)

        def settle(unit: Unit) -> None:
            table.see_locked(unit.partition, unit.replies[0])

        def follow(unit: Unit) -> None:
            key = table.layout.stamps_key(unit.partition)
            with map_exceptions(table.spec.tag):
                seen: Seen = self._topology.client.eval(
                    STAMP, 1, key, b"", b"loading", lease_us
                )
            table.see_locked(unit.partition, seen)

        none = np.zeros(0, np.int64)
        work = Work(table, none, None, none, np.zeros(n + 1, np.int64), whole=True)
        self.run(work, build, settle, follow, confirmed=True)

    def backfill(
        self, table: RedisTable, keys: Keys, rows: Rows, numbers: tuple[int, ...]
    ) -> int:
        """Put rows whose keys were not stamped since ``numbers``; count them."""
        work = work_on(table, keys, rows)
        layout, stored = table.layout, 0
        use = table.use()

        def build(piece: Piece) -> Unit:
            p, low, high = piece
            part = work.order[low:high]
            assert work.rows is not None
            names = [layout.stamps_key(p), layout.rows_key(p)]
            names += [layout.uses_key(p)] if use is not None else []
            command = pack(
                b"EVAL",
                BACKFILL,
                len(names),
                *names,
                numbers[p],
                table.spec.row_bytes,
                b"" if layout.has_hashes else layout.prefixes[p],
                keys[part].tobytes(),
                buckets_of(keys[part]).tobytes(),
                work.rows[part].tobytes(),
                use or b"",
            )
            count = [pack(b"HLEN", table.counted_key(p))] if table.limited else []
            return Unit(p, [command, *count], 1 + len(count), low, high)

        def settle(unit: Unit) -> None:
            nonlocal stored
            count, seen = unit.replies[0]
            stored += count
            table.see_locked(unit.partition, seen)
            if table.limited:
                table.see_rows_locked(unit.partition, unit.replies[1], count)

        # In a slot that is being moved nothing is backfilled: rows and stamps may be
        # on different servers.
        self.run(work, build, settle, lambda _: None)
        return stored

    def _updates(self, work: Work) -> Callable[[Piece], Unit]:
        """Return what makes a transaction of a piece."""
        bodies, table = Bodies(work), work.table

        def build(piece: Piece) -> Unit:
            p, low, high = piece
            body = bodies.unit(piece)
            buckets = buckets_to_stamp(work.keys[work.order[low:high]])
            key = table.layout.stamps_key(p)
            stamp = pack(b"EVAL", STAMP, 1, key, buckets, b"", 0)
            commands = [_MULTI, stamp, *body.commands, _EXEC]
            return Unit(p, commands, body.n_replies + 3, low, high)

        return build

    def _follow(self, work: Work, unit: Unit) -> Moved:
        """Write the keys of a unit one by one, wherever they are."""
        part = work.order[unit.low : unit.high]
        rows = None if work.rows is None else work.rows[part]
        return write_moving(
            self._topology.client, work.table, unit.partition, work.keys[part], rows
        )

    def run(
        self,
        work: Work,
        build: Callable[[Piece], Unit],
        settle: Callable[[Unit], None],
        follow: Callable[[Unit], None],
        *,
        confirmed: bool = False,
    ) -> None:
        """Send the pieces of some work until all are answered, or some never will be.

        ``settle`` is given what was answered, ``follow`` what is in a slot that is
        being moved.
        """
        table, todo = work.table, work.pieces()
        errors: list[TierError] = []
        for attempt in range(_ATTEMPTS):
            sent: list[Unit] = []
            units = _building(todo, build, sent)
            self._exchange.run(units, table.slots, confirmed=confirmed)
            todo = []
            for unit in sent:
                error = _settled(unit, settle)
                if error is None:
                    continue
                fate = Fate.REFUSED if isinstance(error, TierError) else fate_of(error)
                again = fate in (Fate.MOVED, Fate.RECONNECT)
                if again and attempt < _ATTEMPTS - 1:
                    if isinstance(error, MovedError):
                        self._topology.moved(error)
                    todo.append((unit.partition, unit.low, unit.high))
                elif fate is Fate.MOVING:
                    try:
                        follow(unit)
                    except TierError as exc:
                        errors.append(exc)
                else:
                    errors.append(self._told(unit, error, fate, table))
            if not todo:
                break
        if errors:
            raise errors[0]

    def _told(
        self, unit: Unit, error: Exception, fate: Fate, table: RedisTable
    ) -> TierError:
        if isinstance(error, TierError):
            return error
        assert unit.node is not None  # or it would have been a TierError
        self._health.learn(unit.node, fate, error)
        return tier_error(error, unit.node, table.spec.tag)


def work_on(
    table: RedisTable, keys: Keys, rows: Rows | None, *, whole: bool = False
) -> Work:
    """Group keys by partition."""
    order, bounds = table.grouped(keys)
    given = None if rows is None else for_kernel(rows).view(np.uint8)
    return Work(table, for_kernel(keys), given, order, bounds, whole)


def _settled(unit: Unit, settle: Callable[[Unit], None]) -> Exception | None:
    """Settle a unit that was answered; return what went wrong otherwise."""
    error = unit.error or first_error(unit.replies)
    if error is not None:
        return error
    try:
        settle(unit)
    except (TypeError, ValueError) as exc:
        return InvalidResponse(f"the replies do not fit the commands: {exc}")
    return None


def _building(
    pieces: list[Piece], build: Callable[[Piece], Unit], sent: list[Unit]
) -> Iterator[Unit]:
    """Make units one by one, as they are asked for."""
    for piece in pieces:
        sent.append(build(piece))
        yield sent[-1]
