"""What ``hps-numba deploy`` notes while a server starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from hps_numba.runtime.loading import LoadProgress
from hps_numba.runtime.stats import ServerStats, TierUse

_CHECK = "check"  # the step that only a table loaded from its files goes through


@dataclass(frozen=True)
class DeployedTable:
    """One table after the start of a server."""

    model: str
    table: str
    loaded: bool  # from its files; otherwise what was stored is resumed
    seconds: float
    tiers: tuple[TierUse, ...]


@dataclass
class _Span:
    """When a table's steps were first and last heard of."""

    began_s: float
    ended_s: float
    loaded: bool = False


class LoadWatch:
    """Notes which tables are loaded from files, and how long each one takes.

    Callable as the ``progress`` of ``HPS.from_json``, and passes every call on. Not
    thread-safe, which a start does not ask for.
    """

    def __init__(
        self, forward: LoadProgress, clock: Callable[[], float] = monotonic
    ) -> None:
        self._forward = forward
        self._clock = clock
        self._spans: dict[str, _Span] = {}  # by "model/table"

    def __call__(self, label: str, done_rows: int, total_rows: int) -> None:
        """Note a step of a table; ``label`` is ``"model/table step"``."""
        self._forward(label, done_rows, total_rows)
        name, _, step = label.rpartition(" ")
        now_s = self._clock()
        span = self._spans.setdefault(name, _Span(now_s, now_s))
        span.ended_s = now_s
        span.loaded |= step == _CHECK

    def tables(self, stats: ServerStats) -> list[DeployedTable]:
        """Return every table of a server with what was noted of it."""
        never = _Span(0.0, 0.0)
        spans = [self._spans.get(f"{t.model}/{t.table}", never) for t in stats.tables]
        return [
            DeployedTable(
                each.model,
                each.table,
                span.loaded,
                span.ended_s - span.began_s,
                each.tiers,
            )
            for each, span in zip(stats.tables, spans, strict=True)
        ]
