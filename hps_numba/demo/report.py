"""The demo's figures: one table for people, one JSON file for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from hps_numba._version import __version__
from hps_numba.demo.checker import Tally
from hps_numba.demo.replay import ReplayResult
from hps_numba.demo.updater import ROUNDS, UpdateRecord
from hps_numba.demo.workload import Workload

if TYPE_CHECKING:
    from hps_numba.runtime.stats import ServerStats

_TIER_TITLES = {"gpu:0": "GPU cache", "host": "host memory", "rocksdb": "RocksDB"}


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of some times, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        """Return the quantiles of times in seconds; zeros if there are none."""
        if not len(seconds):
            return cls(0.0, 0.0, 0.0, 0.0)
        quantiles = np.percentile(seconds, [50, 95, 99, 100]) * 1000
        return cls(*(round(float(value), 4) for value in quantiles))

    def __str__(self) -> str:
        return (
            f"{self.p50_ms:.2f} / {self.p95_ms:.2f} / {self.p99_ms:.2f} / "
            f"{self.max_ms:.2f} ms"
        )


@dataclass(frozen=True)
class TierFigures:
    """How one tier was used by all tables during the replay."""

    tier: str
    asked: int
    hits: int
    hit_rate: float
    rows: int
    bytes: int
    evictions: int

    @property
    def title(self) -> str:
        """The tier's name, for people."""
        return _TIER_TITLES.get(self.tier, self.tier)


@dataclass(frozen=True)
class Outcome:
    """Everything that a run measured and checked.

    Parameters
    ----------
    workload
        What was replayed.
    replay
        The requests.
    updates
        The updates that were sent meanwhile.
    stats
        The server's counters at the end of the replay.
    host_budget_bytes
        What the configuration grants the tables in host memory.
    gpu
        Name of the GPU that had a cache; None if there was none.
    checks
        What was checked, by occasion; ``replay`` is the first.
    phases_s
        Seconds that each part of the run took.
    """

    workload: Workload
    replay: ReplayResult
    updates: Sequence[UpdateRecord]
    stats: ServerStats
    host_budget_bytes: int
    gpu: str | None
    checks: dict[str, Tally]
    phases_s: dict[str, float]

    @property
    def total(self) -> Tally:
        """What was checked on all occasions together."""
        total = Tally()
        for tally in self.checks.values():
            total.add(tally)
        return total

    @property
    def path(self) -> str:
        """The tiers that keys went through, for people."""
        titles = [tier.title for tier in self.tiers()]
        if self.gpu is None:
            return f"{' + '.join(titles)}, no GPU"
        cache, *below = titles
        return f"{cache} over {' + '.join(below)} on {self.gpu}"

    @property
    def keys_per_s(self) -> float:
        """Keys per second of lookup time; checking the rows is not counted."""
        return self.replay.n_keys / float(self.replay.latencies_s.sum())

    @property
    def latency(self) -> Quantiles:
        """Quantiles of the time of a request."""
        return Quantiles.of(self.replay.latencies_s.tolist())

    def tiers(self) -> list[TierFigures]:
        """Return the use of each tier, the upper one first."""
        uses = [
            use
            for table in self.workload.tables
            for use in self.stats.table(self.workload.model, table.name).tiers
        ]
        names = list(dict.fromkeys(use.tier for use in uses))
        return [_figures(n, [use for use in uses if use.tier == n]) for n in names]


