"""Updates as fast as they come, beside lookups, evictions and backfills.

Every row holds its version. No lookup may see an older one than what was acknowledged
or, below the caches, returned by another lookup before it began.

``HPS_TEST_STRESS_S`` sets how many seconds it runs over host memory; 20 by default.
Over Redis it is a quarter of that, and beneath a GPU cache half of it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.tiers import rocksdb_table
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Rows, StreamSpan
from tests.oracle import versioned_rows, versions_in
from tests.runtime.deployments import Table, Wraps, model, server_config
from tests.runtime.ledger import Ledger
from tests.runtime.updates.replay import as_dict
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

SECONDS = float(os.environ.get("HPS_TEST_STRESS_S", "20"))
DIM = 16
N_ROWS = 4096
BATCH = 768  # keys of a lookup
GPU_BATCH = 100  # of which the stand-in does some ten a second
BURST_ROWS = 3000
FILE_ROWS = 300  # keys of a burst from which on it becomes sorted files
LEAD = 20_000  # records that the trainer may be ahead of the server
DAWDLE_S = 0.003
PATIENCE_S = 60.0
PARTITIONS = 4
# Room for about a quarter of the rows.
HOST = {"max_bytes": (128 << 10) + 96_000, "max_batch_size": 256}


class Acknowledged:
    """Tells a ledger what a table has applied of its stream."""

    def __init__(self, table: Hierarchy, ledger: Ledger) -> None:
        self.versions = np.ones(N_ROWS, np.int64)  # by key; one thread writes it
        self.counts: Counter[str] = Counter()
        self._ledger = ledger
        self._apply = table.apply
        table.apply = self  # type: ignore[method-assign]

    def __call__(
        self, keys: Keys, rows: Rows | None, span: StreamSpan, into: tuple[Tier, ...]
    ) -> None:
        self._apply(keys, rows, span, into)
        # Between two deletions of a key there is a row.
        versions = self.versions[keys] + 1 if rows is None else versions_in(keys, rows)
        self.versions[keys] = versions
        self._ledger.acknowledge(keys, versions)
        self.counts["deletions" if rows is None else "rows applied"] += keys.size
        self.counts["pieces"] += 1
        self.counts["bursts"] += keys.size >= FILE_ROWS


class Stress:
    """The threads, each a loop of rounds until ``stop`` is set."""

    def __init__(
        self,
        server: HPS,
        upper: Tier,
        producer: UpdateProducer,
        ledger: Ledger,
        batch: int,
    ) -> None:
        (served,) = server._models.served
        (self._table,) = served.tables
        self.ledger = ledger
        self.acknowledged = Acknowledged(self._table, ledger)
        self.rounds: Counter[str] = Counter()
        self._stop = threading.Event()
        self._session = server.session(served.name)
        self._upper = upper
        self._batch = batch
        self._producer = producer

    def run(self, seconds: float) -> None:
        """Do it all at once; raises what any of the threads raises."""
        turns = [self.look_up] * 3 + [self.evict, self.publish]
        for turn in turns[2:]:  # compiles what is not
            turn(np.random.default_rng(len(turns)))
        self._catch_up()
        end_s = monotonic() + seconds
        with ThreadPoolExecutor(len(turns)) as pool:
            running: list[Future[None]] = [
                pool.submit(self._loop, seed, turn) for seed, turn in enumerate(turns)
            ]
            self._stop.wait(end_s - monotonic())
            self._stop.set()
        for thread in running:
            thread.result()
        self._catch_up()

    def look_up(self, rng: np.random.Generator) -> None:
        keys = some_keys(rng, self._batch)
        found = np.zeros(keys.size, np.bool_)
        floor = self.ledger.floor(keys)
        rows = self._session.lookup(0, keys, found=found)
        reason = self.ledger.judge(keys, versions_in(keys, rows), found, floor)
        assert reason is None, reason
        self.rounds["keys looked up"] += keys.size

    def evict(self, rng: np.random.Generator) -> None:
        self._upper.evict(self._table.spec.tag, np.unique(some_keys(rng, 256)))

    def publish(self, rng: np.random.Generator) -> None:
        """Send rows and, for a while now and then, deletions."""
        deletes = self.rounds["publish"] // 40 % 2 == 1
        keys = np.unique(some_keys(rng, int(rng.integers(1, 1000))))
        if not deletes:
            keys = keys[keys % 16 != 15]
        versions = self.ledger.begin(keys)
        gone = (keys % 16 == 15) & (versions % 2 == 0)
        spec = self._table.spec
        if gone.any():
            self._producer.delete(spec.model, spec.name, keys[gone])
        rows = versioned_rows(keys[~gone], versions[~gone], DIM)
        self._producer.send(spec.model, spec.name, keys[~gone], rows)
        while self._behind() > LEAD and not self._stop.wait(0.001):
            pass

    def _catch_up(self) -> None:
        self._producer.flush()
        wait_for(lambda: self._behind() == 0, PATIENCE_S, what="the end of the stream")

    def _behind(self) -> int:
        """Return how many records are not acknowledged."""
        return int(self.ledger.begun.sum() - self.acknowledged.versions.sum())

    def _loop(self, seed: int, turn: Callable[[np.random.Generator], None]) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not self._stop.is_set():
                turn(rng)
                self.rounds[turn.__name__] += 1
        finally:
            self._stop.set()


def dawdling(tier: Tier) -> Tier:
    """Let a tier above RocksDB begin some writes late, so that much comes between."""
    if tier.name != "rocksdb":
        for name in ("insert", "delete", "apply", "backfill"):
            if hasattr(tier, name):
                setattr(tier, name, late(getattr(tier, name), every=8))
    return tier


def late(operation: Callable[..., Any], *, every: int) -> Callable[..., Any]:
    turns = count()
    nobody = threading.Event()

    def begin(*args: Any, **options: Any) -> Any:
        if next(turns) % every == 0:
            nobody.wait(DAWDLE_S)
        return operation(*args, **options)

    return begin


def some_keys(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    return (rng.zipf(1.2, n) - 1) % N_ROWS


@pytest.fixture
def stress(
    tmp_path: Path,
    broker: KafkaBroker,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    report: Callable[[str], None],
) -> Callable[..., dict[str, int]]:
    """Run a server's stress and compare its tiers in the end; return counts."""
    monkeypatch.setattr(rocksdb_table, "_BURST_ROWS", FILE_ROWS)
    broker.create_topic(topic, PARTITIONS)
    _, name, table = topic.split(".")

    def run(
        seconds: float,
        volatile: dict[str, Any],
        ledger: Ledger,
        *,
        batch: int = BATCH,
        **options: Any,
    ) -> dict[str, int]:
        rows = Table(table, dim=DIM, n_rows=N_ROWS, version=1)
        config = server_config(
            tmp_path,
            [model(tmp_path, [rows], name=name, **options)],
            volatile=volatile,
            update_source={
                "type": "kafka",
                "brokers": broker.bootstrap,
                "burst_rows": BURST_ROWS,
                "receive_buffer_size": 1 << 20,
            },
        )
        wraps = Wraps(dawdling)
        with (
            HPS(config, wrap_tier=wraps) as server,
            UpdateProducer(broker.bootstrap) as producer,
        ):
            upper, rocksdb = wraps.tiers.values()
            test = Stress(server, upper, producer, ledger, batch)
            test.run(seconds)
            server.drain()
            newest = {
                key: tuple(versioned_rows(key, version, DIM).tolist())
                for key, version in ledger.newest().items()
            }
            assert as_dict(rocksdb.iterate(topic)) == newest
            held = as_dict(upper.iterate(topic))
            assert held.items() <= newest.items()
            stats = server.stats()
            one = stats.table(name, table)
        assert one.errors == 0
        counts = {
            **test.rounds,
            **test.acknowledged.counts,
            "joined keys": one.joined,
            "absent keys": one.defaults,
            "backfilled rows": stats.backfill.stored_rows,
            "refused backfills": stats.backfill.refused_rows,
            "rows held": len(held),
            **{f"hits in {use.tier}": use.hits for use in one.tiers},
            **{
                f"evicted for room from {use.tier}": use.evictions
                for use in one.tiers[:-1]
            },
        }
        line = " ".join(f"{what}={count}" for what, count in counts.items())
        report(f"{upper.name}, {seconds:g} s: {line}")
        return counts

    return run


