"""Two servers that follow one stream, each with a lower tier, step by step.

Record ``n`` of the stream is version ``n + 2`` of the key: a row, or its deletion.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from hps_numba.runtime.backfill import Backfill
from hps_numba.types import Position, Rows, StreamSpan
from tests.runtime.histories import FIRST, SteppedBackfills, row
from tests.support.orders import Footprint
from tests.tiers.redis.two_servers import KEY, SPEC, STAMPS, Servers

STREAM = 5  # the partition of the stream


def span(since: int, until: int) -> StreamSpan:
    return StreamSpan(STREAM, Position(since), Position(until))


class LookingBackfills(SteppedBackfills):
    """Looks at Redis after each backfill."""

    def put(self, item: Backfill) -> bool:
        stage: Any = self._stage
        scheduler, tier = stage.scheduler, item.tier

        def call() -> None:
            tier.inner.backfill(item.tag, item.keys, item.rows, item.epoch)  # type: ignore[attr-defined]  # it is a wrapper
            stage.look()

        name = f"backfill {scheduler.n_tasks}"
        scheduler.spawn(name, call, label=f"{tier.name}.backfill")
        return True


class Followers(Servers):
    """The tasks of one schedule, and what is wrong with what Redis had.

    Invariant of what is right: versions in Redis never fall, and none is older than one
    that a server's Redis tier has acknowledged.
    """

    def __init__(self, stage: Any, *, warm: bool = False) -> None:
        assert stage.apart
        super().__init__(stage, warm=warm)
        self._floor, self._wrong = FIRST, ""
        stage.look = self.look
        stage.client.hdel(STAMPS, "stream")
        for server in stage.servers.values():
            server.redis.seek(SPEC.tag, {STREAM: Position(0)})
        for server in stage.servers.values():
            server.learn()

    def apply(
        self, name: str, *spans: tuple[int, int], deleted: int | None = None
    ) -> None:
        """Add the application of spans, in turn; one may end in a deletion."""

        def call() -> None:
            for i, (since, until) in enumerate(spans):
                if i:
                    self._stage.point(f"{name}.lower.insert")
                deletes = deleted == until - 1
                rows = None if deletes else row(until + 1)
                self._apply(name, rows, span(since, until))
                self.look(until + 1)

        self._spawn(name, "lower.insert", call)

    def apply_and_update(self, name: str, since: int, until: int, version: int) -> None:
        """Add the application of a span, and then an update that no stream brings."""

        def call() -> None:
            self._apply(name, row(until + 1), span(since, until))
            self._stage.point(f"{name}.redis.insert")
            self._stage.servers[name].redis.insert(SPEC.tag, KEY, row(version))
            self.look(version)

        self._spawn(name, "lower.insert", call)

    def look(self, acknowledged: int = FIRST) -> None:
        """Note what Redis has, after a version was acknowledged."""
        self._floor = max(self._floor, acknowledged)
        found, out = np.zeros(1, np.bool_), row(-1)
        self._stage.servers["a"].redis.fetch(SPEC.tag, KEY, out, found)
        if found[0] and out[0, 0] < self._floor:
            self._wrong = f"Redis had version {int(out[0, 0])} after {self._floor}"
        if found[0]:
            self._floor = max(self._floor, int(out[0, 0]))

    def check(self) -> str | None:
        """Return what was wrong, or None."""
        self.look()
        return self._wrong or None

    def _apply(self, name: str, rows: Rows | None, given: StreamSpan) -> None:
        """Apply a span as a hierarchy does: hold, the lower tier, Redis."""
        server = self._stage.servers[name]
        with server.redis.hold(SPEC.tag, KEY):
            if rows is None:
                server.lower.delete(SPEC.tag, KEY)
            else:
                server.lower.insert(SPEC.tag, KEY, rows)
            self._stage.point(f"{name}.redis.apply")
            self.write(name, rows, given)

    def write(self, name: str, rows: Rows | None, given: StreamSpan) -> None:
        """Write a span to Redis."""
        self._stage.servers[name].redis.apply(SPEC.tag, KEY, rows, given)


@cache
def footprint(label: str) -> Footprint:
    """Return what the step that begins at a stop point touches."""
    server, _, operation = label.partition(".")
    here = f"server {server}"  # its lower tier, tokens, holds and flights
    return {
        "begin": Footprint(writes=frozenset({here})),
        "redis.epoch": Footprint(reads=frozenset({here})),
        "redis.fetch": Footprint(frozenset({"redis"}), frozenset({here})),
        "lower.fetch": Footprint(writes=frozenset({here})),
        "lower.insert": Footprint(writes=frozenset({here})),
    }.get(operation) or Footprint(writes=frozenset({"redis", here}))