def _figures(name: str, uses: Sequence[Any]) -> TierFigures:
    asked = sum(use.asked for use in uses)
    hits = sum(use.hits for use in uses)
    return TierFigures(
        tier=name,
        asked=asked,
        hits=hits,
        hit_rate=round(hits / asked, 6) if asked else 0.0,
        rows=sum(use.rows for use in uses),
        bytes=sum(use.bytes for use in uses),
        evictions=sum(use.evictions for use in uses),
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return the figures in the form of the JSON report."""
    replay, total = outcome.replay, outcome.total
    return {
        "hps_numba": __version__,
        "path": outcome.path,
        "machine": _machine() | {"gpu": outcome.gpu},
        "data": _data(outcome.workload),
        "host_budget_bytes": outcome.host_budget_bytes,
        "requests": len(replay.requests),
        "keys": replay.n_keys,
        "lookup_s": round(float(replay.latencies_s.sum()), 6),
        "keys_per_s": round(outcome.keys_per_s),
        "latency": asdict(outcome.latency),
        "tiers": [asdict(tier) for tier in outcome.tiers()],
        "defaults": replay.tally.defaults,
        "updates": _updates(outcome),
        "checks": {name: _check(tally) for name, tally in outcome.checks.items()},
        "rows_checked": total.rows,
        "wrong_rows": total.wrong_rows,
        "examples": total.examples,
        "phases_s": {name: round(s, 3) for name, s in outcome.phases_s.items()},
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _data(workload: Workload) -> dict[str, Any]:
    return {
        "title": workload.title,
        "samples": workload.n_samples,
        "batch": workload.batch,
        "trained_samples": workload.cut_off,
        "tables": [
            {
                "name": table.name,
                "dim": table.dim,
                "keys_per_sample": table.positions.shape[1],
                "ids": len(table.ids),
                "trained_ids": int(table.trained.sum()),
                "model_bytes": table.model_bytes,
            }
            for table in workload.tables
        ],
    }


def _updates(outcome: Outcome) -> dict[str, Any]:
    updates = outcome.updates
    return {
        "calls": len(updates),
        "rows": sum(update.n_rows for update in updates),
        "distinct_rows": sum(update.n_rows for update in updates) // ROUNDS,
        "acknowledged": asdict(Quantiles.of([u.acknowledged_s for u in updates])),
        "staleness": asdict(Quantiles.of([u.visible_s for u in updates])),
    }


def _check(tally: Tally) -> dict[str, Any]:
    return {
        "rows": tally.rows,
        "defaults": tally.defaults,
        "early_rows": tally.early,
        "wrong_rows": tally.wrong_rows,
        "wrong_by_kind": dict(tally.wrong),
    }


def summary(outcome: Outcome, output: Path) -> Table:
    """Return the table that the demo prints."""
    table = Table(title=f"hps-numba demo: {outcome.path}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("what it counts", style="dim")
    for row in _lines(outcome):
        table.add_row(*row)
    table.caption = f"files: {output}"
    table.caption_justify = "left"
    return table


def _lines(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    yield from _request_lines(outcome)
    for tier in outcome.tiers():
        yield _tier_line(tier, outcome)
    keys = outcome.replay.n_keys
    defaults = outcome.replay.tally.defaults
    yield (
        "default rows",
        f"{defaults / keys:.2%}",
        f"{defaults:,} keys first seen after the model was trained, found=False",
    )
    yield from _update_lines(outcome)
    yield from _check_lines(outcome)


def _request_lines(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    workload, replay = outcome.workload, outcome.replay
    n_ids = sum(len(table.ids) for table in workload.tables)
    names = [table.name for table in workload.tables]
    yield (
        "requests",
        f"{len(replay.requests):,}",
        f"{workload.n_samples:,} samples in the order of time, {workload.batch:,} each",
    )
    yield (
        "keys",
        f"{replay.n_keys:,}",
        f"of {n_ids:,} ids in table {' and '.join(names)}; {workload.title}",
    )
    yield (
        "keys per second",
        f"{outcome.keys_per_s:,.0f}",
        f"one reader; {replay.latencies_s.sum():.2f} s in lookups",
    )
    yield ("request p50 / p95 / p99 / max", str(outcome.latency), "all tables at once")


def _tier_line(tier: TierFigures, outcome: Outcome) -> tuple[str, str, str]:
    detail = f"{tier.hits:,} of {tier.asked:,} keys asked"
    if tier.tier.startswith("gpu"):
        detail += (
            f"; {tier.rows:,} rows in {_mib(tier.bytes)}; {tier.evictions:,} evictions"
        )
    elif tier.tier == "host":
        if outcome.gpu is not None:
            detail += ", each once per request"
        share = outcome.host_budget_bytes / outcome.workload.model_bytes
        budget = f"{_mib(outcome.host_budget_bytes)}, {share:.0%} of the rows' bytes"
        detail += f"; budget {budget}; {tier.evictions:,} evictions"
    else:
        detail += ", each once per request"
    return (f"{tier.title} hit rate", f"{tier.hit_rate:.2%}", detail)


def _update_lines(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    updates = _updates(outcome)
    yield (
        "updates applied",
        f"{updates['rows']:,} rows",
        f"{updates['calls']} calls; {updates['distinct_rows']:,} rows, "
        f"{ROUNDS} new versions each",
    )
    yield (
        "update() p50 / p95 / p99 / max",
        str(Quantiles(**updates["acknowledged"])),
        "from the call to its return, which acknowledges it",
    )
    yield (
        "staleness p50 / p95 / p99 / max",
        str(Quantiles(**updates["staleness"])),
        "from the call to the end of the first lookup that returned the new rows",
    )


def _check_lines(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    total = outcome.total
    occasions = ", ".join(f"{t.rows:,} {name}" for name, t in outcome.checks.items())
    yield ("rows checked", f"{total.rows:,}", f"bit for bit: {occasions}")
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in total.wrong.most_common())
    style = "bold red" if total.wrong_rows else "bold green"
    yield (
        "wrong rows",
        f"[{style}]{total.wrong_rows:,}[/]",
        kinds or "each row was whole, of its key, and never older than acknowledged",
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
