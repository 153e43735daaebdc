"""Spans of the update stream in Redis when servers, slots or memory fail them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import (
    StreamGapError,
    TierError,
    TierUnavailableError,
)
from hps_numba.tiers.host_table import Overflow
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.exchange import Exchange, Unit
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import Keys, OverflowPolicy, Position, StreamSpan
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.limited import uses_in
from tests.tiers.redis.stored import partition_of
from tests.tiers.redis.versions import SPEC, rows_at, versions_of

pytestmark = pytest.mark.service

TAG = SPEC.tag
N_PARTITIONS = 6
KEYS = np.arange(900, dtype=np.int64) * 31 - 5000
PARTITIONS = np.array([partition_of(key, N_PARTITIONS) for key in KEYS.tolist()])
LAYOUTS = pytest.mark.parametrize("layout", list(RedisLayout))
STREAM = 2  # the partition of the stream


def span(since: int, until: int) -> StreamSpan:
    return StreamSpan(STREAM, Position(since), Position(until))


@contextmanager
def opened(
    where: RedisServer | RedisCluster,
    layout: RedisLayout = RedisLayout.STRINGS,
    **options: Any,
) -> Iterator[RedisTier]:
    given = RedisOptions(where.address, timeout_s=2.0)
    tier = RedisTier(given, num_partitions=N_PARTITIONS, layout=layout, **options)
    try:
        tier.open_table(SPEC)
        yield tier
    finally:
        tier.close()


def apply(tier: RedisTier, version: int, since: int, keys: Keys = KEYS) -> int:
    """Apply one message, of a version of all keys."""
    return tier.apply(TAG, keys, rows_at(keys, version), span(since, since + 1))


def versions_in(tier: RedisTier, keys: Keys = KEYS) -> set[int]:
    """Return the versions that there are; 0 is that of a missing row."""
    out, found = np.empty((keys.size, SPEC.dim), np.float32), np.zeros(keys.size, bool)
    tier.fetch(TAG, keys, out, found)
    versions = set(versions_of(keys[found], out[found]).tolist())
    return versions if found.all() else versions | {0}


def set_position(client: Any, partition: int, text: str) -> None:
    """Set what one partition has, as a replica that took over may have it."""
    client.hset(f"hps_et{{{TAG}/p{partition}}}s", "stream", text)


class Killed(BaseException):
    """The end of a process."""


def killed_after(n_units: int, patch: pytest.MonkeyPatch) -> None:
    """Let no more than so many scripts of a span be sent."""
    ours = Exchange.run

    def run(
        self: Exchange,
        units: Iterable[Unit],
        slots: Sequence[int],
        *,
        confirmed: bool = False,
    ) -> None:
        ours(self, islice(units, n_units), slots, confirmed=confirmed)
        raise Killed

    patch.setattr(Exchange, "run", run)


@LAYOUTS
@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_spans_of_servers_that_are_killed_are_made_whole_by_others(
    kind: str, layout: RedisLayout, request: pytest.FixtureRequest
) -> None:
    where = request.getfixturevalue(kind)
    with opened(where, layout) as first, opened(where, layout) as second:
        assert apply(first, 1, 0) == KEYS.size
        for n in range(N_PARTITIONS + 1):
            version, since = 2 * n + 2, 2 * n + 1
            with pytest.MonkeyPatch.context() as patch:
                killed_after(n, patch)
                with pytest.raises(Killed):
                    apply(first, version, since)
            done = int(np.isin(PARTITIONS, range(n)).sum())
            at = Position(since + (n == N_PARTITIONS))
            assert first.positions(TAG) == {STREAM: at}
            assert apply(second, version, since) == KEYS.size - done
            assert versions_in(first) == {version}
            n_keys = second.apply(TAG, KEYS, None, span(since, since + 2))
            assert n_keys == KEYS.size
            assert apply(first, version, since) == 0
            assert versions_in(first) == {0}
            assert first.positions(TAG) == {STREAM: Position(since + 2)}


@LAYOUTS
def test_a_partition_that_lost_writes_has_them_given_again(
    server: RedisServer, layout: RedisLayout
) -> None:
    with opened(server, layout) as tier, server.client() as client:
        for n in range(8):
            apply(tier, n + 1, n)
        set_position(client, 3, f" {STREAM}=5:2")
        set_position(client, 4, f" {STREAM}=6:0 7=1:0")
        lost = np.isin(PARTITIONS, [3, 4])
        with pytest.raises(StreamGapError, match="up to 5:2") as caught:
            apply(tier, 9, 8)
        assert (caught.value.offset, caught.value.record) == (5, 2)
        assert versions_in(tier, KEYS[~lost]) == {9}
        assert versions_in(tier, KEYS[lost]) == {8}
        assert tier.positions(TAG) == {STREAM: Position(5, 2), 7: Position(1)}
        again = StreamSpan(STREAM, Position(5, 2), Position(9))
        assert tier.apply(TAG, KEYS, rows_at(KEYS, 9), again) == lost.sum()
        assert versions_in(tier) == {9}
        assert tier.positions(TAG)[STREAM] == Position(9)


def test_redis_without_data_begins_anywhere(server: RedisServer) -> None:
    with opened(server) as tier, server.client() as client:
        apply(tier, 1, 0)
        client.flushall()
        assert tier.positions(TAG) == {}
        assert apply(tier, 6, 5) == KEYS.size
        assert tier.positions(TAG) == {STREAM: Position(6)}
        assert versions_in(tier) == {6}


@LAYOUTS
def test_a_server_without_memory_takes_no_part_of_a_span(layout: RedisLayout) -> None:
    with (
        RedisServer({"maxmemory-policy": "noeviction"}) as server,
        opened(server, layout) as tier,
        server.client() as client,
    ):
        apply(tier, 1, 0)
        client.config_set("maxmemory", "100kb")
        for _ in range(2):
            with pytest.raises(TierUnavailableError, match="memory limit"):
                apply(tier, 2, 1)
        assert versions_in(tier) == {1}
        assert tier.positions(TAG) == {STREAM: Position(1)}
        assert tier.down() == []
        client.config_set("maxmemory", "0")
        assert apply(tier, 2, 1) == KEYS.size
        assert versions_in(tier) == {2}


def a_row_moves(layout: RedisLayout, partition: int) -> list[bytes]:
    """Return the keys in Redis that are moved first: a row, or all of them."""
    prefix = f"hps_et{{{TAG}/p{partition}}}".encode()
    if layout is RedisLayout.HASHES:
        return [prefix + b"v"]
    return [prefix + KEYS[partition == PARTITIONS][:1].tobytes()]


@LAYOUTS
@pytest.mark.parametrize("parts", ["nothing", "stamps", "rows"])
def test_a_span_waits_for_a_slot_to_arrive(
    cluster: RedisCluster, layout: RedisLayout, parts: str
) -> None:
    partition = 4
    with opened(cluster, layout) as tier, opened(cluster, layout) as other:
        apply(tier, 1, 0)
        slot = tier._tables[TAG].slots[partition]
        owner = cluster.owner(slot)
        target = next(node for node in cluster.masters if node is not owner)
        move = cluster.begin_move(slot, target)
        if parts == "stamps":
            move.migrate(f"hps_et{{{TAG}/p{partition}}}s".encode())
        elif parts == "rows":
            move.migrate(*a_row_moves(layout, partition))
        mine = partition == PARTITIONS
        whole = parts == "nothing" and layout is RedisLayout.HASHES
        if whole:  # all that the script needs is on the first server
            assert apply(tier, 2, 1) == KEYS.size
        for _ in range(0 if whole else 2):
            with pytest.raises(TierUnavailableError, match="on its way"):
                apply(tier, 2, 1)
            assert versions_in(tier, KEYS[mine]) == {1}
            assert versions_in(tier, KEYS[~mine]) == {2}
            assert tier.positions(TAG) == {STREAM: Position(1)}
        while move.migrate_keys(100):
            pass
        move.end()
        assert apply(other, 2, 1) == (0 if whole else mine.sum())
        assert apply(tier, 3, 2) == KEYS.size
        assert versions_in(other) == {3}
        assert tier._health.failures == 0


@LAYOUTS
@pytest.mark.parametrize("policy", list(OverflowPolicy))
def test_spans_keep_partitions_to_their_margins(
    server: RedisServer, layout: RedisLayout, policy: OverflowPolicy
) -> None:
    margin = 40
    overflow = Overflow(policy, margin, 0.5)
    with (
        opened(server, layout, overflow=overflow) as tier,
        server.client() as client,
    ):
        for n in range(3):
            apply(tier, n + 1, n)
            tier.drain()
            assert tier.size(TAG) <= N_PARTITIONS * margin
        kept = np.concatenate([block.keys for block in tier.iterate(TAG)])
        gone, left = kept[::2].copy(), kept[1::2]
        assert tier.apply(TAG, gone, None, span(3, 4)) == gone.size
        assert tier.size(TAG) == left.size
        noted = {key for p in range(N_PARTITIONS) for key in uses_in(client, p, TAG)}
        notes = policy is not OverflowPolicy.EVICT_RANDOM
        expected = notes or layout is RedisLayout.STRINGS
        assert noted == (set(left.tolist()) if expected else set())


def test_only_a_server_whose_lower_tier_has_the_stream_backfills(
    server: RedisServer,
) -> None:
    rows = rows_at(KEYS, 1)
    with opened(server) as ahead:
        apply(ahead, 1, 0)
        ahead.evict(TAG)
    with opened(server) as tier, opened(server) as other:
        assert tier.backfill(TAG, KEYS, rows, tier.epoch(TAG)) == 0
        tier.lower_positions(TAG, {STREAM: Position(0, 99)})
        assert tier.backfill(TAG, KEYS, rows, tier.epoch(TAG)) == 0
        tier.lower_positions(TAG, {STREAM: Position(1)})
        assert tier.backfill(TAG, KEYS, rows, tier.epoch(TAG)) == KEYS.size
        assert other.backfill(TAG, KEYS, rows, other.epoch(TAG)) == 0


def test_a_server_that_catches_up_backfills_again(server: RedisServer) -> None:
    with opened(server) as ahead, opened(server) as behind:
        assert apply(behind, 1, 0) == KEYS.size
        tokens: list[Any] = [behind.epoch(TAG)]
        apply(ahead, 2, 1)
        apply(ahead, 3, 2)
        ahead.evict(TAG)

        def backfilled(version: int, token: Any) -> int:
            return behind.backfill(TAG, KEYS, rows_at(KEYS, version), token)

        assert backfilled(1, tokens[0]) == 0
        assert backfilled(1, behind.epoch(TAG)) == 0  # it lacks what the others have
        assert apply(behind, 2, 1) == 0
        assert backfilled(2, behind.epoch(TAG)) == 0
        assert apply(behind, 3, 2) == 0
        assert backfilled(3, behind.epoch(TAG)) == KEYS.size


def test_a_server_that_was_sought_back_backfills_when_it_has_caught_up(
    server: RedisServer,
) -> None:
    with opened(server) as tier, opened(server) as other:
        for n in range(3):
            apply(tier, n + 1, n)
        tier.seek(TAG, {STREAM: Position(1)})
        assert other.positions(TAG) == {STREAM: Position(1)}
        again = StreamSpan(STREAM, Position(1), Position(3))
        other.apply(TAG, KEYS, rows_at(KEYS, 3), again)
        other.evict(TAG)
        for since in (1, 2):
            stale: Any = tier.epoch(TAG)
            assert tier.backfill(TAG, KEYS, rows_at(KEYS, 1), stale) == 0
            assert tier.backfill(TAG, KEYS, rows_at(KEYS, 1), tier.epoch(TAG)) == 0
            assert apply(tier, since + 1, since) == 0
        token = tier.epoch(TAG)
        assert tier.backfill(TAG, KEYS, rows_at(KEYS, 3), token) == KEYS.size


def test_a_span_that_failed_refuses_backfills_that_began_before(
    server: RedisServer,
) -> None:
    with opened(server) as tier:
        tier.seek(TAG, {STREAM: Position(0)})
        before = tier.epoch(TAG)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(0, patch)
            with pytest.raises(Killed):
                apply(tier, 2, 0)
        assert tier.backfill(TAG, KEYS, rows_at(KEYS, 1), before) == 0
        assert apply(tier, 2, 0) == KEYS.size


def test_a_first_span_that_failed_halfway_is_not_taken_for_applied(
    server: RedisServer,
) -> None:
    with opened(server) as tier:
        tier.begin_stream(TAG, {STREAM: Position(0)})
        with pytest.MonkeyPatch.context() as patch:
            killed_after(1, patch)
            with pytest.raises(Killed):
                apply(tier, 2, 0)
        assert tier.positions(TAG) == {STREAM: Position(0)}
        assert 0 < apply(tier, 2, 0) < KEYS.size
        assert versions_in(tier) == {2}


def test_a_stream_begins_only_where_it_has_not_begun(server: RedisServer) -> None:
    with opened(server) as tier, server.client() as client:
        apply(tier, 2, 1)
        tier.begin_stream(TAG, {STREAM: Position(1), 1: Position(7)})
        assert tier.positions(TAG) == {STREAM: Position(2), 1: Position(7)}
        set_position(client, 0, "")
        tier.begin_stream(TAG, {STREAM: Position(1)})
        assert tier.positions(TAG)[STREAM] == Position(1)
        assert 0 < apply(tier, 2, 1) < KEYS.size  # in that partition


def test_updates_need_no_positions(server: RedisServer) -> None:
    with opened(server) as tier, opened(server) as other:
        apply(tier, 1, 0)
        before = tier.epoch(TAG)
        other.insert(TAG, KEYS, rows_at(KEYS, 5))
        assert versions_in(tier) == {5}
        other.evict(TAG)
        assert tier.backfill(TAG, KEYS, rows_at(KEYS, 1), before) == 0
        assert apply(tier, 6, 1) == KEYS.size
        assert versions_in(other) == {6}


def test_a_position_that_is_no_position_takes_no_server_down(
    server: RedisServer,
) -> None:
    with opened(server) as tier, server.client() as client:
        apply(tier, 1, 0)
        set_position(client, 0, f" {STREAM}=x")
        with pytest.raises(TierError, match="compare"):
            apply(tier, 2, 1)
        assert tier.down() == []
        tier.seek(TAG, {STREAM: Position(1)})
        assert apply(tier, 2, 1) == KEYS.size
