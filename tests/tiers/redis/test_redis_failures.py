"""A server that fails, stalls, lies or is full gives errors and never a wrong row."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from redis.connection import Connection

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import (
    ClosedError,
    TierCorruptionError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from hps_numba.tiers.redis import channel as channel_module
from hps_numba.tiers.redis import health as health_module
from hps_numba.tiers.redis.client import SPARE_CONNECTIONS, RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.redis.topology import Node
from hps_numba.types import Keys, Mask, Rows, TableSpec
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.redis_servers import RedisServer, wait_for
from tests.support.sockets import open_sockets
from tests.tiers.redis.stored import StoredTable, partition_of
from tests.tiers.redis.versions import SPEC, UNTOUCHED, rows_at, versions_of

pytestmark = [pytest.mark.service, pytest.mark.fault]

TAG = SPEC.tag
STRINGS, HASHES = RedisLayout.STRINGS, RedisLayout.HASHES
DOWN = "is down since .* it is asked again in the background"


@pytest.fixture
def forgiving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that failed just before is asked as soon as one that never did."""
    monkeypatch.setattr(health_module, "CALM_S", 0.0)


@pytest.fixture
def open_tier() -> Iterator[Callable[..., RedisTier]]:
    tiers: list[RedisTier] = []

    def make(
        address: str,
        *,
        layout: RedisLayout = STRINGS,
        spec: TableSpec = SPEC,
        num_partitions: int = 4,
        **options: Any,
    ) -> RedisTier:
        options = {"timeout_s": 5.0, **options}
        tier = RedisTier(
            RedisOptions(address, **options),
            num_partitions=num_partitions,
            layout=layout,
        )
        tiers.append(tier)
        tier.open_table(spec)
        return tier

    yield make
    for tier in tiers:
        tier.close()


def fetch(tier: RedisTier, keys: Keys) -> tuple[Rows, Mask, TierError | None]:
    """Return what a fetch filled in, and what it raised."""
    rows = np.full((keys.size, SPEC.dim), UNTOUCHED)
    found = np.zeros(keys.size, np.bool_)
    error = None
    try:
        n_found = tier.fetch(TAG, keys, rows, found)
    except TierError as exc:
        error = exc
    else:
        assert n_found == np.count_nonzero(found)
    assert (rows[~found] == UNTOUCHED).all()
    return rows, found, error


def assert_version(tier: RedisTier, keys: Keys, version: int) -> None:
    rows, found, error = fetch(tier, keys)
    assert error is None
    assert found.all()
    assert (versions_of(keys, rows) == version).all()


def filled(n: int, version: int = 1) -> tuple[Keys, Rows]:
    keys = np.arange(n, dtype=np.int64) * 7919 - 1000
    return keys, rows_at(keys, version)


@pytest.mark.parametrize(
    ("kind", "protocol", "layout"),
    [
        ("close", 2, STRINGS),
        ("reset", 3, STRINGS),
        ("reset", 2, HASHES),
        ("close", 3, HASHES),
    ],
)
def test_replies_cut_at_any_byte_give_right_rows_or_an_error(
    server: RedisServer,
    open_tier: Callable[..., RedisTier],
    kind: str,
    protocol: int,
    layout: RedisLayout,
) -> None:
    keys, rows = filled(12)
    with FaultyProxy(server.port, largest=40) as proxy:
        tier = open_tier(proxy.address, protocol=protocol, layout=layout)
        tier.insert(TAG, keys, rows)
        assert_version(tier, keys, 1)
        proxy.plan()
        assert_version(tier, keys, 1)
        n_reply = proxy.n_bytes
        assert n_reply > 12 * (SPEC.row_bytes + 7)
        n_failed = n_cut = 0
        for at in range(n_reply):
            proxy.plan(Fault(kind, at))
            got, found, error = fetch(tier, keys)
            assert (versions_of(keys[found], got[found]) == 1).all()
            assert error is not None or found.all()
            n_failed += error is not None
            n_cut += not proxy.pending
            proxy.plan()
            wait_for(lambda: not tier.down())
            assert_version(tier, keys, 1)
        assert n_cut == n_reply
        # A connection that ends is opened again within the lookup.
        assert n_failed == 0
        tier.close()


