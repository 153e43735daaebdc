"""What the kernels' tests on the CPU amount to: rates, races and planted bugs.

``python -m tests.kernels.cuda.figures`` runs a fixed workload and prints a JSON line
for each figure, ``what`` and its ``value``, all of them counted; ``--json PATH`` writes
the lines as well. ``--part`` chooses ``rates``, ``races`` or ``bugs``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hps_numba.kernels.cuda.layout import Policy, RowLayout
from tests.kernels.cuda.checked import FIGURES, CheckedCache
from tests.kernels.cuda.mutants import N_PROCESSES, all_mutants, judge_all
from tests.kernels.cuda.pooled_races import pooled_race
from tests.kernels.cuda.race_scenarios import (
    MEMORIES,
    backfill_race,
    counting_race,
    dump_race,
    duplicate_race,
    mixed_races,
    update_race,
)
from tests.kernels.cuda.races import MAX_STEPS, Reads
from tests.kernels.cuda.sequences import TABLES, RandomOperations
from tests.kernels.cuda.static_races import both_sets_race, crowd_race
from tests.kernels.cuda.weak_mutants import WEAK_MUTANTS, verdict_of

Line = dict[str, Any]
N_KEYS = 20_000  # that each kernel has at least
N_SEEDS = 8  # of each race and schedule
ROWS = (
    (RowLayout(32), Policy.LRU),
    (RowLayout(128, "float16"), Policy.LRU),
    (RowLayout(7, "bfloat16", "bfloat16"), Policy.STATIC),
)
RACES: dict[str, Callable[..., Any]] = {
    "readers, writers, backfills and a dump": lambda seed, **schedule: mixed_races(
        seed, 4, **schedule
    ),
    "readers and updates": update_race,
    "old backfills and an update": lambda seed, **schedule: backfill_race(
        seed, "update", **schedule
    ),
    "old backfills and an eviction": lambda seed, **schedule: backfill_race(
        seed, "evict", **schedule
    ),
    "old backfills and a clear": lambda seed, **schedule: backfill_race(
        seed, "clear", **schedule
    ),
    "two inserts of the same keys": duplicate_race,
    "dumps and a writer": dump_race,
    "unique counts and inserts": counting_race,
    "sums and updates": lambda seed, **schedule: pooled_race(
        seed, dim=12, writer="update", **schedule
    ),
    "static: readers, writers, backfills and a dump": lambda seed, **schedule: (
        mixed_races(seed, 4, policy=Policy.STATIC, **schedule)
    ),
    "static: readers and updates": lambda seed, **schedule: update_race(
        seed, policy=Policy.STATIC, **schedule
    ),
    "static: old backfills and an update": lambda seed, **schedule: backfill_race(
        seed, "update", policy=Policy.STATIC, **schedule
    ),
    "static: two inserts of the same keys": lambda seed, **schedule: duplicate_race(
        seed, policy=Policy.STATIC, **schedule
    ),
    "static: warps that want each other's sets": crowd_race,
    "static: dumps and keys that come back": both_sets_race,
}


def figure(what: str, value: int, **details: Any) -> Line:
    """Return one figure, and what it is made of."""
    return {"what": what, "value": value, **details}


def rates() -> Iterator[Line]:
    """Yield keys per second of CPU time, each launch beside the oracle."""
    for rows, policy in ROWS:
        FIGURES.clear()
        cache = CheckedCache(rows, TABLES, policy, max_steps=MAX_STEPS)
        RandomOperations(cache, 1).run(N_KEYS)
        for (kernel, _), (n_keys, cpu_s) in sorted(FIGURES.items()):
            yield figure(
                f"keys/s of {kernel}, {rows.stored} to {rows.out}, dim {rows.dim}",
                round(n_keys / cpu_s),
                keys=int(n_keys),
                cpu_s=round(cpu_s, 4),
            )


def races() -> Iterator[Line]:
    """Yield how many races there were, how many were lost, and what readers saw."""
    for memory, schedules in MEMORIES.items():
        n_races, lost = Counter[str](), Counter[str]()
        reads: dict[str, Reads] = {name: Reads() for name in RACES}
        for name, race in RACES.items():
            for seed in range(N_SEEDS):
                for schedule in schedules:
                    n_races[name] += 1
                    try:
                        found = race(seed, **schedule)
                    except AssertionError:
                        lost[name] += 1
                        continue
                    if isinstance(found, Reads):
                        reads[name] += found
        hits = {name: one.n_hits for name, one in reads.items() if one.n_hits}
        # Of keys that are there all the time.
        handed_on = sum(reads[name].n_misses for name in RACES if "updates" in name)
        yield figure(f"races, {memory}", n_races.total(), of=dict(n_races))
        yield figure(f"races lost, {memory}", lost.total(), of=dict(lost), bad=True)
        yield figure(f"racing reads, {memory}", sum(hits.values()), of=hits)
        yield figure(f"racing reads handed on as misses, {memory}", handed_on)


def bugs() -> Iterator[Line]:
    """Yield how many bugs were planted and how many were caught."""
    verdicts = [(one.mutant, one.error) for one in judge_all(all_mutants())]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(N_PROCESSES, mp_context=context) as pool:
        weak = list(pool.map(verdict_of, WEAK_MUTANTS))
    orderings = [(m.name, error) for m, error in zip(WEAK_MUTANTS, weak, strict=True)]
    for kind, found in (
        ("planted bugs", verdicts),
        ("orderings left out", orderings),
    ):
        survivors = [name for name, error in found if not error]
        yield figure(kind, len(found))
        yield figure(f"{kind}, not caught", len(survivors), of=survivors, bad=True)


PARTS: dict[str, Callable[[], Iterator[Line]]] = {
    "rates": rates,
    "races": races,
    "bugs": bugs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; return how many races were lost and bugs not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.cuda.figures")
    parser.add_argument("--json", type=Path, help="also write the lines here")
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    options = parser.parse_args(arguments)
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    lines, n_bad = [], 0
    for part in options.part or PARTS:
        for line in PARTS[part]():
            n_bad += line["value"] if line.pop("bad", False) else 0
            lines.append(json.dumps({**line, **machine}))
            print(lines[-1], flush=True)  # noqa: T201 (a command)
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")
    return n_bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
