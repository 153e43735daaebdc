"""The benchmarks of the kernels, each of which yields its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bench.gpu import baselines, ceilings, pooled, works
from bench.gpu.plan import (
    GATHER_GOAL,
    INSERT_GOAL,
    KEYS_A_BAG,
    RATE_GOALS,
    SEED,
    ZIPF,
    Run,
)
from bench.gpu.records import Line, Param, Ratio, ratio, timed
from bench.gpu.tables import Table
from bench.gpu.timing import Timed, measure
from bench.gpu.works import Stage
from bench.harness import Timing, speedup
from hps_numba.kernels.cuda.layout import RowLayout

GATHERS = (
    *("gather kernel", baselines.TORCH_GATHER),
    *("torch embedding", baselines.CUPY_GATHER),
)


def memory(run: Run) -> Iterator[Line]:
    """Copy, and read random sectors: what the device's memory gives at best."""
    with run.device.scratch() as scratch:
        work = ceilings.copy(run.device, scratch, run.sizes.copy_bytes)
        timing = measure(run.device, [work], run.plan).timings["copy"]
        yield timed("copy", timing, {"bytes": run.sizes.copy_bytes})
        run.copy_rate = 1 / float(sorted(timing.per_item)[len(timing.per_item) // 2])
    for n_bytes in run.within("random sectors", run.sizes.sector_bytes):
        with run.device.scratch() as scratch:
            work = ceilings.sectors(run.device, scratch, n_bytes, 4)
            timing = measure(run.device, [work], run.plan).timings["random sectors"]
            yield timed("sectors", timing, {"bytes": n_bytes})


def centre(run: Run) -> Iterator[Line]:
    """Vary batch, hit rate and keys around the centre; then all other operations."""
    sizes = run.sizes
    table = new_table(run, RowLayout(sizes.dim))
    try:
        yield from lookups(run, table, n=sizes.n, embedding=True)
        yield from pooled_lookups(run, table)
        yield from writes(run, table)
        yield from lookups(run, table, n=sizes.n, zipf=ZIPF, embedding=True)
        for n in run.within("query, keys", sizes.batches):
            yield from lookups(run, table, n=n)
        for hit_rate in run.within("query, hit rate", sizes.hit_rates):
            yield from lookups(run, table, n=sizes.n, hit_rate=hit_rate)
        if run.seconds_left() > 0:
            yield from scatters(run, table)
        # The last: it empties the table.
        yield from inserts(run, table)
    finally:
        table.close()


def shapes(run: Run) -> Iterator[Line]:
    """Look up rows of other dims and types."""
    layouts = [RowLayout(dim) for dim in run.sizes.dims if dim != run.sizes.dim]
    layouts += [RowLayout(dim, "float16", "float16") for dim in run.sizes.dims]
    layouts += [RowLayout(run.sizes.dim, "float16")]
    for rows in run.within("query, rows", layouts):
        table = new_table(run, rows)
        try:
            yield from lookups(run, table, n=run.sizes.n)
        finally:
            table.close()


def loads(run: Run) -> Iterator[Line]:
    """Look up in tables that are filled less, and more."""
    for load in run.within("query, load", run.sizes.loads):
        table = new_table(run, RowLayout(run.sizes.dim), load=load)
        try:
            yield from lookups(run, table, n=run.sizes.n)
        finally:
            table.close()


# -- what they are made of ------------------------------------------------------------


def new_table(
    run: Run, rows: RowLayout, *, load: float | None = None, share: int = 1
) -> Table:
    """Return a table with one ``share``-th of the usual size."""
    n_slots = run.sizes.n_slots(rows) // share
    load = run.sizes.load if load is None else load
    return Table(run.device, rows, n_slots=n_slots, load=load, seed=SEED)


def lookups(
    run: Run,
    table: Table,
    *,
    n: int,
    hit_rate: float = 1.0,
    zipf: float | None = None,
    embedding: bool = False,
) -> Iterator[Line]:
    """Time the query and plain gathers of the same rows."""
    with run.device.scratch() as scratch:
        stage = Stage.set_up(
            run.device,
            scratch,
            table,
            n=n,
            pool=run.sizes.pool,
            hit_rate=hit_rate,
            zipf=zipf,
        )
        ours, others = [works.query(stage)], []
        unable: dict[str, str] = {}
        if hit_rate == 1:
            ours.append(works.gather(stage))
            unable = baselines.unable(run.libraries, table.rows)
            others = baselines.gathers(run.libraries, stage, embedding=embedding)
        found = measure(run.device, [*ours, *others], run.plan)
    found.absent.update(unable)
    params = describe(table, n=n, keys="zipf" if zipf else "unique", hit_rate=hit_rate)
    at_centre = n == run.sizes.n and hit_rate == 1 and not zipf
    usual = table.rows.stored == "float32" and table.nominal_load == run.sizes.load
    goals = at_centre and usual
    yield from lookup_lines(run, table.rows, found, params, goals=goals)


def lookup_lines(
    run: Run,
    rows: RowLayout,
    found: Timed,
    params: Mapping[str, Param],
    *,
    goals: bool,
) -> Iterator[Line]:
    query = found.timings["query"]
    gathers = [found.timings[name] for name in GATHERS if name in found.timings]
    fastest = min(gathers, key=_middle).name if gathers else ""
    ratios = [
        ratio(
            one.name,
            speedup(query, one),
            floor=GATHER_GOAL if goals and one.name == fastest else None,
        )
        for one in gathers
    ]
    goal = RATE_GOALS.get(rows.dim)
    if goals and goal:
        ratios.append(against_rate(query, goal))
    moved = 8 + rows.row_bytes + rows.out_bytes
    ratios += against_copy(run, query, moved)
    absent = {**run.libraries.absent, **found.absent}
    yield timed("query", query, params, ratios=ratios, absent=absent)
    for one in gathers:
        yield timed("query", one, params, ratios=against_copy(run, one, moved))


def pooled_lookups(run: Run, table: Table) -> Iterator[Line]:
    """Time sums over bags."""
    with run.device.scratch() as scratch:
        stage = Stage.set_up(
            run.device, scratch, table, n=run.sizes.n, pool=run.sizes.pool
        )
        all_works = pooled.works(run.libraries, stage, KEYS_A_BAG)
        found = measure(run.device, all_works, run.plan)
    params = describe(table, n=run.sizes.n, keys="unique", hit_rate=1.0)
    yield from compared(run, "pooled", found, {**params, "bag": KEYS_A_BAG})


def writes(run: Run, table: Table) -> Iterator[Line]:
    """Time updates, and a dump of the whole table."""
    with run.device.scratch() as scratch:
        stage = Stage.set_up(
            run.device, scratch, table, n=run.sizes.n, pool=run.sizes.pool
        )
        found = measure(run.device, [works.update(stage)], run.plan)
        params = describe(table, n=run.sizes.n, keys="unique", hit_rate=1.0)
        yield from compared(run, "update", found, params)
        found = measure(run.device, [works.dump(stage)], run.plan)
        yield from compared(run, "dump", found, describe(table))


def scatters(run: Run, table: Table) -> Iterator[Line]:
    """Time the copy of fetched rows to where they were missed."""
    with run.device.scratch() as scratch:
        stage = Stage.set_up(
            run.device, scratch, table, n=run.sizes.n, pool=run.sizes.n, hit_rate=0.9
        )
        found = measure(run.device, [works.scatter(stage)], run.plan)
    params = describe(table, n=run.sizes.n, keys="unique", hit_rate=0.9)
    yield from compared(run, "scatter", found, params)


def inserts(run: Run, table: Table) -> Iterator[Line]:
    """Time inserts into room and in others' place, beside a query."""
    n, rows = run.sizes.n, table.rows
    # Half a table, so that rows for twice its slots have room beside it.
    full = new_table(run, rows, load=1.0, share=2)
    try:
        with run.device.scratch() as scratch:
            twice = 2 * full.cache.layout.tables[0].n_slots
            stage = Stage.set_up(run.device, scratch, table, n=n, pool=run.sizes.pool)
            evicting = works.insert(
                run.device, scratch, full, n=n, pool=twice, evicting=True
            )
            # The query's keys are in the other table, which nobody changes.
            found = measure(run.device, [evicting, works.query(stage)], run.plan)
        yield _insert_line(run, full, found, "insert, evicting")
    finally:
        full.close()
    with run.device.scratch() as scratch:
        room = int(0.4 * table.cache.layout.tables[0].n_slots)
        pool = max(n, min(run.sizes.pool, room))
        work = works.insert(
            run.device, scratch, table, n=min(n, room), pool=pool, evicting=False
        )
        found = measure(run.device, [work], run.plan)
        yield _insert_line(run, table, found, "insert")


def _insert_line(run: Run, table: Table, found: Timed, name: str) -> Line:
    timing = found.timings[name]
    ratios = []
    if "query" in found.timings:
        against = found.timings["query"]
        ratios.append(ratio("query", speedup(timing, against), floor=INSERT_GOAL))
    ratios += against_copy(run, timing, 8 + 2 * table.rows.row_bytes)
    params = describe(table, n=timing.items)
    return timed("insert", timing, params, ratios=ratios)


def compared(
    run: Run, name: str, found: Timed, params: Mapping[str, Param]
) -> Iterator[Line]:
    """Yield the first timing, compared with the others, and then those."""
    first, *others = found.timings.values()
    ratios = [ratio(one.name, speedup(first, one)) for one in others]
    absent = {
        **(run.libraries.absent if others or found.absent else {}),
        **found.absent,
    }
    yield timed(name, first, params, ratios=ratios, absent=absent)
    for one in others:
        yield timed(name, one, params)


def describe(table: Table, **params: Param) -> dict[str, Param]:
    """Return what a result is about."""
    rows = table.rows
    dtype = rows.stored if rows.out == rows.stored else f"{rows.stored} to {rows.out}"
    about: dict[str, Param] = {
        "dim": rows.dim,
        "dtype": dtype,
        "load": table.nominal_load,
    }
    return {**about, **params}


def against_rate(timing: Timing, goal: float) -> Ratio:
    """Compare with a goal in items a second."""
    name = f"{goal / 1e9:g} G/s"
    return ratio(name, 1 / goal / timing.per_item, floor=1.0)


def against_time(timing: Timing, goal_s: float) -> Ratio:
    """Compare with a goal in seconds a call."""
    found = ratio(
        f"{goal_s * 1e6:g} us", timing.per_item * timing.items / goal_s, floor=1.0
    )
    return replace(found, sense="at_most")


def against_copy(run: Run, timing: Timing, moved: int) -> list[Ratio]:
    """Compare the bytes that have to move with those that a copy moves."""
    if not run.copy_rate:
        return []
    return [ratio("copy", moved / timing.per_item / run.copy_rate)]


def _middle(timing: Timing) -> float:
    ordered: Sequence[float] = sorted(timing.per_item)
    return ordered[len(ordered) // 2]