@pytest.mark.usefixtures("forgiving")
def test_greetings_cut_at_any_byte_fail_or_are_said_again(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(12)
    with FaultyProxy(server.port, largest=40) as proxy:
        tier = open_tier(proxy.address)
        tier.insert(TAG, keys, rows)
        n_failed = 0
        for at in range(0, 300, 2):
            assert_version(tier, keys, 1)
            proxy.plan(Fault("close", at))
            with server.client() as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal")
            got, found, error = fetch(tier, keys)
            assert (versions_of(keys[found], got[found]) == 1).all()
            assert error is not None or found.all()
            n_failed += error is not None
            proxy.plan()
            wait_for(lambda: not tier.down())
        assert n_failed > 0
        tier.close()


@pytest.mark.usefixtures("forgiving")
@pytest.mark.parametrize("layout", [STRINGS, HASHES])
def test_a_reply_that_stalls_ends_with_the_rows_before_it(
    server: RedisServer, open_tier: Callable[..., RedisTier], layout: RedisLayout
) -> None:
    keys, rows = filled(2000)
    generator = np.random.default_rng(5)
    with FaultyProxy(server.port) as proxy:
        tier = open_tier(proxy.address, timeout_s=0.1, layout=layout)
        tier.insert(TAG, keys, rows)
        assert_version(tier, keys, 1)
        proxy.plan()
        assert_version(tier, keys, 1)
        for at in generator.integers(0, proxy.n_bytes, 10).tolist():
            proxy.plan(Fault("stall", at))
            got, found, error = fetch(tier, keys)
            assert isinstance(error, TierTimeoutError)
            assert f"127.0.0.1:{proxy.port}" in str(error)
            assert (versions_of(keys[found], got[found]) == 1).all()
            n_whole = at // (SPEC.row_bytes + 7)  # but for headers of replies
            assert n_whole - 20 <= np.count_nonzero(found) <= n_whole
            wait_for(lambda: not tier.down())
            assert_version(tier, keys, 1)
        tier.close()


@pytest.mark.usefixtures("forgiving")
def test_a_reply_that_is_no_answer_takes_all_rows_before_it_along(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(2000)
    with FaultyProxy(server.port) as proxy:
        tier = open_tier(proxy.address)
        tier.insert(TAG, keys, rows)
        assert_version(tier, keys, 1)
        for data in (b"$3\r\n", b"*1\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"\0"):
            proxy.plan(Fault("insert", 30_000, data))
            found = np.zeros(keys.size, np.bool_)
            with pytest.raises(TierCorruptionError, match="does not fit the command"):
                tier.fetch(TAG, keys, np.empty_like(rows), found)
            assert not proxy.pending
            assert not found.any()
            wait_for(lambda: not tier.down())
            assert_version(tier, keys, 1)
        tier.close()


@pytest.mark.usefixtures("forgiving")
def test_a_greeting_that_is_none_is_no_connection(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(50)
    with FaultyProxy(server.port) as proxy:
        tier = open_tier(proxy.address)
        tier.insert(TAG, keys, rows)
        for data in (b"*0\r\n", b":1\r\n", b"$-1\r\n", b"+OK\r\n", b"HTTP/1.1 400\r\n"):
            assert_version(tier, keys, 1)
            proxy.plan()
            with server.client() as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal")
            proxy.plan(Fault("insert", 0, data))
            with pytest.raises(TierCorruptionError, match=f"{proxy.port}: "):
                tier.fetch(TAG, keys, np.empty_like(rows), np.zeros(keys.size, bool))
            assert not proxy.pending
            wait_for(lambda: not tier.down())
            assert_version(tier, keys, 1)
        tier.close()


def test_half_a_message_behind_the_last_reply_is_not_part_of_the_next(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    """The second half looks like the reply to a command for one key."""
    key, row = filled(1)
    wrong = rows_at(key, 9).tobytes()
    halves = (
        b">2\r\n$10\r\ninvalidate\r\n",
        b"*1\r\n$%d\r\n%s\r\n" % (len(wrong), wrong),
    )
    with FaultyProxy(server.port) as proxy:
        tier = open_tier(proxy.address)
        tier.insert(TAG, key, row)
        assert_version(tier, key, 1)
        proxy.plan()
        assert_version(tier, key, 1)
        n_reply, n_before = proxy.n_bytes, proxy.n_connections
        proxy.plan(
            Fault("insert", n_reply, halves[0]),
            Fault("insert", n_reply, halves[1], late=True),
        )
        assert_version(tier, key, 1)
        assert proxy.pending == 1
        assert_version(tier, key, 1)
        assert proxy.n_connections == n_before + 1
        tier.close()


def test_messages_that_the_server_pushes_are_skipped(
    server: RedisServer,
    open_tier: Callable[..., RedisTier],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each write of another client is told to connections that track all keys."""
    connection_of, end_of_reply = Node.connection, channel_module.read.end_of_reply
    n_messages = 0

    def tracking(node: Node) -> Connection:
        connection = connection_of(node)
        connection.send_command("CLIENT", "TRACKING", "ON", "BCAST")
        assert connection.read_response() == b"OK"
        return connection

    def counting(*args: Any) -> int:
        nonlocal n_messages
        n_messages += 1
        return int(end_of_reply(*args))

    keys, rows = filled(4000)
    tier = open_tier(server.address)
    tier.insert(TAG, keys, rows)
    monkeypatch.setattr(channel_module.read, "end_of_reply", counting)
    monkeypatch.setattr(Node, "connection", tracking)
    stop = threading.Event()

    def write() -> None:
        with server.client() as client:
            while not stop.is_set():
                client.mset({f"other{i}": i for i in range(50)})

    def read_again() -> bool:
        assert_version(tier, keys, 1)
        return n_messages > 20

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            wait_for(read_again, what="messages in the middle of replies")
        finally:
            stop.set()
        writing.result()


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_connection_that_the_server_closed_is_opened_again(
    server: RedisServer, open_tier: Callable[..., RedisTier], protocol: int
) -> None:
    keys, rows = filled(3000)
    tier = open_tier(server.address, protocol=protocol)
    tier.insert(TAG, keys, rows)
    with server.client() as client:
        for version in range(2, 6):
            assert_version(tier, keys, version - 1)
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert_version(tier, keys, version - 1)
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            tier.insert(TAG, keys, rows_at(keys, version))
    assert tier._health.failures == 0


def test_connections_that_were_idle_for_too_long_are_opened_again(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(100)
    tier = open_tier(server.address)
    tier.insert(TAG, keys, rows)
    assert_version(tier, keys, 1)
    with server.client() as client:
        client.config_set("timeout", 1)
        wait_for(lambda: len(client.client_list()) == 1, what="time-outs of clients")
        client.config_set("timeout", 0)
    assert_version(tier, keys, 1)
    tier.insert(TAG, keys, rows_at(keys, 2))
    assert_version(tier, keys, 2)
    assert tier._health.failures == 0


def test_a_paused_server_costs_one_time_out_and_is_found_again(
    open_tier: Callable[..., RedisTier],
) -> None:
    keys, rows = filled(3000)
    with RedisServer() as server:
        tier = open_tier(server.address, timeout_s=0.2)
        tier.insert(TAG, keys, rows)
        assert_version(tier, keys, 1)
        server.pause()
        _, found, error = fetch(tier, keys)
        assert isinstance(error, TierTimeoutError)
        assert server.address in str(error)
        assert not found.any()
        for _ in range(50):
            with pytest.raises(TierUnavailableError, match=f"{server.address} {DOWN}"):
                tier.fetch(TAG, keys, np.empty_like(rows), np.zeros(keys.size, bool))
            with pytest.raises(TierUnavailableError, match=DOWN):
                tier.insert(TAG, keys, rows)
            with pytest.raises(TierUnavailableError, match=DOWN):
                tier.backfill(TAG, keys, rows, tier.epoch(TAG))
        assert tier._health.failures == 1
        (state,) = tier.down()
        assert state.name == server.address
        server.resume()
        wait_for(lambda: not tier.down())
        assert_version(tier, keys, 1)
        tier.insert(TAG, keys, rows_at(keys, 2))
        assert_version(tier, keys, 2)
        assert tier._health.failures == 1
        tier.close()


def test_lookups_that_wait_behind_a_time_out_have_none_of_their_own(
    open_tier: Callable[..., RedisTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections, sixteen lookups: two time-outs and not sixteen."""
    keys, rows = filled(100)
    with RedisServer() as server:
        tier = open_tier(server.address, timeout_s=0.3, max_connections=2)
        tier.insert(TAG, keys, rows)
        server.pause()
        start = threading.Barrier(16)

        def look(_: int) -> TierError | None:
            start.wait()
            return fetch(tier, keys)[2]

        with ThreadPoolExecutor(16) as pool:
            errors = list(pool.map(look, range(16)))
        late = [isinstance(error, TierTimeoutError) for error in errors]
        assert 1 <= sum(late) <= 2
        assert all(isinstance(error, TierUnavailableError) for error in errors) is False
        assert all(
            isinstance(error, TierUnavailableError | TierTimeoutError)
            for error in errors
        )
        server.resume()
        tier.close()


def test_a_server_that_loads_its_data_is_waited_for(
    open_tier: Callable[..., RedisTier],
) -> None:
    keys, rows = filled(3000)
    delay_us = "500"  # for each key that is loaded
    config = {"save": "3600 1", "rdbcompression": "no", "key-load-delay": delay_us}
    with RedisServer(config) as server:
        tier = open_tier(server.address)
        tier.insert(TAG, keys, rows)
        with server.client() as client:  # every 2 MB a server that loads looks up
            client.mset({f"other{i}": bytes(1 << 18) for i in range(64)})
        server.stop()  # which saves
        server.start(wait=False)
        reasons = set()

        def loading() -> bool:
            error = fetch(tier, keys)[2]
            assert error is not None
            reasons.update(state.reason for state in tier.down())
            return any("loading" in reason for reason in reasons)

        wait_for(loading, what="a server that loads")
        assert server.log.count("Ready to accept connections") == 1
        with server.client() as client:
            wait_for(lambda: client.config_set("key-load-delay", 0))
        server.wait_until_ready(n_starts=2)
        wait_for(lambda: not tier.down())
        assert_version(tier, keys, 1)
        tier.insert(TAG, keys, rows_at(keys, 2))
        assert_version(tier, keys, 2)
        tier.close()


def test_a_key_of_another_type_is_reported_or_read_as_missing(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(500)
    for layout in (STRINGS, HASHES):
        server.client().flushall()
        tier = open_tier(server.address, layout=layout)
        tier.insert(TAG, keys, rows)
        with server.client() as client:
            of_partition = sorted(client.keys("hps_et{*/p2}*"))
            broken = next(name for name in of_partition if not name.endswith(b"s"))
            client.delete(broken)
            client.rpush(broken, "a", "list")
        got, found, error = fetch(tier, keys)
        assert (versions_of(keys[found], got[found]) == 1).all()
        if layout is STRINGS:  # to MGET there is no such key
            assert error is None
            assert np.count_nonzero(~found) == 1
            tier.insert(TAG, keys, rows_at(keys, 2))
            assert_version(tier, keys, 2)
        else:
            assert isinstance(error, TierCorruptionError)
            assert f"{server.address}: a key of the table has another type" in str(
                error
            )
            assert error.tag == TAG
            others = partitions(keys) != 2
            np.testing.assert_array_equal(found, others)
        assert tier.down() == []


@pytest.mark.parametrize("layout", [STRINGS, HASHES])
def test_a_value_of_another_width_names_table_key_and_both_widths(
    server: RedisServer, open_tier: Callable[..., RedisTier], layout: RedisLayout
) -> None:
    keys, rows = filled(700)
    tier = open_tier(server.address, layout=layout)
    tier.insert(TAG, keys, rows)
    with StoredTable(server.address, TAG, layout, 4) as stored:
        for wrong in (b"", b"short", bytes(33), bytes(300_000)):
            stored.put(int(keys[333]), wrong)
            got, found, error = fetch(tier, keys)
            assert isinstance(error, TierCorruptionError)
            assert error.tag == TAG
            assert re.search(
                rf"{TAG}: 1 value\(s\) are no rows of dim 8, float32 \(32 bytes\); key "
                rf"{keys[333]} has {len(wrong)} bytes",
                str(error),
            )
            assert np.flatnonzero(~found).tolist() == [333]
            assert (versions_of(keys[found], got[found]) == 1).all()
    tier.insert(TAG, keys, rows_at(keys, 2))
    assert_version(tier, keys, 2)
    assert tier._health.failures == 0


@pytest.mark.parametrize("layout", [STRINGS, HASHES])
def test_a_server_without_memory_takes_no_rows_and_gives_those_it_has(
    open_tier: Callable[..., RedisTier], layout: RedisLayout
) -> None:
    keys, rows = filled(2000)
    with RedisServer({"maxmemory-policy": "noeviction"}) as server:
        tier = open_tier(server.address, layout=layout)
        tier.insert(TAG, keys, rows)
        epoch = tier.epoch(TAG)
        with server.client() as client:
            client.config_set("maxmemory", "100kb")
            more = keys + 1
            with pytest.raises(
                TierUnavailableError, match=f"{server.address}: .* memory limit"
            ):
                tier.insert(TAG, keys, rows_at(keys, 2))
            with pytest.raises(TierUnavailableError, match="memory limit"):
                tier.backfill(TAG, more, rows_at(more, 2), epoch)
            assert_version(tier, keys, 1)
            assert tier.down() == []
            tier.evict(TAG, keys[:500])
            assert not fetch(tier, keys[:500])[1].any()
            client.config_set("maxmemory", "0")
        tier.insert(TAG, keys, rows_at(keys, 3))
        assert_version(tier, keys, 3)
        tier.close()


def test_many_threads_share_few_connections(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    """Eight lookups of 100,000 keys at once: three of them wait, none fails."""
    keys, rows = filled(100_000)
    tier = open_tier(server.address, max_connections=5, layout=HASHES)
    tier.insert(TAG, keys, rows)
    start, most = threading.Barrier(8), []

    def look(seed: int) -> None:
        mine = np.random.default_rng(seed).permutation(keys)
        start.wait()
        for _ in range(2):
            assert_version(tier, mine, 1)
            with server.client() as client:
                most.append(len(client.client_list()))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))
    assert tier._health.failures == 0
    of_lookups, of_writes, of_this_test = 5, 2, 8
    assert max(most) <= of_lookups + of_writes + of_this_test


def test_connections_that_are_all_in_use_are_no_outage(
    server: RedisServer, open_tier: Callable[..., RedisTier]
) -> None:
    keys, rows = filled(10)
    tier = open_tier(server.address, max_connections=1, timeout_s=0.05)
    tier.insert(TAG, keys, rows)
    node = tier._topology.masters()[0]
    taken = [node.connection() for _ in range(1 + SPARE_CONNECTIONS)]
    _, _, error = fetch(tier, keys)
    assert isinstance(error, TierTimeoutError)
    assert str(error) == f"redis: all connections to {server.address} are in use"
    with pytest.raises(TierTimeoutError, match="are in use"):
        tier.insert(TAG, keys, rows)
    assert tier._health.failures == 0
    for connection in taken:
        node.give_back(connection)
    assert_version(tier, keys, 1)


def test_closing_beside_lookups_and_writes_ends_them_and_all_connections(
    server: RedisServer,
) -> None:
    keys, rows = filled(20_000)
    for _ in range(3):
        before = open_sockets()
        tier = RedisTier(RedisOptions(server.address, max_connections=3))
        tier.open_table(SPEC)
        tier.insert(TAG, keys, rows)
        looked = threading.Semaphore(0)

        def look(tier: RedisTier = tier, looked: Any = looked) -> None:
            while True:
                assert_version(tier, keys, 1)
                looked.release()

        def write(tier: RedisTier = tier) -> None:
            while True:
                tier.insert(TAG, keys, rows)

        def list_rows(tier: RedisTier = tier) -> None:
            while True:
                assert sum(len(block) for block in tier.iterate(TAG)) == keys.size

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(look) for _ in range(5)]
            jobs += [pool.submit(write), pool.submit(list_rows)]
            for _ in range(10):
                looked.acquire()
            tier.close()
            for job in jobs:
                with pytest.raises(ClosedError):
                    job.result(timeout=10)
        tier.close()
        assert open_sockets() == before


def test_a_closed_tier_leaves_no_connection_and_no_thread_behind() -> None:
    keys, rows = filled(1000)
    with RedisServer() as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        before = open_sockets()
        tier = RedisTier(RedisOptions(server.address, timeout_s=0.1))
        tier.open_table(SPEC)
        tier.insert(TAG, keys, rows)
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(lambda _: assert_version(tier, keys, 1), range(20)))
        server.pause()
        assert isinstance(fetch(tier, keys)[2], TierTimeoutError)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("hps-redis-health") == 1
        tier.close()
        server.resume()
        assert open_sockets() == before
        names = [thread.name for thread in threading.enumerate()]
        assert not any(name.startswith("hps-redis") for name in names)
        with pytest.raises(ClosedError):
            tier.fetch(TAG, keys, np.empty_like(rows), np.zeros(keys.size, bool))


def partitions(keys: Keys) -> Any:
    return np.array([partition_of(key, 4) for key in keys.tolist()])


@pytest.mark.usefixtures("forgiving")
@pytest.mark.parametrize("protocol", [2, 3])
def test_a_write_that_is_answered_with_something_else_is_not_acknowledged(
    server: RedisServer, protocol: int
) -> None:
    keys, rows = filled(20)
    with FaultyProxy(server.port) as proxy:
        for data in (b":1\r\n", b"*1\r\n:1\r\n", b"%1\r\n*0\r\n:1\r\n", b"_\r\n"):
            options = RedisOptions(proxy.address, protocol=protocol)
            with closing(RedisTier(options, num_partitions=2)) as tier:
                tier.open_table(SPEC)
                tier.insert(TAG, keys, rows)
                proxy.plan(Fault("insert", 0, 20 * data))
                with pytest.raises(TierCorruptionError, match="repl"):
                    tier.insert(TAG, keys, rows)
                assert not proxy.pending
                wait_for(lambda tier=tier: not tier.down())
                assert_version(tier, keys, 1)
