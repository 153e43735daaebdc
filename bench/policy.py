"""Which rows should the GPU cache keep? Hit rates of its rules, simulated.

``python -m bench.policy [--trace FILE]...`` writes ``bench/results/policy.jsonl``.
Nothing is timed: the figures are counts, and equal on every machine. A trace is a file
of big-endian 32-bit keys in the order of their lookups, plain or ``.xz``.

Every figure is of the batches after the first half, except those of traces, which begin
with an empty cache as published hit rates of traces do.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.defaults import SEED
from bench.policy_sim import (
    EXACT_LRU,
    LFU,
    LOWEST_WAY,
    LRU,
    NO_AGEING,
    STATIC,
    SUBTRACT,
    WAYS,
    Counts,
    Rules,
    Stream,
    new_sets,
    replay,
    replay_whole_lru,
    stream_of,
)
from bench.records import Origin, Param, Result, counted, origin, write
from bench.workloads import ZIPF_EXPONENT, Sampler, zipf
from hps_numba.types import Keys

RESULTS = Path(__file__).parent / "results" / "policy.jsonl"

WHOLE_LRU = "exact LRU, whole cache"
IDEAL_STATIC = "ideal static"


@dataclass(frozen=True)
class Sizes:
    """How many keys tables have, and how many are looked up."""

    n_rows: int = 1_000_000
    n_lookups: int = 6_000_000
    shares: tuple[float, ...] = (0.01, 0.066, 0.2)  # of the table, in the cache
    batches: tuple[int, ...] = (4_096, 65_536)
    drift_keys: int = 1 << 20  # lookups between two changes of what is popular
    fill: int = 280_000


FULL = Sizes()
SMOKE = Sizes(
    n_rows=2_000,
    n_lookups=8_192,
    shares=(0.066,),
    batches=(1_024,),
    drift_keys=2_048,
    fill=2_800,
)

TRACE_SHARES = (0.01, 0.1, 0.2)  # of the distinct keys
LONG_TRACE, LONG_TRACE_BATCHES, SHORT_TRACE_BATCHES = 1_000_000, (1_024, 16_384), (256,)


@dataclass(frozen=True)
class Case:
    """One sequence of lookups against one size of cache."""

    keys: str
    stream: Stream
    capacity: int
    batch: int
    warm: int

    @property
    def params(self) -> dict[str, Param]:
        """What results say of the case."""
        return {"keys": self.keys, "capacity": self.capacity, "batch": self.batch}


def tick_of(capacity: int) -> int:
    """Return the keys of an epoch: a power of two in (capacity / 8, capacity / 4]."""
    return 1 << max(0, capacity.bit_length() - 3)


def door_of(capacity: int, times: int) -> int:
    """Return ``times`` the next power of two from the capacity on."""
    return times << (capacity - 1).bit_length()


def chosen_lru(capacity: int) -> Rules:
    """Return the rules of the GPU cache's LRU."""
    return Rules(score=LRU, tick=tick_of(capacity))


def chosen_lfu(capacity: int) -> Rules:
    """Return the rules of the GPU cache's LFU."""
    return Rules(score=LFU, tick=tick_of(capacity))


def _lru(**changes: int) -> Callable[[int], Rules]:
    return lambda capacity: chosen_lru(capacity)._replace(**changes)


def _lfu(**changes: int) -> Callable[[int], Rules]:
    return lambda capacity: chosen_lfu(capacity)._replace(**changes)


