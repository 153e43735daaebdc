"""A cluster that loses servers and slots: the others' rows, and never a wrong one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import permutations
from time import monotonic
from typing import Any

import numpy as np
import pytest
import redis
from redis.connection import Connection

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import TierError, TierTimeoutError, TierUnavailableError
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.redis.topology import Node
from hps_numba.types import FailureMode, Keys, Mask
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer, wait_for
from tests.support.sockets import open_sockets
from tests.support.wrappers import WrappedTier
from tests.tiers.redis.stored import partition_of
from tests.tiers.redis.versions import SPEC, Ledger, rows_at, versions_of

pytestmark = [pytest.mark.service, pytest.mark.fault]

logger = logging.getLogger(__name__)

TAG = SPEC.tag
N_PARTITIONS = 12
KEYS = np.arange(3000, dtype=np.int64) * 31 - 500


@contextmanager
def opened(address: str, **options: Any) -> Iterator[RedisTier]:
    of_tier = {
        name: options.pop(name)
        for name in ("layout", "wait_replicas", "max_batch_size")
        if name in options
    }
    options = {"timeout_s": 0.5, **options}
    tier = RedisTier(
        RedisOptions(address, **options), num_partitions=N_PARTITIONS, **of_tier
    )
    try:
        tier.open_table(SPEC)
        yield tier
    finally:
        tier.close()


def owned_by(node: RedisServer, cluster: RedisCluster) -> Mask:
    """Tell which of `KEYS` a server of the cluster has."""
    slots = set(cluster.slots(node))
    with cluster.client() as client:
        mine = [
            client.keyslot(f"hps_et{{{TAG}/p{p}}}") in slots
            for p in range(N_PARTITIONS)
        ]
    partitions = [partition_of(key, N_PARTITIONS) for key in KEYS.tolist()]
    return np.array(mine)[partitions]


def fetch(tier: Tier, keys: Keys = KEYS) -> tuple[Any, Mask, TierError | None]:
    rows = np.empty((keys.size, SPEC.dim), np.float32)
    found = np.zeros(keys.size, np.bool_)
    try:
        tier.fetch(TAG, keys, rows, found)
    except TierError as error:
        return rows, found, error
    return rows, found, None


def complete(tier: Tier, version: int) -> bool:
    """Tell whether all rows are there, which then have the version."""
    rows, found, error = fetch(tier)
    versions = versions_of(KEYS[found], rows[found])
    assert (versions == version).all()
    return error is None and bool(found.all())


class Load:
    """Reads and writes that go on whatever happens; every row read is checked."""

    def __init__(self, writer: RedisTier, readers: list[RedisTier]) -> None:
        self.ledger = Ledger(KEYS)
        self._writer, self._readers = writer, readers
        self._stop = threading.Event()
        self.writing = threading.Event()
        self.writing.set()
        self.whole: list[float] = []  # when a lookup was answered in full
        self.n_partial = 0
        self.n_written = self.n_refused = 0
        self._version = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(1 + len(self._readers)) as pool:
            jobs = [pool.submit(self._read, i) for i in range(len(self._readers))]
            jobs.append(pool.submit(self._write))
            try:
                yield
            finally:
                self._stop.set()
                self.writing.set()
            for job in jobs:
                job.result()

    def write_once(self, tier: RedisTier, which: Any) -> bool:
        self._version += 1
        version = self._version
        self.ledger.begin(which, version)
        keys = KEYS[which]
        try:
            tier.insert(TAG, keys, rows_at(keys, version))
        except TierError:
            self.n_refused += 1
            return False
        self.ledger.acknowledge(which, version)
        self.n_written += 1
        return True

    def _write(self) -> None:
        generator = np.random.default_rng(7)
        while not self._stop.is_set():
            self.writing.wait()
            self.write_once(self._writer, generator.choice(KEYS.size, 200, False))

    def _read(self, number: int) -> None:
        generator = np.random.default_rng(number)
        tier = self._readers[number]
        while not self._stop.is_set():
            which = generator.permutation(KEYS.size)
            floor = self.ledger.floor(which)
            rows, found, error = fetch(tier, KEYS[which])
            part = found if error is not None else np.ones_like(found)
            self.ledger.check(which[part], floor[part], rows[part], found[part])
            if error is None:
                self.whole.append(monotonic())
            else:
                self.n_partial += 1


@pytest.fixture(scope="module")
def replicated() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3, replicas=1, node_timeout_ms=1000) as cluster:
        yield cluster


@pytest.mark.parametrize("layout", list(RedisLayout))
def test_reads_go_on_when_a_replica_takes_over(
    replicated: RedisCluster, layout: RedisLayout
) -> None:
    """Acknowledged rows are on the replica: not one of them is lost or wrong."""
    cluster = replicated
    cluster.flush()
    address, sockets = cluster.address, open_sockets()
    with (
        opened(address, layout=layout, wait_replicas=1) as writer,
        opened(address, layout=layout) as first,
        opened(address, layout=layout, protocol=2) as second,
    ):
        load = Load(writer, [first, second])
        assert load.write_once(writer, np.arange(KEYS.size))
        dead = cluster.masters[0]
        (heir,) = cluster.replicas_of(dead)
        with load.running():
            wait_for(lambda: len(load.whole) > 20 and load.n_written > 5)
            dead.kill()
            killed_s = monotonic()
            wait_for(lambda: load.n_partial > 0, what="a lookup that fails")
            cluster.wait_for(lambda: heir in cluster.masters, what="the heir")
            taken_s = monotonic()
            n_before = len(load.whole)
            wait_for(lambda: len(load.whole) > n_before + 20, 20, what="lookups")
            again_s = min(t for t in load.whole if t > killed_s + 0.2)
            dead.start()
            cluster.wait_until_stable()
            written = load.n_written
            wait_for(lambda: load.n_written > written + 5, 20, what="writes")
        for tier in (writer, first, second):
            wait_for(lambda tier=tier: not tier.down(), what="breakers")
    logger.info(
        "layout=%s heir_s=%.2f whole_s=%.2f rows_checked=%d partial=%d refused=%d",
        layout.value,
        taken_s - killed_s,
        again_s - killed_s,
        load.ledger.n_checked,
        load.n_partial,
        load.n_refused,
    )
    assert load.n_refused > 0
    assert open_sockets() <= sockets  # others' may be gone, too


def test_a_master_that_was_replaced_while_it_slept_is_not_read(
    replicated: RedisCluster,
) -> None:
    """It wakes with old rows, and does not know yet that it is a replica now."""
    cluster = replicated
    cluster.flush()
    with (
        opened(cluster.address, wait_replicas=1) as careful,
        opened(cluster.address) as writer,
        opened(cluster.address) as first,
        opened(cluster.address) as second,
    ):
        load = Load(writer, [first, second])
        load.writing.clear()
        assert load.write_once(careful, np.arange(KEYS.size))
        asleep = cluster.masters[0]
        (heir,) = cluster.replicas_of(asleep)
        with load.running():
            wait_for(lambda: len(load.whole) > 5)
            asleep.pause()
            cluster.wait_for(lambda: heir in cluster.masters, what="the heir")
            load.writing.set()
            written = load.n_written
            wait_for(lambda: load.n_written > written + 20, 20, what="writes")
            asleep.resume()
            cluster.wait_until_stable()
            n_before = len(load.whole)
            wait_for(lambda: len(load.whole) > n_before + 20, 20, what="lookups")
        wait_for(lambda: not (writer.down() or first.down() or second.down()))


def hierarchy(tiers: list[Tier], mode: FailureMode) -> Hierarchy:
    return Hierarchy(SPEC, tiers, backfills=None, on_failure=mode, write_rows=1000)


def test_without_a_replica_only_the_rows_of_the_dead_server_are_missing(
    cluster: RedisCluster,
) -> None:
    below = WrappedTier(HostTier())
    below.local = False  # as a database is
    below.open_table(SPEC)
    below.insert(TAG, KEYS, rows_at(KEYS, 1))
    with opened(cluster.address, max_batch_size=400) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        assert complete(tier, 1)
        dead = cluster.masters[1]
        lost = owned_by(dead, cluster)
        assert 0 < np.count_nonzero(lost) < KEYS.size
        dead.kill()
        for _ in range(5):
            rows, found, error = fetch(tier)
            assert isinstance(error, TierUnavailableError)
            assert dead.address in str(error)
            np.testing.assert_array_equal(found, ~lost)
            assert (versions_of(KEYS[found], rows[found]) == 1).all()
        assert [state.name for state in tier.down()] == [dead.address]
        assert tier._health.failures == 1
        with pytest.raises(TierUnavailableError, match=dead.address):
            tier.insert(TAG, KEYS, rows_at(KEYS, 2))
        rows, found, _ = fetch(tier)
        np.testing.assert_array_equal(found, ~lost)
        assert (versions_of(KEYS[found], rows[found]) == 2).all()

        with pytest.raises(TierUnavailableError, match=dead.address):
            hierarchy([tier], FailureMode.RAISE).fetch(KEYS)
        degraded = hierarchy([tier], FailureMode.DEGRADE)
        rows, found = degraded.fetch(KEYS)
        np.testing.assert_array_equal(found, ~lost)
        assert (versions_of(KEYS[found], rows[found]) == 2).all()
        rows, found = hierarchy([tier, below], FailureMode.DEGRADE).fetch(KEYS)
        assert found.all()
        versions = versions_of(KEYS, rows)
        np.testing.assert_array_equal(versions, np.where(lost, 1, 2))

        dead.start()  # with nothing in it
        cluster.wait_until_stable()
        wait_for(lambda: not tier.down())
        rows, found, error = fetch(tier)
        assert error is None
        np.testing.assert_array_equal(found, ~lost)
        tier.insert(TAG, KEYS, rows_at(KEYS, 3))
        assert complete(tier, 3)
        assert tier._health.failures == 1


def test_a_paused_server_delays_nobody_but_the_first(cluster: RedisCluster) -> None:
    with opened(cluster.address, timeout_s=0.3) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        asleep = cluster.masters[2]
        theirs = owned_by(asleep, cluster)
        asleep.pause()
        try:
            rows, found, error = fetch(tier)
            assert isinstance(error, TierTimeoutError)
            np.testing.assert_array_equal(found, ~theirs)
            for _ in range(20):
                rows, found, error = fetch(tier)
                assert isinstance(error, TierUnavailableError)
                assert "asked again in the background" in str(error)
                np.testing.assert_array_equal(found, ~theirs)
                assert (versions_of(KEYS[found], rows[found]) == 1).all()
            assert tier._health.failures == 1
        finally:
            asleep.resume()
        wait_for(lambda: not tier.down())
        assert complete(tier, 1)
    cluster.wait_until_stable()


def run_on_masters(cluster: RedisCluster, command: str, *arguments: object) -> None:
    for node in cluster.nodes:
        with node.client() as client:
            client.execute_command(command, *arguments)


def test_a_cluster_that_is_down_is_asked_until_it_serves(cluster: RedisCluster) -> None:
    with opened(cluster.address) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        (slot,) = {0, 16383} - set(tier._tables[TAG].slots) - {0}
        owner = cluster.owner(slot)
        setting = "cluster-require-full-coverage"
        run_on_masters(cluster, "CONFIG SET", setting, "yes")
        run_on_masters(cluster, "CLUSTER DELSLOTS", slot)
        try:
            wait_for(
                lambda: all(
                    node.client().cluster("INFO")["cluster_state"] == "fail"
                    for node in cluster.nodes
                )
            )
            _, found, error = fetch(tier)
            assert isinstance(error, TierUnavailableError)
            assert "cluster is down" in str(error)
            assert not found.any()
            with pytest.raises(TierUnavailableError, match="cluster is down"):
                tier.insert(TAG, KEYS, rows_at(KEYS, 2))
            assert tier.down() == []
        finally:
            with owner.client() as client:
                client.execute_command("CLUSTER ADDSLOTS", slot)
            run_on_masters(cluster, "CONFIG SET", setting, "no")
        wait_for(lambda: complete(tier, 1))
        assert tier._health.failures == 0
    cluster.wait_until_stable()


def test_a_slot_without_a_server_is_found_when_it_has_one_again(
    cluster: RedisCluster,
) -> None:
    with opened(cluster.address) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        slot = tier._tables[TAG].slots[5]
        owner = cluster.owner(slot)
        partitions = [partition_of(key, N_PARTITIONS) for key in KEYS.tolist()]
        rest = np.array(partitions) != 5
        run_on_masters(cluster, "CLUSTER DELSLOTS", slot)
        try:
            _, found, error = fetch(tier)
            assert isinstance(error, TierUnavailableError)
            assert "Hash slot not served" in str(error)
            np.testing.assert_array_equal(found, rest)
            tier._topology.refresh()
            _, found, error = fetch(tier)
            assert isinstance(error, TierUnavailableError)
            assert f"no server of the cluster has slot {slot}" in str(error)
            np.testing.assert_array_equal(found, rest)
        finally:
            with owner.client() as client:
                client.execute_command("CLUSTER ADDSLOTS", slot)
        wait_for(lambda: complete(tier, 1))
        assert tier._health.failures == 0
    cluster.wait_until_stable()


def test_a_server_that_hangs_up_while_another_is_called_is_called_again(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are asked for over a new connection, and not forgotten."""
    connection_of = Node.connection
    with opened(cluster.address, timeout_s=5.0) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        for first, second, third in permutations(cluster.masters):
            assert complete(tier, 1)
            n_hung_up = 0

            def hang_up(
                node: Node, first: RedisServer = first, second: RedisServer = second
            ) -> Connection:
                nonlocal n_hung_up
                if node.name == second.address and n_hung_up == 0:
                    n_hung_up += 1
                    kill_clients(first)
                return connection_of(node)

            kill_clients(second)
            kill_clients(third)
            monkeypatch.setattr(Node, "connection", hang_up)
            assert complete(tier, 1)
            assert n_hung_up == 1
        assert tier._health.failures == 0


def kill_clients(node: RedisServer) -> None:
    """Close all connections of clients, and return once that is so."""
    with node.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        wait_for(lambda: len(client.client_list(_type="normal")) == 1)


def test_lookups_go_on_while_the_topology_is_asked_for(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    execute = redis.Redis.execute_command

    def slow(self: redis.Redis, *args: Any, **options: Any) -> Any:
        if args[0] == "CLUSTER SLOTS":
            asked.set()
            assert answer.wait(20)
        return execute(self, *args, **options)

    with opened(cluster.address) as tier:
        tier.insert(TAG, KEYS, rows_at(KEYS, 1))
        monkeypatch.setattr(redis.Redis, "execute_command", slow)
        tier._health.outdated()
        assert asked.wait(20)
        for _ in range(50):
            assert complete(tier, 1)
        tier.insert(TAG, KEYS, rows_at(KEYS, 2))
        assert complete(tier, 2)
        assert not answer.is_set()
        answer.set()
