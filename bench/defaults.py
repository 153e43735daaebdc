"""Axes, sizes and floors of all benchmarks, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.harness import Plan
from bench.records import Origin, Published
from bench.workloads import POWER_LAW_ALPHA

SEED = 20_240_601

MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """How large the benchmarks are."""

    n_rows: int = 1_000_000
    dims: tuple[int, ...] = (32, 128)
    host_batch: int = 100_000
    batches: tuple[int, ...] = (1, 10, 100, 1_000, 10_000, 100_000)
    threads: tuple[int, ...] = (1, 2, 4, 8)
    write_rows: int = 200_000
    micro_dims: tuple[int, ...] = (16, 32, 64, 128)
    micro_batches: tuple[int, ...] = (1_000, 10_000, 100_000)
    rocks_batch: int = 50_000
    rocks_threads: int = 16
    rocks_batches: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    cached_bytes: int = 2048 * MIB  # more than the table takes
    db_bench_reads: int = 200_000
    load_rows: int = 500_000
    disk_rows: int = 4_000_000
    disk_dim: int = 128
    disk_cache_bytes: int = 64 * MIB
    disk_reads: int = 48_000
    disk_threads: int = 16
    call_rows: int = 630_000  # of the small call that HPS published
    call_keys: int = 2_000
    call_dim: int = 16
    pipeline_keys: int = 200_000
    pipeline_chunk: int = 10_000
    pipeline_shares: tuple[float, ...] = (0.75, 0.95)  # of rows in host memory
    redis_batches: tuple[int, ...] = (1_000, 10_000, 100_000)
    redis_partitions: int = 8
    redis_commands: int = 400  # of redis-benchmark, in a call
    redis_write_rows: int = 50_000
    cluster_batches: tuple[int, ...] = (1_000, 10_000, 100_000)
    cluster_partitions: int = 12  # of three masters
    produce_rows: int = 200_000
    stream_rows: int = 1_000_000
    stream_partitions: int = 4
    stream_rows_per_s: int = 50_000
    stream_phase_s: float = 4.0
    stream_lookup_keys: int = 1024 * 26  # a request of HPS's size
    three_tiers_keys: int = 400_000
    three_tiers_chunk: int = 10_000
    # Of rows in host memory, and in Redis.
    three_tiers_shares: tuple[tuple[float, float], ...] = ((0.25, 0.95), (0.5, 0.95))


FULL = Sizes()

SMOKE = Sizes(
    n_rows=3_000,
    dims=(8,),
    host_batch=1_000,
    batches=(1, 100),
    threads=(1, 2),
    write_rows=500,
    micro_dims=(8,),
    micro_batches=(10, 1_000),
    rocks_batch=500,
    rocks_threads=2,
    rocks_batches=(10, 500),
    cached_bytes=16 * MIB,
    db_bench_reads=1_000,
    load_rows=1_000,
    disk_rows=5_000,
    disk_dim=8,
    disk_cache_bytes=MIB,
    disk_reads=640,
    disk_threads=4,
    call_rows=2_000,
    call_keys=100,
    pipeline_keys=2_000,
    pipeline_chunk=200,
    pipeline_shares=(0.75,),
    redis_batches=(500,),
    redis_commands=8,
    redis_write_rows=1_000,
    produce_rows=2_000,
    stream_rows=2_000,
    stream_rows_per_s=2_000,
    stream_phase_s=0.3,
    stream_lookup_keys=64,
    cluster_batches=(500,),
    three_tiers_keys=2_000,
    three_tiers_chunk=200,
    three_tiers_shares=((0.25, 0.95),),
)

FULL_PLAN = Plan()
SMOKE_PLAN = Plan(rounds=1, slice_s=0, budget_s=0, quiet_wait_s=0)


@dataclass(frozen=True)
class Run:
    """What a benchmark is given: sizes, how long to measure, a directory, origin."""

    sizes: Sizes
    plan: Plan
    scratch: Path
    where: Origin


# Promises, on two shared cores. Of a dim that is not listed there is none.
HOST_AGAINST_DICT = {32: 8.0, 128: 4.0}
HOST_AGAINST_DENSE = {32: 0.45, 128: 0.7}
HOST_TWO_THREADS = 1.4
ROCKSDB_AGAINST_PER_KEY = 1.6
ROCKSDB_AGAINST_DB_BENCH = {32: 0.95, 128: 0.8}
ROCKSDB_DISK_AGAINST_DB_BENCH = 0.9
LOAD_AGAINST_WRITE_BATCH = 3.0
PIPELINE_OVER_SLOWEST_STAGE = 1.2
# By shares. The server has one of two cores; with half of the rows in host memory, the
# process needs more than the other one, in the time that the server needs for the rest.
THREE_TIERS_OVER_SLOWEST = {(0.25, 0.95): PIPELINE_OVER_SLOWEST_STAGE}
LOOKUP_OVER_TIER_FETCH = 1.5
# Of Redis by (dim, batch), where not all are promised the same.
REDIS_MGET_AGAINST_REDIS_BENCHMARK = {(32, 10_000): 0.9, (32, 100_000): 0.9}
REDIS_MGET_AGAINST_REDIS_PY = {(32, 10_000): 1.5, (32, 100_000): 1.5}
REDIS_HMGET_AGAINST_NULL = {(32, 100_000): 0.85, (128, 100_000): 0.85}
REDIS_HMGET_AGAINST_REDIS_PY = {(32, 100_000): 2.5, (128, 100_000): 1.9}
CLUSTER_HMGET_AGAINST_REDIS_PY = {(32, 10_000): 3.0}
CLUSTER_MGET_AGAINST_REDIS_PY = {(32, 10_000): 2.0}
REDIS_CPU_AGAINST_REDIS_PY = {32: 5.0, 128: 2.8}
REDIS_MSET_AGAINST_PIPELINE = 3.5
REDIS_HSET_AGAINST_PIPELINE = 4.5

STREAM_PRODUCE_AGAINST_PLAIN = {32: 3.0}
STREAM_DECODE_AGAINST_CONSUME = 0.8
STREAM_APPLY_AGAINST_NAIVE = {32: 4.0}
STREAM_LOOKUP_P99_AGAINST_IDLE = 2.0
STREAM_STALENESS_S = {"p50": 0.050, "p99": 0.250}

CALL_ALPHA = POWER_LAW_ALPHA  # of the small call
HPS_SMALL_CALL = Published(
    source="HugeCTR, docs/source/hierarchical_parameter_server/profiling_hps.md: "
    "database backend, on the authors' machine",
    values={"mean_s": 0.127e-3, "p99_s": 0.219e-3},
)
