"""The pipeline over two tiers: what a lookup takes against its slowest stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Result
from bench.servers import Served, looking_up, two_tier_server
from bench.setups import spec, warm
from bench.workloads import Sampler, uniform
from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.types import FailureMode

LOOKUP = "HPS.lookup"
SLOWEST = "slowest stage alone"
IN_TURN = "one stage after the other"


def pipeline(run: Run) -> Iterator[Result]:
    """Compare a lookup with its stages, each run alone over the same kind of keys."""
    sizes = run.sizes
    n_keys, n_rows = sizes.pipeline_keys, sizes.n_rows
    for dim in sizes.dims:
        for share in sizes.pipeline_shares:
            table, sampler = spec(dim), uniform(n_rows, seed=SEED)
            with two_tier_server(
                table,
                run.scratch / f"pipeline-{dim}-{share}",
                n_rows=n_rows,
                host_rows=round(n_rows * share),
                chunk_keys=sizes.pipeline_chunk,
                cache_bytes=sizes.cached_bytes,
            ) as served:
                warm(served.tiers["rocksdb"], table, n_rows)
                stages = _Stages(served, sizes.pipeline_chunk)
                setups = {
                    LOOKUP: looking_up(served, sampler, n_keys),
                    SLOWEST: stages.setup(sampler, n_keys, max),
                    IN_TURN: stages.setup(sampler, n_keys, sum),
                }
                floor = defaults.PIPELINE_OVER_SLOWEST_STAGE
                yield from compare(
                    run,
                    "pipeline",
                    [Variant(name, setup, n_keys) for name, setup in setups.items()],
                    params={
                        "dim": dim,
                        "n_rows": n_rows,
                        "batch": n_keys,
                        "chunk": sizes.pipeline_chunk,
                        "in host memory": share,
                    },
                    claims=[
                        Claim(LOOKUP, SLOWEST, floor, "at_most"),
                        Claim(LOOKUP, IN_TURN),
                    ],
                )


class _Stages:
    """Runs each stage over all chunks by itself, as the pipeline would."""

    def __init__(self, served: Served, chunk_keys: int) -> None:
        self._table = served.table
        self._chunk_keys = chunk_keys
        self._hierarchy = Hierarchy(
            served.table,
            [served.tiers["host"], served.tiers["rocksdb"]],
            backfills=None,
            on_failure=FailureMode.RAISE,
            write_rows=chunk_keys,
        )

    def setup(
        self, sampler: Sampler, n_keys: int, fold: Callable[[list[float]], float]
    ) -> Setup:
        """Time both stages and fold their seconds into one number."""
        out = np.empty((n_keys, self._table.dim), self._table.numpy_dtype)

        def setup() -> Call:
            keys, found = sampler(n_keys), np.zeros(n_keys, np.bool_)
            step = self._chunk_keys
            parts = [slice(low, low + step) for low in range(0, n_keys, step)]
            chunks = [Chunk(keys[p], out[p], found[p]) for p in parts]

            def call() -> float:
                stages = (self._hierarchy.ask_local, self._hierarchy.ask_remote)
                seconds = [_run(stage, chunks) for stage in stages]
                assert found.all(), "keys were not found"
                return fold(seconds)

            return call

        return setup


def _run(stage: Callable[[Chunk], None], chunks: list[Chunk]) -> float:
    begin_s = perf_counter()
    for chunk in chunks:
        stage(chunk)
    return perf_counter() - begin_s


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (pipeline,)
