"""The Redis tier against redis-py, redis-benchmark, and a client that reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np

from bench import defaults
from bench.compare import Claim, compare
from bench.defaults import SEED, Run
from bench.harness import Call, Setup, Variant
from bench.records import Result
from bench.redis_baselines import (
    NullClient,
    RedisBenchmark,
    names_of,
    slow_parser,
    write_plainly,
)
from bench.redis_setups import (
    Servers,
    cluster,
    dropping,
    meter,
    on_cpu,
    reading_plainly,
    redis_tier,
    single_server,
)
from bench.setups import fetching, shuffled_keys, spec
from bench.workloads import Sampler, table_rows, uniform
from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.redis.channel import KEYS_PER_COMMAND
from hps_numba.tiers.redis.layout import KEY_BYTES, Layout
from hps_numba.types import RowBlock
from tests.support.redis_servers import RedisServer

STRINGS = "redis, strings"
HASHES = "redis, hashes"
PLAIN = "redis-py mget"
PLAIN_CLUSTER = "redis-py mget_nonatomic"
PLAIN_SET = "redis-py pipeline of SET"
NULL_STRINGS = "MGET, replies dropped"
NULL_HASHES = "HMGET, replies dropped"
REDIS_BENCHMARK = "redis-benchmark, MGET"


def redis_fetch(run: Run) -> Iterator[Result]:
    """Compare fetches from one server with other clients of the same server."""
    sizes, absent = run.sizes, RedisBenchmark.absent()
    for dim in sizes.dims:
        with (
            single_server(dim, sizes.n_rows, sizes.redis_partitions) as servers,
            ExitStack() as stack,
        ):
            program = [] if absent else [_redis_benchmark(run, servers, stack)]
            pids = [p.pid for p in servers.processes] + [pid for pid, _ in program]
            for batch in sizes.redis_batches:
                sampler = uniform(sizes.n_rows, seed=SEED)
                setups = _fetches(servers, sampler, batch)
                setups[PLAIN] = reading_plainly(servers, sampler, batch)
                with ExitStack() as clients:
                    setups |= _nulls(servers, sampler, batch, clients)
                    yield from compare(
                        run,
                        "redis_fetch",
                        [
                            *[Variant(n, s, batch) for n, s in setups.items()],
                            *[variant for _, variant in program],
                        ],
                        params={"dim": dim, "n_rows": sizes.n_rows, "batch": batch},
                        claims=_fetch_claims(dim, batch),
                        absent={**absent, **slow_parser()},
                        meter=meter(pids),
                    )


def redis_cluster(run: Run) -> Iterator[Result]:
    """Compare fetches from three masters with redis-py."""
    sizes = run.sizes
    for dim in sizes.dims:
        with cluster(dim, sizes.n_rows, sizes.cluster_partitions) as servers:
            for batch in sizes.cluster_batches:
                sampler = uniform(sizes.n_rows, seed=SEED)
                setups = _fetches(servers, sampler, batch)
                setups[PLAIN_CLUSTER] = reading_plainly(servers, sampler, batch)
                hashes = defaults.CLUSTER_HMGET_AGAINST_REDIS_PY.get((dim, batch))
                strings = defaults.CLUSTER_MGET_AGAINST_REDIS_PY.get((dim, batch))
                yield from compare(
                    run,
                    "redis_cluster",
                    [Variant(name, setup, batch) for name, setup in setups.items()],
                    params={
                        "dim": dim,
                        "n_rows": sizes.n_rows,
                        "partitions": sizes.cluster_partitions,
                        "batch": batch,
                    },
                    claims=[
                        Claim(HASHES, PLAIN_CLUSTER, hashes),
                        Claim(STRINGS, PLAIN_CLUSTER, strings),
                    ],
                    absent=slow_parser(),
                    meter=servers.meter,
                )


def redis_cpu(run: Run) -> Iterator[Result]:
    """Compare what a fetch costs the client in CPU time, all threads together."""
    sizes = run.sizes
    for dim in sizes.dims:
        with single_server(dim, sizes.n_rows, sizes.redis_partitions) as servers:
            batch, sampler = max(sizes.redis_batches), uniform(sizes.n_rows, seed=SEED)
            setups = {
                name: _by_cpu(setup)
                for name, setup in _fetches(servers, sampler, batch).items()
            }
            setups[PLAIN] = reading_plainly(servers, sampler, batch, cpu=True)
            floor = defaults.REDIS_CPU_AGAINST_REDIS_PY.get(dim)
            yield from compare(
                run,
                "redis_cpu",
                [Variant(name, setup, batch) for name, setup in setups.items()],
                params={"dim": dim, "n_rows": sizes.n_rows, "batch": batch},
                claims=[Claim(STRINGS, PLAIN, floor), Claim(HASHES, PLAIN, floor)],
                absent=slow_parser(),
                meter=servers.meter,
            )


def redis_load(run: Run) -> Iterator[Result]:
    """Compare a load into an empty table with a pipeline of SET."""
    sizes, n = run.sizes, run.sizes.redis_write_rows
    for dim in sizes.dims:
        with RedisServer() as server, ExitStack() as stack:
            setups = {
                name: _loading(stack, server, dim, n, layout, sizes.redis_partitions)
                for name, layout in (
                    (STRINGS, RedisLayout.STRINGS),
                    (HASHES, RedisLayout.HASHES),
                )
            }
            setups[PLAIN_SET] = _writing(server, dim, n, sizes.redis_partitions)
            yield from compare(
                run,
                "redis_load",
                [Variant(name, setup, n) for name, setup in setups.items()],
                params={"dim": dim, "n_rows": n},
                claims=[
                    Claim(STRINGS, PLAIN_SET, defaults.REDIS_MSET_AGAINST_PIPELINE),
                    Claim(HASHES, PLAIN_SET, defaults.REDIS_HSET_AGAINST_PIPELINE),
                ],
                absent=slow_parser(),
                meter=meter([server.pid]),
            )


def _fetches(servers: Servers, sampler: Sampler, batch: int) -> dict[str, Setup]:
    return {
        name: fetching(stored.tier, stored.table, sampler, batch)
        for name, stored in ((STRINGS, servers.strings), (HASHES, servers.hashes))
    }


def _nulls(
    servers: Servers, sampler: Sampler, batch: int, stack: ExitStack
) -> dict[str, Setup]:
    found = {}
    for name, stored in (
        (NULL_STRINGS, servers.strings),
        (NULL_HASHES, servers.hashes),
    ):
        client = NullClient(servers.processes[0].port, stored.layout)
        stack.enter_context(closing(client))
        found[name] = dropping(client, sampler, batch)
    return found


def _fetch_claims(dim: int, batch: int) -> list[Claim]:
    return [
        Claim(variant, against, floors.get((dim, batch)))
        for variant, against, floors in (
            (STRINGS, REDIS_BENCHMARK, defaults.REDIS_MGET_AGAINST_REDIS_BENCHMARK),
            (STRINGS, PLAIN, defaults.REDIS_MGET_AGAINST_REDIS_PY),
            (STRINGS, NULL_STRINGS, {}),
            (HASHES, NULL_HASHES, defaults.REDIS_HMGET_AGAINST_NULL),
            (HASHES, PLAIN, defaults.REDIS_HMGET_AGAINST_REDIS_PY),
        )
    ]


def _redis_benchmark(
    run: Run, servers: Servers, stack: ExitStack
) -> tuple[int, Variant]:
    """Return the program, and the process id of its server."""
    server = stack.enter_context(RedisServer())
    layout = servers.strings.layout
    program = RedisBenchmark(
        server.port,
        run.sizes.n_rows,
        layout.spec.row_bytes,
        len(layout.prefixes[0]) + KEY_BYTES,
    )
    client = server.client()
    program.fill(client, shuffled_keys(run.sizes.n_rows))
    n_commands = run.sizes.redis_commands
    program.mget_s(n_commands)
    missed = client.info("stats")["keyspace_misses"]
    assert missed == 0, f"redis-benchmark asked for {missed} keys that there are not"

    def setup() -> Call:
        return lambda: program.mget_s(n_commands)

    return server.pid, Variant(REDIS_BENCHMARK, setup, n_commands * KEYS_PER_COMMAND)


def _by_cpu(setup: Setup) -> Setup:
    return lambda: on_cpu(setup())


def _loading(
    stack: ExitStack,
    server: RedisServer,
    dim: int,
    n: int,
    kind: RedisLayout,
    n_partitions: int,
) -> Setup:
    """Load rows into a table that is empty in every call; checked once, here."""
    table, keys = spec(dim, name=kind.value), shuffled_keys(n)
    block = RowBlock(keys, table_rows(keys, dim))
    tier = redis_tier(server.address, kind, n_partitions)
    stack.enter_context(closing(tier))
    client = server.client()

    def setup() -> Call:
        tier.drop_table(table.tag)
        client.flushall()
        tier.open_table(table)
        return load

    def load() -> None:
        tier.load(table.tag, [block])

    setup()()
    rows, found = np.empty_like(block.rows), np.zeros(n, np.bool_)
    assert tier.fetch(table.tag, keys, rows, found) == n, "rows were lost"
    np.testing.assert_array_equal(rows, block.rows)
    return setup


def _writing(server: RedisServer, dim: int, n: int, n_partitions: int) -> Setup:
    """Write the same rows under the same names with redis-py."""
    table, keys = spec(dim, name=RedisLayout.STRINGS.value), shuffled_keys(n)
    names = names_of(Layout(table, RedisLayout.STRINGS, n_partitions), keys)
    rows, client = table_rows(keys, dim), server.client()

    def setup() -> Call:
        client.flushall()
        return lambda: write_plainly(client, names, rows)

    return setup


BENCHMARKS: tuple[Callable[[Run], Iterator[Result]], ...] = (
    redis_fetch,
    redis_cluster,
    redis_cpu,
    redis_load,
)
