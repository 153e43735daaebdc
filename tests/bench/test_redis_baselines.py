from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from bench.harness import own_cpu_s
from bench.redis_baselines import (
    NullClient,
    RedisBenchmark,
    commands_per_s,
    names_of,
    read_plainly,
    write_plainly,
)
from bench.redis_setups import Servers, meter, on_cpu, single_server
from bench.workloads import table_rows
from hps_numba.tiers.redis.channel import KEYS_PER_COMMAND
from tests.support.redis_servers import RedisServer

N_ROWS, DIM = 3_000, 8
CSV = '"test","rps","avg_latency_ms"\n"MGET k__rand_int__ k__rand_int__",'


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with single_server(DIM, N_ROWS, 4) as servers:
        yield servers


def test_redis_py_reads_the_rows_that_the_tier_wrote(servers: Servers) -> None:
    keys = np.array([5, 0, 5, 2_999, 42])
    out = np.zeros((5, DIM), np.float32)
    read_plainly(servers.client, names_of(servers.strings.layout, keys), out)
    np.testing.assert_array_equal(out, table_rows(keys, DIM))


def test_the_tier_reads_the_rows_that_redis_py_wrote(servers: Servers) -> None:
    strings = servers.strings
    keys = np.arange(N_ROWS, N_ROWS + 100)
    rows = table_rows(keys, DIM)
    write_plainly(servers.client, names_of(strings.layout, keys), rows, batch=7)
    out, found = np.zeros_like(rows), np.zeros(100, np.bool_)
    assert strings.tier.fetch(strings.table.tag, keys, out, found) == 100
    np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("kind", ["strings", "hashes"])
def test_replies_that_are_dropped_are_all_taken(servers: Servers, kind: str) -> None:
    keys = np.random.default_rng(1).permutation(N_ROWS)
    port = servers.processes[0].port
    with closing(NullClient(port, getattr(servers, kind).layout)) as client:
        for _ in range(2):
            client.exchange(client.prepare(keys))


def test_replies_that_are_no_rows_are_noticed(servers: Servers) -> None:
    keys = np.arange(10 * N_ROWS, 10 * N_ROWS + 100)
    port = servers.processes[0].port
    with closing(NullClient(port, servers.strings.layout)) as client:
        request = client.prepare(keys)
        short = [end % 7 + 1 for end in request.reply_ends]
        with pytest.raises(AssertionError, match="not those of rows"):
            client.exchange(replace(request, reply_ends=short))


def test_redis_benchmark_asks_for_rows_that_there_are() -> None:
    if RedisBenchmark.absent():
        assert "redis-tools" in RedisBenchmark.absent()["redis-benchmark"]
        return
    with RedisServer() as server:
        program = RedisBenchmark(server.port, 100, 4 * DIM, name_bytes=37)
        client = server.client()
        program.fill(client, np.arange(100))
        assert len(client.randomkey()) == 37
        assert program.mget_s(8) > 0
        stats = client.info("stats")
        assert stats["keyspace_misses"] == 0
        assert stats["keyspace_hits"] == 8 * KEYS_PER_COMMAND


def test_the_rate_of_redis_benchmark_is_read_from_its_output() -> None:
    assert commands_per_s(f'{CSV}"1250.00","0.5"\n') == 1250


@pytest.mark.parametrize("output", ["", CSV, f'{CSV}"0.00","0.5"', "ERR wrong"])
def test_output_without_a_rate_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="gave no rate"):
        commands_per_s(output)


def test_a_missing_redis_benchmark_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert list(RedisBenchmark.absent()) == ["redis-benchmark"]


def test_what_servers_work_is_not_other_work(servers: Servers) -> None:
    with_server, begin = meter([servers.processes[0].pid]), own_cpu_s()
    before = with_server.own_cpu()
    servers.client.eval("for i = 1, 2e7 do end", 0)
    assert with_server.own_cpu() - before > own_cpu_s() - begin


def test_cpu_time_is_that_of_the_call() -> None:
    def call() -> None:
        total = 0
        for i in range(200_000):
            total += i

    seconds = on_cpu(call)()
    assert seconds is not None
    assert seconds > 0
