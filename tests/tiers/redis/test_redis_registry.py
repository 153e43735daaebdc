"""Which tables there are, who loads them, and what a load promises other servers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest
import redis

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import (
    TierCorruptionError,
    TierTimeoutError,
    TierUnavailableError,
    UnknownTableError,
)
from hps_numba.tiers.redis import registry as registry_module
from hps_numba.tiers.redis import scanning
from hps_numba.tiers.redis import tier as tier_module
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.lease import Lease
from hps_numba.tiers.redis.registry import TABLES_KEY, Registry
from hps_numba.tiers.redis.scripts import LEASE_US
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.redis.writing import Writer
from hps_numba.types import Keys, RowBlock, Rows, TableSpec
from tests.support.redis_servers import RedisServer

SPEC = TableSpec("model", "table", 4)
KEYS = np.arange(100, dtype=np.int64)
LOCK = f"hps_et{{{SPEC.tag}}}loading"
FILES = {"files": [["key", 800, "0f"]]}
HOLDER = """
import sys
import redis
from hps_numba.tiers.redis.registry import Registry
from hps_numba.types import TableSpec
client = redis.Redis(port=int(sys.argv[1]))
spec = TableSpec("model", "table", 4)
with Registry(client, lock_s=float(sys.argv[2])).loading(spec):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return server.client()


@pytest.fixture(params=list(RedisLayout))
def tiers(
    server: RedisServer, request: pytest.FixtureRequest
) -> Iterator[list[RedisTier]]:
    """The tiers of two servers."""
    opened = [
        RedisTier(RedisOptions(server.address), num_partitions=2, layout=request.param)
        for _ in "ab"
    ]
    for tier in opened:
        tier.open_table(SPEC)
    yield opened
    for tier in opened:
        tier.close()


def rows(version: int, n_rows: int = KEYS.size) -> Rows:
    return np.full((n_rows, SPEC.dim), version, np.float32)


def versions(tier: RedisTier, keys: Keys = KEYS) -> list[int | None]:
    """Return the version of each row, None if there is none."""
    out, found = rows(-1, keys.size), np.zeros(keys.size, np.bool_)
    tier.fetch(SPEC.tag, keys, out, found)
    assert (out == out[:, :1]).all()
    return [
        int(v) if there else None for v, there in zip(out[:, 0], found, strict=True)
    ]


def halves(version: int, between: Callable[[], object]) -> Iterator[RowBlock]:
    """Yield all rows in two blocks, and call something between them."""
    yield RowBlock(KEYS[:50], rows(version, 50))
    between()
    yield RowBlock(KEYS[50:], rows(version, 50))


def test_a_second_server_waits_and_sees_what_was_loaded(
    tiers: list[RedisTier], client: redis.Redis
) -> None:
    first, second = tiers
    seen = []

    def load() -> None:
        with second.loading(SPEC.tag):
            seen.append(second.fingerprint(SPEC.tag))

    with ThreadPoolExecutor(1) as pool:
        with first.loading(SPEC.tag):
            waiting = pool.submit(load)
            first.load(SPEC.tag, [RowBlock(KEYS, rows(1))], fingerprint=FILES)
            assert seen == []
        waiting.result(timeout=30.0)
    assert seen == [FILES]
    assert client.get(LOCK) is None


