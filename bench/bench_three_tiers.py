"""Three tiers in a pipeline: what a lookup takes against its slowest tier alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import product
from time import perf_counter

import numpy as np

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Result
from bench.redis_setups import meter, redis_tier
from bench.setups import blocks, shuffled_keys, spec, warm
from bench.workloads import Sampler, table_rows, uniform
from hps_numba.config.enums import RedisLayout
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import BUFFERS, Pipeline
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import FailureMode, Keys, Rows, TableSpec
from tests.support.redis_servers import RedisServer

PIPELINE = "pipeline of three tiers"
SLOWEST = "slowest tier alone"
IN_TURN = "one tier after the other"


def three_tiers(run: Run) -> Iterator[Result]:
    """Compare a lookup with its tiers, each asked alone for the same kind of keys."""
    sizes = run.sizes
    for dim, layout, shares in product(
        sizes.dims, RedisLayout, sizes.three_tiers_shares
    ):
        sampler = uniform(sizes.n_rows, seed=SEED)
        with _tiers(run, dim, layout, shares) as (tiers, server):
            work = _Work(run, spec(dim), tiers, shares)
            with ThreadPoolExecutor(BUFFERS) as workers:
                setups = {
                    PIPELINE: work.together(sampler, Pipeline(workers)),
                    SLOWEST: work.alone(sampler, max),
                    IN_TURN: work.alone(sampler, sum),
                }
                floor = defaults.THREE_TIERS_OVER_SLOWEST.get(shares)
                n_keys = sizes.three_tiers_keys
                yield from compare(
                    run,
                    "three_tiers",
                    [Variant(name, s, n_keys) for name, s in setups.items()],
                    params={
                        "dim": dim,
                        "layout": layout.value,
                        "n_rows": sizes.n_rows,
                        "batch": n_keys,
                        "chunk": sizes.three_tiers_chunk,
                        "in host memory": shares[0],
                        "in Redis": shares[1],
                    },
                    claims=[
                        Claim(PIPELINE, SLOWEST, floor, "at_most"),
                        Claim(PIPELINE, IN_TURN),
                    ],
                    meter=meter([server.pid]),
                )


@contextmanager
def _tiers(
    run: Run, dim: int, layout: RedisLayout, shares: tuple[float, float]
) -> Iterator[tuple[Sequence[Tier], RedisServer]]:
    """Fill three tiers; each holds what the one above it holds, and more.

    Nothing is backfilled, so which rows are where does not change.
    """
    sizes, table = run.sizes, spec(dim)
    path = run.scratch / f"three-tiers-{dim}-{layout.value}-{shares[0]}"
    with RedisServer() as server, ExitStack() as stack:
        tiers: list[Tier] = [
            HostTier(),
            redis_tier(server.address, layout, sizes.redis_partitions),
            RocksDBTier(str(path), cache_bytes=sizes.cached_bytes),
        ]
        keys = shuffled_keys(sizes.n_rows)
        for tier, share in zip(tiers, (*shares, 1.0), strict=True):
            stack.enter_context(closing(tier))
            tier.open_table(table)
            tier.load(table.tag, blocks(keys[: round(sizes.n_rows * share)], table))
        warm(tiers[-1], table, sizes.n_rows)
        yield tiers, server


class _Work:
    """Lookups through all tiers, and the share of each tier in them."""

    def __init__(
        self,
        run: Run,
        table: TableSpec,
        tiers: Sequence[Tier],
        shares: tuple[float, float],
    ) -> None:
        sizes = run.sizes
        self._n_keys, self._chunk_keys = sizes.three_tiers_keys, sizes.three_tiers_chunk
        self._table, self._tiers = table, tiers
        self._hierarchy = Hierarchy(
            table,
            tiers,
            backfills=None,
            on_failure=FailureMode.RAISE,
            write_rows=self._chunk_keys,
        )
        # Where a key was when the tiers were filled tells who has it; asking them
        # would leave the rows in the CPU's caches.
        self._rank = np.empty(sizes.n_rows, np.int64)
        self._rank[shuffled_keys(sizes.n_rows)] = np.arange(sizes.n_rows)
        self._held = [round(sizes.n_rows * share) for share in shares]

    def together(self, sampler: Sampler, pipeline: Pipeline) -> Setup:
        """Time the pipeline; its answers are checked once, here."""
        out = self._rows(self._n_keys)
        chunks = self._chunks(sampler(self._n_keys), out)
        pipeline.run([(self._hierarchy, chunk) for chunk in chunks])
        for chunk in chunks:
            assert chunk.done, "keys were not found"
            np.testing.assert_array_equal(
                chunk.out, table_rows(chunk.keys, self._table.dim)
            )

        def setup() -> Call:
            chunks = self._chunks(sampler(self._n_keys), out)
            work = [(self._hierarchy, chunk) for chunk in chunks]
            return lambda: pipeline.run(work)

        return setup

    def alone(self, sampler: Sampler, fold: Callable[[list[float]], float]) -> Setup:
        """Time each tier by itself and fold their seconds into one number."""
        outs = [self._rows(self._n_keys) for _ in self._tiers]

        def setup() -> Call:
            step, drawn = self._chunk_keys, sampler(self._n_keys)
            starts = range(0, drawn.size, step)
            parts = [self._shares(drawn[low : low + step]) for low in starts]
            work = [
                self._chunks(np.concatenate(share), out, [keys.size for keys in share])
                for share, out in zip(zip(*parts, strict=True), outs, strict=True)
            ]

            def call() -> float:
                seconds = [
                    self._ask(tier, chunks)
                    for tier, chunks in zip(self._tiers, work, strict=True)
                ]
                assert all(c.found.all() for c in work[-1]), "keys were not found"
                return fold(seconds)

            return call

        return setup

    def _shares(self, keys: Keys) -> list[Keys]:
        """Return the keys that each tier is asked for, in the pipeline's order."""
        left = np.unique(keys[self._rank[keys] >= self._held[0]])
        order = self._tiers[1].arrange(self._table.tag, left)
        if order is not None:
            left = left[order]
        return [keys, left, left[self._rank[left] >= self._held[1]]]

    def _ask(self, tier: Tier, chunks: Sequence[Chunk]) -> float:
        begin_s = perf_counter()
        for chunk in chunks:
            tier.fetch(self._table.tag, chunk.keys, chunk.out, chunk.found)
        return perf_counter() - begin_s

    def _chunks(
        self, keys: Keys, out: Rows, sizes: Sequence[int] | None = None
    ) -> list[Chunk]:
        """Cut keys, and the memory for their rows, into chunks."""
        ends = np.cumsum(sizes) if sizes else np.arange(0, keys.size, self._chunk_keys)
        found = np.zeros(keys.size, np.bool_)
        parts = zip(
            *(np.split(a, ends) for a in (keys, out[: keys.size], found)), strict=True
        )
        return [Chunk(*part) for part in parts if part[0].size]

    def _rows(self, n: int) -> Rows:
        """Return memory for rows that the system has given already."""
        return np.ones((n, self._table.dim), self._table.numpy_dtype)


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (three_tiers,)
