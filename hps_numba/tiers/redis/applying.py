"""Writing spans of the update stream: one script for each partition of a table.

A span goes to every partition, though it bring no rows there, so that all follow the
stream alike. A script has all rows of its partition, however many: with some of them at
``span.until`` and the position at ``span.since``, another server's shorter span would
be admitted and bring rows back that are older.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hps_numba.errors import StreamGapError, TierUnavailableError
from hps_numba.tiers.redis.bodies import Bodies, Piece, Work
from hps_numba.tiers.redis.errors import map_exceptions
from hps_numba.tiers.redis.exchange import Unit
from hps_numba.tiers.redis.stream_scripts import APPLY, GAP, SEEK, WRITTEN
from hps_numba.tiers.redis.table import RedisTable, buckets_to_stamp
from hps_numba.tiers.redis.tokens import At, parsed
from hps_numba.tiers.redis.topology import Topology
from hps_numba.tiers.redis.writing import Writer, work_on
from hps_numba.types import Keys, Position, Rows, StreamSpan


class Applier:
    """Applies the update stream to tables, whose locks the callers hold.

    Parameters
    ----------
    topology
        Which server has what.
    writer
        Sends scripts.
    """

    def __init__(self, topology: Topology, writer: Writer) -> None:
        self._topology = topology
        self._writer = writer

    def apply(
        self, table: RedisTable, keys: Keys, rows: Rows | None, span: StreamSpan
    ) -> int:
        """Write a span to all partitions; count the keys that were written.

        Raises
        ------
        StreamGapError
            If a partition lacks records before the span; the others were written.
        TierError
            If not all answered.
        """
        work = work_on(table, keys, rows, whole=True)
        bodies = Bodies(work)
        written = 0
        lacking: list[Position] = []

        def build(piece: Piece) -> Unit:
            p, low, high = piece
            command = bodies.command(piece, *_arguments(work, piece, span))
            return Unit(p, [command], 1, low, high)

        def settle(unit: Unit) -> None:
            nonlocal written
            done, seen, n_rows = unit.replies[0]
            table.see_locked(unit.partition, seen)
            if done == WRITTEN:
                written += unit.high - unit.low
                if _counts(work):
                    table.see_rows_locked(unit.partition, n_rows, unit.high - unit.low)
            elif done == GAP:
                lacking.append(Position(*parsed(seen[1])[span.partition]))

        def follow(unit: Unit) -> None:
            raise TierUnavailableError(
                f"partition {unit.partition} is on its way to another server, and no "
                f"script has all its keys; write the span again",
                tier="redis",
                tag=table.spec.tag,
            )

        # The caller has written the tiers below.
        table.tokens.reach(span.partition, span.until)
        self._writer.run(work, build, settle, follow, confirmed=True)
        if lacking:
            raise _gap(table, span, min(lacking))
        return written

    def positions(self, table: RedisTable) -> dict[int, Position]:
        """Return the least of what the partitions have."""
        layout, least = table.layout, dict[int, At]()
        with map_exceptions(table.spec.tag):
            for p in range(layout.n_partitions):
                text: Any = self._topology.client.hget(layout.stamps_key(p), "stream")
                for partition, at in parsed(text or b"").items():
                    least[partition] = min(at, least.get(partition, at))
        return {partition: Position(*at) for partition, at in least.items()}

    def seek(
        self, table: RedisTable, positions: Mapping[int, Position], *, new: bool
    ) -> None:
        """Set positions in all partitions; where ``new``, only in those without."""
        if not positions:
            return
        given = ["new" if new else "all"]
        given += [str(word) for pair in positions.items() for word in pair]
        if not new:
            table.tokens.seek(positions)
        with map_exceptions(table.spec.tag):
            for p in range(table.layout.n_partitions):
                self._topology.client.eval(SEEK, 1, table.layout.stamps_key(p), *given)


def _arguments(work: Work, piece: Piece, span: StreamSpan) -> list[bytes | str | int]:
    """Return the arguments of the script for a piece, up to its keys."""
    p, low, high = piece
    table, layout = work.table, work.table.layout
    use = table.use()
    names = [layout.stamps_key(p), layout.rows_key(p)]
    names += [layout.uses_key(p)] if use is not None else []
    return [
        b"EVAL",
        APPLY,
        len(names),
        *names,
        span.partition,
        str(span.since),
        str(span.until),
        buckets_to_stamp(work.keys[work.order[low:high]]),
        b"drop" if work.rows is None else b"put",
        b"" if layout.has_hashes else layout.prefixes[p],
        use or b"",
        int(_counts(work)),
    ]


def _counts(work: Work) -> bool:
    """Whether partitions may become too large, so that their rows are counted."""
    return work.table.limited and work.rows is not None


def _gap(table: RedisTable, span: StreamSpan, known: Position) -> StreamGapError:
    return StreamGapError(
        f"table {table.spec.tag} in Redis has the stream's partition {span.partition} "
        f"up to {known}; records from there to {span.since} are missing",
        offset=known.offset,
        record=known.record,
    )