@pytest.mark.stress
@pytest.mark.service
def test_no_lookup_goes_back_while_updates_stream_in(
    stress: Callable[..., dict[str, int]],
) -> None:
    counts = stress(SECONDS, HOST, Ledger(N_ROWS))
    assert min(counts.values()) > 0, counts


@pytest.mark.stress
@pytest.mark.service
def test_no_lookup_goes_back_over_redis(
    stress: Callable[..., dict[str, int]],
) -> None:
    with RedisCluster(masters=3) as cluster:
        redis = {
            "type": "redis_cluster",
            "address": cluster.address,
            "num_partitions": 4,
            "num_node_connections": 2,
            "overflow_margin": 300,
        }
        counts = stress(SECONDS / 4, redis, Ledger(N_ROWS))
    assert min(counts.values()) > 0, counts


@pytest.mark.stress
@pytest.mark.service
@pytest.mark.device
def test_no_lookup_goes_back_beneath_a_gpu_cache(
    stress: Callable[..., dict[str, int]],
) -> None:
    counts = stress(
        SECONDS / 2,
        HOST,
        Ledger(N_ROWS, is_seen_by_all=False),
        batch=GPU_BATCH,
        use_gpu_embedding_cache=True,
        cache_size_percentage=0.1,
        hit_rate_threshold=1.1,
        max_batchsize=100,
        number_of_worker_buffers_in_pool=3,
    )
    for what in ("look_up", "rows applied", "hits in gpu:0", "backfilled rows"):
        assert counts[what] > 0, counts
