"""``HPS.lookup``: what the runtime adds to the host memory tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Variant
from bench.records import Result
from bench.servers import host_server, looking_up
from bench.setups import callers, fetching, reading, spec, together
from bench.workloads import power_law, uniform

LOOKUP = "HPS.lookup"
LOOKUP_INTO = "HPS.lookup, out="
TIER = "HostTier.fetch"


def lookup_small(run: Run) -> Iterator[Result]:
    """Compare the small call that HugeCTR published with the tier's own fetch."""
    sizes = run.sizes
    table, n = spec(sizes.call_dim), sizes.call_keys
    sampler = power_law(sizes.call_rows, seed=SEED)
    with host_server(table, sizes.call_rows) as served:
        setups = {
            LOOKUP: looking_up(served, sampler, n),
            LOOKUP_INTO: reading(served.lookup_into, table, sampler, n),
            TIER: fetching(served.tiers["host"], table, sampler, n),
        }
        yield from compare(
            run,
            "lookup_small",
            [Variant(name, setup, n) for name, setup in setups.items()],
            params={
                "dim": sizes.call_dim,
                "n_rows": sizes.call_rows,
                "batch": n,
                "keys": f"power law {defaults.CALL_ALPHA:g}",
            },
            claims=[
                Claim(LOOKUP, TIER, defaults.LOOKUP_OVER_TIER_FETCH, "at_most"),
                Claim(LOOKUP_INTO, TIER, sense="at_most"),
            ],
            published=defaults.HPS_SMALL_CALL,
        )


def lookup_batches(run: Run) -> Iterator[Result]:
    """Time a lookup from host memory by batch size."""
    for dim in run.sizes.dims:
        table, sampler = spec(dim), uniform(run.sizes.n_rows, seed=SEED)
        with host_server(table, run.sizes.n_rows) as served:
            variants = [
                Variant(f"batch {n}", looking_up(served, sampler, n), n)
                for n in run.sizes.batches
            ]
            yield from compare(
                run,
                "lookup_batches",
                variants,
                params={"dim": dim, "n_rows": run.sizes.n_rows, "keys": "uniform"},
            )


def lookup_threads(run: Run) -> Iterator[Result]:
    """Time lookups from several caller's threads at once."""
    sizes = run.sizes
    batch = sizes.pipeline_chunk
    for dim in sizes.dims:
        table, sampler = spec(dim), uniform(sizes.n_rows, seed=SEED)
        with ExitStack() as stack:
            served = stack.enter_context(host_server(table, sizes.n_rows))
            variants = [
                Variant(
                    callers(n),
                    together(
                        stack.enter_context(ThreadPoolExecutor(n)),
                        [looking_up(served, sampler, batch) for _ in range(n)],
                    ),
                    n * batch,
                )
                for n in sizes.threads
            ]
            yield from compare(
                run,
                "lookup_threads",
                variants,
                params={"dim": dim, "n_rows": sizes.n_rows, "batch": batch},
                claims=[Claim(v.name, variants[0].name) for v in variants[1:]],
            )


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (
    lookup_small,
    lookup_batches,
    lookup_threads,
)
