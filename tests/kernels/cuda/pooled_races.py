"""Pooled queries beside writers: each sum is one of whole rows that existed.

Eight keys of a bag have weights 1, 8, 64, ... and their rows digits of base 8, so that
a sum says which row each of them added: 0 for none, one of six that tell the version
and whether the key's number is odd, or 7 for the default row. The bag's other keys
weigh nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.layout import NO_POSITION, Policy, RowLayout, TableLayout
from tests.kernels.cuda.harness import Answer, Array, CpuCache
from tests.kernels.cuda.races import numbered_keys

N_DIGITS, BASE, N_VERSIONS = 8, 8, 3
DEFAULT_DIGIT = 7
LENGTHS = (8, 9, 31, 32, 33, 64, 70, 100)


def digits_of(numbers: Array, versions: Array) -> Array:
    """Return what each value of the rows is."""
    return 1 + 3 * (numbers % 2) + versions


@dataclass
class Bagged:
    """Bags of keys: numbers, where bags begin, weights, and where digits stand."""

    numbers: Array
    begins: Array
    weights: Array
    weighted: Array  # (n_bags, 8): position of each digit's key


def draw_bags(rng: np.random.Generator, n_keys: int) -> Bagged:
    """Return bags of several lengths, keys without duplicates inside a bag."""
    begins = np.cumsum([0, *LENGTHS])
    numbers = np.concatenate(
        [rng.choice(n_keys, length, replace=False) for length in LENGTHS]
    )
    weights = np.zeros(len(numbers), np.float32)
    weighted = np.stack(
        [
            begin + np.sort(rng.choice(length, N_DIGITS, replace=False))
            for begin, length in zip(begins, LENGTHS, strict=False)
        ]
    )
    weights[weighted] = float(BASE) ** np.arange(N_DIGITS)
    return Bagged(numbers, begins, weights, weighted)


def misses_of(answer: Answer) -> Array:
    """Return of each position whether its key missed."""
    start = answer.work.layout.missing
    n_keys = answer.starts[-1]
    noted = answer.block[start : start + 8 * n_keys].view(np.uint32).reshape(-1, 2)
    missed: Array = noted[:, 1] != NO_POSITION
    return missed


def check_sums(
    out: Array, bags: Bagged, missed: Array, newest: Array, *, of_misses: int
) -> None:
    """Fail if a sum is not one of whole rows, and of this digit for misses."""
    assert (out == out[:, :1]).all(), "a sum of torn rows"
    sums = out[:, 0].astype(np.int64)
    digits = sums[:, None] // BASE ** np.arange(N_DIGITS) % BASE
    numbers = bags.numbers[bags.weighted]
    gone = missed[bags.weighted]
    assert (digits[gone] == of_misses).all(), "a miss was summed as something else"
    digits, numbers = digits[~gone], numbers[~gone]
    versions = digits - digits_of(numbers, np.zeros_like(numbers))
    assert (versions >= 0).all(), "no row, or another key's"
    assert (versions <= newest[numbers]).all(), "another key's row"


def pooled_race(
    seed: int,
    *,
    dim: int,
    writer: str,
    policy: Policy = Policy.LRU,
    **schedule: Any,
) -> int:
    """Race pooled queries with a writer; return how many keys missed."""
    rng = np.random.default_rng(seed)
    n_keys = 100
    keys = numbered_keys(n_keys, seed)
    n_sets = 4 if policy == Policy.STATIC else 6  # nearly full, so that all are used
    table = TableLayout(n_sets, n_stamps=64, tick_shift=5)
    cache = CpuCache(RowLayout(dim), [table], policy)
    versions = np.zeros(n_keys, np.int64)

    def rows(numbers: Array) -> Array:
        values = digits_of(numbers, versions[numbers]).astype(np.float32)
        return np.repeat(values[:, None], dim, 1)

    cache.set_default(0, np.full(dim, DEFAULT_DIGIT))
    cache.insert(keys, rows(np.arange(n_keys)))
    asked = []
    fill = seed % 3 == 0
    with cache.launcher.together(seed, **schedule):
        for reader in range(2):
            for _ in range(2):
                bags = draw_bags(rng, n_keys)
                pooled = cache.pooled_query(
                    keys[bags.numbers],
                    bags.begins,
                    weights=bags.weights,
                    fill=fill,
                    stream=f"reader {reader}",
                )
                asked.append((bags, pooled))
        for epoch in range(1, N_VERSIONS):
            changed = rng.choice(n_keys, 8, replace=False)
            if writer == "evict":
                cache.evict(keys[changed], epoch=epoch, stream="writer")
            else:
                versions[changed] += 1
                new = rows(changed)
                cache.update(keys[changed], new, epoch=epoch, stream="writer")
    n_missed = 0
    for bags, pooled in asked:
        answer = pooled[0]
        missed = misses_of(answer)
        n_missed += int(missed.sum())
        assert answer.results()[0] == missed.sum()
        of_misses = DEFAULT_DIGIT if fill else 0
        check_sums(answer.out, bags, missed, versions, of_misses=of_misses)
        if not fill:
            number_of = {int(key): i for i, key in enumerate(keys)}
            fetched = [number_of[int(key)] for key in answer.unique()]
            cache.pooled_scatter(pooled, 0, rows(np.array(fetched, np.int64)))
            none = np.zeros_like(missed)
            check_sums(answer.out, bags, none, versions, of_misses=0)
    return n_missed
