"""The benchmarks of calls: small lookups, and one launch for many tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from bench.gpu.calls import ManyTables, small_lookup
from bench.gpu.checks import check_shapes
from bench.gpu.compiling import Shape, compile_ahead
from bench.gpu.parts import against_time
from bench.gpu.plan import CALL_GOAL_S, DONE_GOAL_S, SEED, Run
from bench.gpu.records import Line, counted, ratio, timed
from bench.gpu.tables import Table
from bench.gpu.timing import HostClock, by_host, measure
from bench.gpu.works import Stage, query
from bench.harness import speedup
from hps_numba.kernels.cuda.layout import Policy, RowLayout

SMALL_LAUNCHES = 64


def compilation(run: Run) -> Iterator[Line]:
    """Compile ahead what a full run will launch; tiny runs compile as they go."""
    if run.smoke:
        run.not_run["compilation ahead"] = "a smoke run compiles as it goes"
        return
    start = time.perf_counter()
    n = compile_ahead(shapes_of(run), run.device.gpu.launcher.cc)
    yield counted("compilation", "all cores", n, "kernels")
    yield counted("compilation", "all cores", time.perf_counter() - start, "seconds")


def shapes_of(run: Run) -> Iterator[Shape]:
    """Yield the shapes of the caches that benchmarks and checks use."""
    sizes = run.sizes
    for dim in {*sizes.dims, sizes.dim, sizes.small_dim}:
        yield RowLayout(dim), Policy.LRU
        yield RowLayout(dim, "float16", "float16"), Policy.LRU
    yield RowLayout(sizes.dim, "float16"), Policy.LRU
    yield from check_shapes()


def small_calls(run: Run) -> Iterator[Line]:
    """Time one small lookup, all of it hits, by the host's clock and the device's."""
    sizes, clock = run.sizes, HostClock(run.device)
    rows = RowLayout(sizes.small_dim)
    table = Table(run.device, rows, n_slots=sizes.small_rows, load=0.75, seed=SEED)
    try:
        with run.device.scratch() as scratch:
            stage = Stage.set_up(
                *(run.device, scratch, table),
                n=sizes.small_keys,
                # One launch alone would be shorter than the clock is exact.
                pool=SMALL_LAUNCHES * sizes.small_keys,
            )
            device_time = measure(run.device, [query(stage)], run.plan)
            graph = run.device.graph(lambda: small_lookup(stage))
            found = by_host(
                {
                    "call": lambda: clock.until_returned(lambda: small_lookup(stage)),
                    "call, done": lambda: clock.until_done(lambda: small_lookup(stage)),
                    "graph, done": lambda: clock.until_done(graph.replay),
                    "waiting for nothing": lambda: clock.until_done(lambda: None),
                },
                stage.lookup.n,
                run.host_plan,
            )
            stage.check_rows()
            graph.close()
    finally:
        table.close()
    params = {"dim": sizes.small_dim, "n": sizes.small_keys, "rows": sizes.small_rows}
    goals = {"call": CALL_GOAL_S, "call, done": DONE_GOAL_S}
    yield timed("small", device_time.timings["query"], {**params, "clock": "device"})
    for name, timing in found.items():
        ratios = [against_time(timing, goals[name])] if name in goals else []
        yield timed("small", timing, {**params, "clock": "host"}, ratios=ratios)


def many_tables(run: Run) -> Iterator[Line]:
    """Time one launch for many tables against a launch for each."""
    for n_keys in run.within("many tables, keys", run.sizes.table_keys):
        yield from _tables_of(run, n_keys)


def _tables_of(run: Run, n_keys: int) -> Iterator[Line]:
    sizes, clock, rows = (
        run.sizes,
        HostClock(run.device),
        RowLayout(run.sizes.small_dim),
    )
    with run.device.scratch() as scratch:
        tables = ManyTables.set_up(
            run.device,
            scratch,
            rows,
            n_tables=sizes.n_tables,
            n_keys=n_keys,
            n_rows=sizes.table_rows,
        )
        _check(run, tables, tables.together, sizes.n_tables)
        _check(run, tables, tables.one_by_one, 1)
        found = by_host(
            {
                "one launch": lambda: clock.until_done(tables.together),
                "a launch a table": lambda: clock.until_done(tables.one_by_one),
            },
            sizes.n_tables * n_keys,
            run.host_plan,
        )
    together, apart = found.values()
    params = {"dim": rows.dim, "tables": sizes.n_tables, "n": n_keys}
    ratios = [ratio(apart.name, speedup(together, apart))]
    yield timed("tables", together, params, ratios=ratios)
    yield timed("tables", apart, params)


def _check(run: Run, tables: ManyTables, work: Callable[[], None], n_last: int) -> None:
    """Fail if a lookup of all tables gives wrong rows or counts."""
    out_bytes = tables.cache.layout.rows.out_bytes
    run.device.poison(tables.out, tables.n_tables * tables.n_keys * out_bytes)
    work()
    tables.check()
    assert tables.hits(n_last) == n_last * tables.n_keys