def _ticking(divisor: int) -> Callable[[int], Rules]:
    return lambda c: chosen_lru(c)._replace(tick=max(1, tick_of(c) * 4 // divisor))


def _with_door(rules: Callable[[int], Rules], times: int) -> Callable[[int], Rules]:
    return lambda c: rules(c)._replace(door=door_of(c, times))


CHOSEN: dict[str, Callable[[int], Rules]] = {
    "LRU": chosen_lru,
    "LRU, door x4": _with_door(chosen_lru, 4),
    "LFU": chosen_lfu,
    "LFU, door x4": _with_door(chosen_lfu, 4),
}

ALTERNATIVES: dict[str, Callable[[int], Rules]] = {
    "LRU, clock moves after the lookup, new rows of age 0": _lru(early=0, aged=0),
    "LRU, clock moves by all keys": _lru(capped=0),
    "LRU, clock moves by all keys, tick C/32": lambda c: _ticking(32)(c)._replace(
        capped=0
    ),
    "LRU, new rows of age 0": _lru(aged=0),
    "LRU, new rows of age 1": _lru(aged=1),
    "LRU, new rows of age 4": _lru(aged=4),
    "LRU, new rows of age 8": _lru(aged=8),
    "LRU, tick C/8": _ticking(8),
    "LRU, tick C/32": _ticking(32),
    "LRU, lowest way": _lru(tie=LOWEST_WAY),
    "LRU, ages up to 63": _lru(clamp=63),
    "LRU, door x1": _with_door(chosen_lru, 1),
    "LRU, door x8": _with_door(chosen_lru, 8),
    "LFU, log shift 2": _lfu(log_shift=2),
    "LFU, log shift 4": _lfu(log_shift=4),
    "LFU, new rows count 0": _lfu(start=0),
    "LFU, halved after 28 writes": _lfu(period=WAYS),
    "LFU, never halved": _lfu(ageing=NO_AGEING),
    "LFU, least subtracted": _lfu(ageing=SUBTRACT, start=0),
    "LFU, lowest way": _lfu(tie=LOWEST_WAY),
    "LFU, duplicates count once": _lfu(once=1),
    "first come, none leaves": lambda _: Rules(score=STATIC),
}

EXACT_WAYS = (8, 16, WAYS)


def drifting(n_rows: int, *, seed: int, every: int) -> Sampler:
    """Draw by Zipf's law; after ``every`` keys, half of the hottest tenth is replaced.

    Keys that were colder than that tenth take the places of the others.
    """
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, n_rows + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    key_of_rank = rng.permutation(n_rows).astype(np.int64, copy=False)
    hottest = n_rows // 10

    def sample(n: int) -> Keys:
        out = np.empty(n, np.int64)
        for start in range(0, n, every):
            part = out[start : start + every]
            drawn = rng.random(part.size) * cumulative[-1]
            ranks = np.searchsorted(cumulative, drawn, side="right")
            part[:] = key_of_rank[np.minimum(ranks, n_rows - 1)]
            falling = rng.choice(hottest, hottest // 2, replace=False)
            rising = rng.choice(n_rows - hottest, hottest // 2, replace=False) + hottest
            key_of_rank[falling], key_of_rank[rising] = (
                key_of_rank[rising],
                key_of_rank[falling],
            )
        return out

    return sample


def scanned(n_rows: int, *, seed: int) -> Sampler:
    """Draw by Zipf's law, but let a fifth of the keys be a scan of another table."""
    sampler, rng = zipf(n_rows, seed=seed), np.random.default_rng(seed)

    def sample(n: int) -> Keys:
        keys = sampler(n)
        scan = rng.random(n) < 0.2
        keys[scan] = n_rows + np.arange(np.count_nonzero(scan)) % n_rows
        return keys

    return sample


def drawn_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the cases that are drawn at random."""
    n, every = sizes.n_rows, sizes.drift_keys
    middle = sizes.shares[len(sizes.shares) // 2 :][:1]
    samplers = {
        "zipf 0.9": (zipf(n, seed=SEED, exponent=0.9), sizes.shares),
        "zipf 1.05": (zipf(n, seed=SEED, exponent=1.05), sizes.shares),
        "zipf 1.2": (zipf(n, seed=SEED, exponent=1.2), sizes.shares),
        "zipf 1.05, drifting": (drifting(n, seed=SEED, every=every), middle),
        "zipf 1.05, a fifth scanned": (scanned(n, seed=SEED), middle),
    }
    for name, (sampler, shares) in samplers.items():
        stream = stream_of(sampler(sizes.n_lookups))
        for share in shares:
            # Batches larger than the smallest cache are not what it is made for.
            fitting = [b for b in sizes.batches if b <= share * n] or sizes.batches[:1]
            for batch in fitting:
                warm = sizes.n_lookups // batch // 2
                yield Case(name, stream, int(share * n), batch, warm)


def read_trace(path: Path) -> Keys:
    """Return the keys of a trace."""
    raw = path.read_bytes()
    if path.suffix == ".xz":
        raw = lzma.decompress(raw)
    return np.frombuffer(raw, ">u4").astype(np.int64)


def trace_cases(path: Path) -> Iterator[Case]:
    """Yield the cases of a trace; the name of its file is theirs."""
    stream = stream_of(read_trace(path))
    long = stream.numbers.size >= LONG_TRACE
    shares = (max(WAYS, int(s * stream.hashes.size)) for s in TRACE_SHARES)
    for capacity in dict.fromkeys(shares):
        for batch in LONG_TRACE_BATCHES if long else SHORT_TRACE_BATCHES:
            yield Case(path.name.partition(".")[0], stream, capacity, batch, 0)


def simulate(case: Case) -> dict[str, Counts]:
    """Simulate all rules on a case, exact LRU over the whole cache first."""
    at = {"batch": case.batch, "warm": case.warm}
    found = {WHOLE_LRU: replay_whole_lru(case.stream, case.capacity, **at)}
    for ways in EXACT_WAYS:
        rules = Rules(score=EXACT_LRU)
        sets = new_sets(case.capacity, rules, ways)
        found[f"exact LRU, {ways} ways"] = replay(case.stream, sets, rules, **at)
    for name, rules_of in (CHOSEN | ALTERNATIVES).items():
        rules = rules_of(case.capacity)
        found[name] = replay(case.stream, new_sets(case.capacity, rules), rules, **at)
    return found


def rates(case: Case, counts: dict[str, Counts], where: Origin) -> Iterator[Result]:
    """Yield the rates of a case: of exact LRU, of the chosen rules, of the ideal."""
    for variant in (WHOLE_LRU, *CHOSEN):
        found = counts[variant]
        for name, unit, rate in (
            ("policy_hits", "a key", found.hits / found.keys),
            ("policy_unique_hits", "a unique key", found.unique_hits / found.unique),
            ("policy_inserts", "a key", found.inserts / found.keys),
            ("policy_stamps", "a key", found.stamps / found.keys),
        ):
            yield _rounded(name, variant, rate, unit, case.params, where)
    ideal = ideal_static(case)
    yield _rounded("policy_hits", IDEAL_STATIC, ideal, "a key", case.params, where)


def points(found: Sequence[dict[str, Counts]], of: str, where: Origin) -> list[Result]:
    """Return every rule's hits against exact LRU: the median of cases and the worst."""
    results = []
    for variant in found[0]:
        more = [
            100 * (c[variant].hits - c[WHOLE_LRU].hits) / c[WHOLE_LRU].keys
            for c in found
        ]
        for figure, value in (("median", np.median(more)), ("worst", np.min(more))):
            params: dict[str, Param] = {"of": of, "cases": len(found), "figure": figure}
            unit = "points against exact LRU"
            results.append(
                _rounded("policy_points", variant, float(value), unit, params, where)
            )
    return results


def ideal_static(case: Case) -> float:
    """Return the hit rate of the keys that are looked up most, known beforehand."""
    whole_batches = case.stream.numbers.size // case.batch * case.batch
    measured = case.stream.numbers[case.warm * case.batch : whole_batches]
    times = np.sort(np.bincount(measured))[::-1]
    return float(times[: case.capacity].sum() / measured.size)


def held_share(capacity: int, slots: int) -> float:
    """Return how many of ``capacity`` random keys a cache of ``slots`` slots holds."""
    keys = np.random.default_rng(SEED).integers(0, 1 << 62, capacity)
    rules = Rules(score=STATIC)
    sets = new_sets(slots, rules)
    replay(stream_of(keys), sets, rules, batch=capacity)
    return float(np.count_nonzero(sets.keys >= 0) / capacity)


def fill(sizes: Sizes, where: Origin) -> Iterator[Result]:
    """Yield what caches hold of as many keys as they are said to hold."""
    for slots_per_key in (1.0, 1.05, 1.1):
        share = held_share(sizes.fill, round(sizes.fill * slots_per_key))
        params: dict[str, Param] = {"keys": sizes.fill, "slots per key": slots_per_key}
        yield counted(
            "policy_fill",
            f"{WAYS} ways",
            share,
            unit="share",
            params=params,
            where=where,
        )


def _rounded(
    name: str,
    variant: str,
    value: float,
    unit: str,
    params: dict[str, Param],
    where: Origin,
) -> Result:
    value = round(value, 5)
    return counted(name, variant, value, unit=unit, params=params, where=where)


def main(
    trace: Annotated[
        list[Path] | None, typer.Option(help="A file of keys; may be repeated.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run tiny.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File of the results [bench/results].")
    ] = None,
) -> None:
    """Simulate every rule on every case and write the results as JSON lines."""
    sizes, where = (SMOKE if smoke else FULL), origin("smoke" if smoke else "full")
    path = out or (Path(os.devnull) if smoke else RESULTS)
    if path.is_file():
        path.unlink()
    for result in fill(sizes, where):
        write(path, result)
    groups = {"drawn": [drawn_cases(sizes)], "traces": map(trace_cases, trace or [])}
    for of, cases in groups.items():
        found = []
        for case in chain.from_iterable(cases):
            found.append(simulate(case))
            for result in rates(case, found[-1], where):
                write(path, result)
            print(_line(case, found[-1]), flush=True)
        for result in points(found, of, where) if found else []:
            write(path, result)


def _line(case: Case, counts: dict[str, Counts]) -> str:
    hits = {name: found.hits / found.keys for name, found in counts.items()}
    lead = "  ".join(f"{n} {100 * (hits[n] - hits[WHOLE_LRU]):+.2f}" for n in CHOSEN)
    params = " ".join(f"{k}={v}" for k, v in case.params.items())
    return f"{params} | {WHOLE_LRU} {hits[WHOLE_LRU]:.4f} | {lead}"


if __name__ == "__main__":
    typer.run(main)
