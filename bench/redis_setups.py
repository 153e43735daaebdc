"""Redis servers with tables to measure on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from bench.harness import Call, Meter, Setup, own_cpu_s
from bench.redis_baselines import NullClient, names_of, read_plainly
from bench.setups import fill, reading, spec
from bench.workloads import Sampler
from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.layout import Layout
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, Rows, TableSpec
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PATIENCE_S = 10.0  # other work on the machine is no failure of a server


@dataclass(frozen=True)
class Stored:
    """A table in Redis, and the tier that reads it."""

    tier: RedisTier
    table: TableSpec
    layout: Layout


@dataclass(frozen=True)
class Servers:
    """Servers that have one table in both layouts."""

    processes: Sequence[RedisServer]
    client: Any  # redis-py's
    strings: Stored
    hashes: Stored

    @property
    def meter(self) -> Meter:
        """A meter that takes the servers for a part of this process."""
        return meter([server.pid for server in self.processes])


@contextmanager
def single_server(dim: int, n_rows: int, n_partitions: int) -> Iterator[Servers]:
    """Fill one server with the keys ``0 .. n_rows - 1``."""
    with RedisServer() as server, ExitStack() as stack:
        stored = _both(stack, server.address, dim, n_rows, n_partitions)
        yield Servers([server], server.client(), *stored)


@contextmanager
def cluster(dim: int, n_rows: int, n_partitions: int) -> Iterator[Servers]:
    """Fill three masters with the keys ``0 .. n_rows - 1``."""
    with RedisCluster(masters=3, node_timeout_ms=15_000) as nodes, ExitStack() as stack:
        stored = _both(stack, nodes.address, dim, n_rows, n_partitions)
        yield Servers(nodes.nodes, nodes.client(), *stored)


def redis_tier(address: str, layout: RedisLayout, n_partitions: int) -> RedisTier:
    """Return a tier that is patient."""
    options = RedisOptions(address, timeout_s=_PATIENCE_S)
    return RedisTier(options, layout=layout, num_partitions=n_partitions)


def reading_plainly(
    servers: Servers, sampler: Sampler, batch: int, *, cpu: bool = False
) -> Setup:
    """Time redis-py; the names of keys are made before."""
    stored = servers.strings
    table = stored.table
    out = np.empty((batch, table.dim), table.numpy_dtype)

    def fetch(keys: Keys, rows: Rows) -> None:
        read_plainly(servers.client, names_of(stored.layout, keys), rows)

    reading(fetch, table, sampler, batch)  # checks the answers

    def setup() -> Call:
        names = names_of(stored.layout, sampler(batch))
        call = lambda: read_plainly(servers.client, names, out)  # noqa: E731 -- a Call
        return on_cpu(call) if cpu else call

    return setup


def dropping(client: NullClient, sampler: Sampler, batch: int) -> Setup:
    """Time the null client."""

    def setup() -> Call:
        request = client.prepare(sampler(batch))
        return lambda: client.exchange(request)

    return setup


def on_cpu(call: Call) -> Call:
    """Return a call that gives the CPU seconds that this process spent in it."""

    def timed() -> float:
        begin_s = process_time()
        call()
        return process_time() - begin_s

    return timed


def meter(pids: Sequence[int]) -> Meter:
    """Return a meter that takes some processes for a part of this one."""
    return Meter(own_cpu=lambda: own_cpu_s() + sum(map(_cpu_s, pids)))


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _both(
    stack: ExitStack, address: str, dim: int, n_rows: int, n_partitions: int
) -> list[Stored]:
    found = []
    for kind in (RedisLayout.STRINGS, RedisLayout.HASHES):
        table = spec(dim, name=kind.value)
        tier = redis_tier(address, kind, n_partitions)
        stack.enter_context(closing(tier))
        fill(tier, table, n_rows)
        found.append(Stored(tier, table, Layout(table, kind, n_partitions)))
    return found