def test_a_lock_is_renewed_as_long_as_it_is_held(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = threading.Semaphore(0)
    renew_once = registry_module._renew_once

    def counting(*args: object) -> None:
        renew_once(*args)  # type: ignore[arg-type]  # passed on
        renewed.release()

    monkeypatch.setattr(registry_module, "_renew_once", counting)
    with Registry(client, lock_s=0.5).loading(SPEC):
        holder = client.get(LOCK)
        for _ in range(12):  # more than twice as long as the lock lasts
            assert renewed.acquire(timeout=10.0)
        assert client.get(LOCK) == holder
    assert client.get(LOCK) is None


def test_the_lock_of_a_server_that_died_ends(
    server: RedisServer, client: redis.Redis
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(server.port), "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert client.pttl(LOCK) <= 1000
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Registry(client).loading(SPEC):
        assert client.pttl(LOCK) > 1000


def test_a_lost_lock_is_said_and_the_new_holder_keeps_it(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry(client).loading(SPEC):
        client.set(LOCK, "another server")
    assert client.get(LOCK) == b"another server"
    assert f"table={SPEC.tag} lock not released" in caplog.text


def test_readers_see_old_rows_or_new_ones_during_a_load(tiers: list[RedisTier]) -> None:
    first, second = tiers
    second.insert(SPEC.tag, KEYS, rows(1))
    during: list[list[int | None]] = []
    told: list[int] = []
    n_rows = first.load(
        SPEC.tag,
        halves(2, lambda: during.append(versions(second))),
        progress=told.append,
        fingerprint=FILES,
    )
    assert n_rows == 100
    assert told == [50, 50]
    assert during == [[2] * 50 + [1] * 50]
    assert versions(second) == [2] * 100
    assert second.fingerprint(SPEC.tag) == FILES


def test_of_an_update_and_a_load_the_later_write_of_a_key_stays(
    tiers: list[RedisTier],
) -> None:
    first, second = tiers
    absent = np.array([200, 201], np.int64)
    second.insert(SPEC.tag, np.append(KEYS, absent[:1]), rows(1, 101))

    def update() -> None:
        keys = np.array([3, 70, *absent], np.int64)
        second.insert(SPEC.tag, keys, rows(9, keys.size))

    first.load(SPEC.tag, halves(2, update))
    expected: list[int | None] = [2] * 100
    expected[3] = 9  # was loaded before; 70 was loaded after the update
    assert versions(second) == expected
    # One was a row of the old table, the other is new.
    assert versions(second, absent) == [None, 9]


def test_nothing_that_was_read_before_or_during_a_load_is_backfilled(
    tiers: list[RedisTier],
) -> None:
    first, second = tiers
    key = KEYS[:1]
    epochs = [second.epoch(SPEC.tag)]
    stored = []

    def offer() -> None:
        epochs.append(second.epoch(SPEC.tag))
        stored.append(second.backfill(SPEC.tag, key, rows(1, 1), epochs[-1]))
        epochs.append(second.epoch(SPEC.tag))

    first.load(SPEC.tag, halves(2, offer))
    stored += [second.backfill(SPEC.tag, key, rows(1, 1), e) for e in epochs]
    assert stored == [0, 0, 0, 0]
    assert versions(first, key) == [2]
    first.evict(SPEC.tag, key)
    assert second.backfill(SPEC.tag, key, rows(2, 1), second.epoch(SPEC.tag)) == 1


def test_a_load_that_fails_leaves_old_rows_and_new_ones_and_can_be_repeated(
    tiers: list[RedisTier],
) -> None:
    first, second = tiers
    first.load(SPEC.tag, [RowBlock(KEYS, rows(1))], fingerprint=FILES)

    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        first.load(SPEC.tag, halves(2, fail), fingerprint={"files": []})
    assert second.fingerprint(SPEC.tag) is None
    assert versions(second) == [2] * 50 + [1] * 50
    second.load(SPEC.tag, [RowBlock(KEYS, rows(3))], fingerprint={"files": []})
    assert versions(first) == [3] * 100
    assert first.fingerprint(SPEC.tag) == {"files": []}
    first.evict(SPEC.tag, KEYS[:1])
    first.backfill(SPEC.tag, KEYS[:1], rows(3, 1), first.epoch(SPEC.tag))
    assert first.backfill(SPEC.tag, KEYS[:1], rows(3, 1), first.epoch(SPEC.tag)) == 1


def test_a_load_during_which_another_one_began_fails(tiers: list[RedisTier]) -> None:
    first, second = tiers

    def load() -> None:
        second.load(SPEC.tag, [RowBlock(KEYS, rows(3))], fingerprint={"files": []})

    with pytest.raises(TierUnavailableError, match="another server loaded"):
        first.load(SPEC.tag, halves(2, load), fingerprint=FILES)
    assert first.fingerprint(SPEC.tag) == {"files": []}


def test_a_table_that_another_server_dropped_is_not_loaded(
    tiers: list[RedisTier],
) -> None:
    first, second = tiers
    with pytest.raises(TierUnavailableError, match="dropped the table"):
        first.load(SPEC.tag, halves(2, lambda: second.drop_table(SPEC.tag)))
    with pytest.raises(UnknownTableError, match="open it again"):
        first.load(SPEC.tag, [RowBlock(KEYS, rows(1))])
    first.open_table(SPEC)
    first.load(SPEC.tag, [RowBlock(KEYS, rows(1))], fingerprint=FILES)
    assert first.fingerprint(SPEC.tag) == FILES


def test_a_lease_is_renewed_and_one_that_passed_is_an_error() -> None:
    now_s, stamped = [100.0], []
    lease = Lease(stamped.append, SPEC.tag, monotonic=lambda: now_s[0])
    lease.begin()
    for now_s[0], n_renewed in ((109.0, 1), (111.0, 2), (120.0, 2), (140.0, 3)):
        lease.keep()
        assert stamped == [LEASE_US] * n_renewed
    now_s[0] = 169.0
    lease.end()
    assert stamped == [LEASE_US] * 4 + [0]
    lease.begin()
    now_s[0] = 199.0
    with pytest.raises(TierTimeoutError, match=r"took 30 s of the 30 s"):
        lease.end()
    assert stamped[-1] == LEASE_US


def test_the_lease_is_kept_while_a_large_table_is_listed_and_emptied(
    tiers: list[RedisTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiers
    first.load(SPEC.tag, [RowBlock(KEYS, rows(1))])
    now_s = [100.0]

    def slow(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            now_s[0] += 16.0
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    slow(redis.Redis, "scan")
    slow(redis.Redis, "hscan")
    slow(Writer, "evict")
    monkeypatch.setattr(scanning, "_PER_CALL", 30)
    monkeypatch.setattr(first._changer, "_max_keys", 30)
    leased = partial(Lease, monotonic=lambda: now_s[0])
    monkeypatch.setattr(tier_module, "Lease", leased)
    first.load(SPEC.tag, [RowBlock(KEYS[:10], rows(2, 10))], fingerprint=FILES)
    assert now_s[0] >= 100.0 + 5 * 16.0
    assert versions(second) == [2] * 10 + [None] * 90
    assert second.fingerprint(SPEC.tag) == FILES


def test_an_entry_that_is_not_understood_is_named(
    server: RedisServer, client: redis.Redis
) -> None:
    for entry in ("{", '{"model": "model"}', '{"colour": "red"}'):
        client.hset(TABLES_KEY, SPEC.tag, entry)
        with (
            closing(RedisTier(RedisOptions(server.address))) as tier,
            pytest.raises(TierCorruptionError, match=f"entry of {TABLES_KEY}"),
        ):
            tier.open_table(SPEC)
