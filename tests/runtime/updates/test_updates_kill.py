"""Servers that are killed at any instant neither lose nor repeat an update.

A trainer publishes rows and deletions all the time. The n-th row of a key holds the
number n. After each kill the rows in RocksDB are compared with what the stream has up
to the positions stored beside them.

``HPS_TEST_KILLS`` sets how many servers are killed; 30 by default, and 8 over Redis.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typing_extensions import Self

from hps_numba.config import PersistentDatabaseParams
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.stores import open_stores
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.types import Position, RowBlock, TableSpec
from tests.oracle import versioned_rows
from tests.runtime.deployments import Table, Wraps, model, server_config
from tests.runtime.updates.replay import Replay, Row, as_dict, mark_ends
from tests.support import kill_consumer
from tests.support.kafka_broker import KafkaBroker
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import wait_for

pytestmark = [pytest.mark.fault, pytest.mark.service]

DIM = 8
N_KEYS = 3000
PARTITIONS = 3
BURST_ROWS = 1000
PATIENCE_S = 30.0
KILLS = os.environ.get("HPS_TEST_KILLS")


class Trainer:
    """Publishes rows and deletions until it is stopped, now and then many at once."""

    def __init__(self, producer: UpdateProducer, spec: TableSpec) -> None:
        self._producer = producer
        self._table = (spec.model, spec.name)
        self._sent = np.zeros(N_KEYS, np.int64)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End when all is delivered."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._producer.delete(*self._table, np.arange(7, N_KEYS, 16))
        self._producer.flush()

    def _run(self) -> None:
        rng = np.random.default_rng(1)
        try:
            while not self._stop.wait(0.01):  # as many as a server applies, about
                n = 3000 if rng.random() < 0.03 else int(rng.integers(1, 300))
                self._send(rng.integers(0, N_KEYS, n))
                if rng.random() < 0.06:
                    gone = rng.choice(np.arange(7, N_KEYS, 8), 200)
                    self._producer.delete(*self._table, gone)
        except BaseException as error:
            self._error = error

    def _send(self, keys: NDArray[np.int64]) -> None:
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
        again = np.empty_like(keys)  # how often the key came before in this call
        again[order] = np.arange(keys.size) - np.searchsorted(ascending, ascending)
        rows = versioned_rows(keys, self._sent[keys] + again + 1, DIM)
        np.add.at(self._sent, keys, 1)
        self._producer.send(*self._table, keys, rows)


@dataclass(frozen=True)
class Span:
    """What RocksDB was given, and what it wrote; None if it was killed meanwhile."""

    partition: int
    since: Position
    until: Position
    n_keys: int
    written: int | None


class Servers:
    """Servers that start where the one before them was killed."""

    def __init__(self, ps_json: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, kill_consumer.__file__, str(ps_json)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._pid: int | None = None  # of a server that was not killed yet
        self._lines: SimpleQueue[list[str]] = SimpleQueue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def run_and_kill(self, instants: random.Random) -> list[Span]:
        """Start one, kill it at an instant of its work, return what it worked on."""
        assert self._process.stdin is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        self._pid = int(self._next()[1])
        lines = [self._next()]
        if instants.random() < 0.5:
            self._collect(lines, instants.uniform(0.0, 0.4))
        else:
            n_begun = instants.randint(1, 60)
            while sum(line[0] == "begin" for line in lines) < n_begun:
                lines.append(self._next())
            self._collect(lines, instants.uniform(0.0, 0.005))
        os.kill(self._pid, signal.SIGKILL)
        while (line := self._next())[0] != "ended":
            lines.append(line)
        self._pid = None
        assert line[1] == "-9", f"the server died by itself: {line[1]}"
        return list(spans_of(lines))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
        assert self._process.wait(PATIENCE_S) == 0
        self._reader.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.put(line.split())

    def _next(self) -> list[str]:
        return self._lines.get(timeout=PATIENCE_S)

    def _collect(self, lines: list[list[str]], seconds: float) -> None:
        """Add what comes in this time; not a wait, but when to kill."""
        end_s = monotonic() + seconds
        with suppress(Empty):
            while True:
                wait_s = max(end_s - monotonic(), 0.0)
                lines.append(self._lines.get(timeout=wait_s))


def spans_of(lines: list[list[str]]) -> Iterator[Span]:
    """Yield what a server was given to apply to RocksDB, in order."""
    for i, (what, *values) in enumerate(lines):
        if what == "begin":
            partition, since, until, n_keys = values
            after = lines[i + 1] if i + 1 < len(lines) else None
            assert after is None or after[0] == "end", "a span failed"
            yield Span(
                int(partition),
                Position.parse(since),
                Position.parse(until),
                int(n_keys),
                None if after is None else int(after[1]),
            )


def check_tiling(spans: list[Span], ends: dict[int, Position], *, again: bool) -> int:
    """Check that RocksDB wrote each record once; return how many spans were cut.

    A span that was cut by a kill may have been written or not. Where ``again``, what
    RocksDB has may come again for a tier above that lacks it: it must write nothing of
    that then, but for a piece that ends beyond what it has.
    """
    n_cut = 0
    for partition, end in ends.items():
        may_be = {Position(0)}
        for span in (s for s in spans if s.partition == partition):
            assert again or span.since in may_be, f"{span} does not follow {may_be}"
            assert span.since <= max(may_be), f"records are missing before {span}"
            assert span.since <= span.until, f"{span} ends before it begins"
            if span.since.offset == span.until.offset:
                n_records = span.until.record - span.since.record
                assert span.n_keys <= n_records, f"{span} has others' records"
            after = {max(position, span.until) for position in may_be}
            if span.written is None:
                may_be |= after
                n_cut += 1
            elif span.written == span.n_keys:
                assert again or span.until > min(may_be), f"{span} was written twice"
                may_be = after
            else:
                assert span.written == 0, span
                may_be = {position for position in may_be if position >= span.until}
                assert may_be, f"{span} was not written"
        assert end in may_be
    return n_cut


class Deployment:
    """A server of one table, and its databases as others see them."""

    def __init__(self, root: Path, brokers: str, topic: str, **volatile: Any) -> None:
        _, name, table = topic.split(".")
        self.spec = TableSpec(name, table, DIM)
        options: dict[str, Any] = {"sparse_model_files": [], "write": False}
        self.config = server_config(
            root,
            [model(root, [Table(table, dim=DIM)], name=name, **options)],
            volatile=volatile,
            update_source={
                "type": "kafka",
                "brokers": brokers,
                "burst_rows": BURST_ROWS,
                "receive_buffer_size": 1 << 20,
            },
        )
        self.ps_json = root / "ps.json"
        self.ps_json.write_text(self.config.model_dump_json(by_alias=True))

    def in_rocksdb(self) -> tuple[dict[int, Position], dict[int, Row]]:
        """Return positions and rows as a server left them that is gone."""
        path, tag = self.config.persistent_db.path, self.spec.tag
        tier = RocksDBTier(path, read_only=True, cache_bytes=1 << 20)
        try:
            tier.open_table(self.spec)
            return tier.positions(tag), as_dict(tier.iterate(tag))
        finally:
            tier.close()

    def caught_up(self, ends: dict[int, Position]) -> dict[str, dict[int, Row]]:
        """Let a server catch up, and return what lookups and its tiers have."""
        tiers = Wraps(lambda tier: tier)
        with HPS(self.config, wrap_tier=tiers) as server:
            wait_for(lambda: reached(server) == ends, PATIENCE_S, what="the end")
            keys = np.arange(N_KEYS)
            found = np.zeros(N_KEYS, np.bool_)
            rows = server.lookup(keys, self.spec.model, self.spec.name, found=found)
            seen = as_dict([RowBlock(keys[found], rows[found])])
            held = {
                name: as_dict(tier.iterate(self.spec.tag))
                for name, tier in tiers.tiers.items()
            }
        return {"lookup": seen, **held}


class InRedis:
    """Looks at a table in Redis: behind RocksDB perhaps, but never back in time.

    It has what its positions say, or newer rows, or none.
    """

    def __init__(self, site: Deployment, brokers: str) -> None:
        config = site.config.model_copy(
            update={"persistent_db": PersistentDatabaseParams()}
        )
        self.n_behind = 0  # keys that RocksDB had newer rows of
        self._tag = site.spec.tag
        tier = open_stores(config).shared
        assert tier is not None
        self._tier = tier
        self._tier.open_table(site.spec)
        self._replay = Replay(brokers, self._tag, PARTITIONS)
        self._versions: dict[int, float] = {}

    def look(self, in_rocksdb: dict[int, Row]) -> None:
        """Compare with the stream, with RocksDB, and with what was here before."""
        self._replay.advance(self._tier.positions(self._tag))
        for key, row in as_dict(self._tier.iterate(self._tag)).items():
            if key % 8 == 7:  # may be deleted
                continue
            assert self._replay.rows.get(key, (0, 0))[1] <= row[1]
            assert self._versions.get(key, 0) <= row[1] <= in_rocksdb[key][1]
            self.n_behind += row[1] < in_rocksdb[key][1]
            self._versions[key] = row[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tier.close()
        self._replay.close()


def reached(server: HPS) -> dict[int, Position]:
    """Return how far a server is in its only stream."""
    streams = server.updates.stats().streams
    return {p.partition: p.position for stream in streams for p in stream.partitions}


def kill_and_compare(
    deployment: Deployment,
    producer: UpdateProducer,
    replay: Replay,
    n_kills: int,
    redis: InRedis | None,
) -> list[Span]:
    """Kill servers while a trainer publishes; return what they gave to RocksDB."""
    instants = random.Random(1)
    spans: list[Span] = []
    servers = Servers(deployment.ps_json)
    try:
        trainer = Trainer(producer, deployment.spec)
        for _ in range(n_kills):
            spans += servers.run_and_kill(instants)
            positions, rows = deployment.in_rocksdb()
            replay.advance(positions)
            assert rows == replay.rows
            if redis is not None:
                redis.look(rows)
        trainer.stop()
    finally:
        servers.close()
    return spans


def check_killed(
    site: Deployment, brokers: str, n_kills: int, redis: InRedis | None = None
) -> tuple[dict[str, dict[int, Row]], dict[str, int]]:
    """Kill servers and let one catch up; return what tiers have, and counts."""
    topic = site.spec.tag
    replaying = Replay(brokers, topic, PARTITIONS)
    with UpdateProducer(brokers) as producer, replaying as replay:
        spans = kill_and_compare(site, producer, replay, n_kills, redis)
        stored, _ = site.in_rocksdb()
        ends = mark_ends(brokers, topic, PARTITIONS)
        held = site.caught_up(ends)
        replay.advance(ends)
    assert held["lookup"] == replay.rows
    assert held["rocksdb"] == replay.rows
    assert site.in_rocksdb() == (ends, replay.rows)
    counts = {
        "spans": len(spans),
        "sorted files": sum(s.n_keys >= kill_consumer.FILE_ROWS for s in spans),
        "cut spans": check_tiling(spans, stored, again=redis is not None),
        "ends within a message": sum(s.until.record > 0 for s in spans),
        "records": replay.n_records,
        "deletions": replay.n_deletes,
        "deleted keys": N_KEYS - len(replay.rows),
    }
    assert min(counts.values()) > 0, counts
    return held, counts


def line_of(counts: dict[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in counts.items())


def test_killed_servers_neither_lose_nor_repeat_an_update(
    tmp_path: Path, broker: KafkaBroker, topic: str, report: Callable[[str], None]
) -> None:
    broker.create_topic(topic, PARTITIONS)
    site = Deployment(tmp_path, broker.bootstrap, topic)
    n_kills = int(KILLS or 30)
    held, counts = check_killed(site, broker.bootstrap, n_kills)
    report(f"{n_kills} kills: {line_of(counts)}")
    assert held["host"].items() <= held["rocksdb"].items()


def test_killed_servers_leave_redis_no_older_than_it_was(
    tmp_path: Path, broker: KafkaBroker, topic: str, report: Callable[[str], None]
) -> None:
    broker.create_topic(topic, PARTITIONS)
    n_kills = int(KILLS or 8)
    with RedisCluster(masters=3) as cluster:
        site = Deployment(
            tmp_path,
            broker.bootstrap,
            topic,
            type="redis_cluster",
            address=cluster.address,
            num_partitions=4,
            num_node_connections=2,
        )
        with InRedis(site, broker.bootstrap) as redis:
            held, counts = check_killed(site, broker.bootstrap, n_kills, redis)
        line = f"{line_of(counts)} keys that were behind={redis.n_behind}"
        report(f"{n_kills} kills over Redis: {line}")
        assert held["redis"] == held["rocksdb"]
