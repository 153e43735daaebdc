"""A server that lags in the stream undoes nothing, in every order of the steps.

``HPS_TEST_ALL_ORDERS=1`` adds worlds that take half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.redis import applying
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.stream_scripts import SEEK
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.redis.tokens import Tokens
from hps_numba.types import Position, Rows, StreamSpan
from tests.support.orders import explore
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.two_followers import Followers, LookingBackfills, footprint
from tests.tiers.redis.two_servers import KEY, SPEC, STAMPS, Stage

pytestmark = pytest.mark.service

Tasks = Callable[[Followers], None]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(params=list(RedisLayout))
def stage(
    server: RedisServer, threads: ThreadPoolExecutor, request: pytest.FixtureRequest
) -> Iterator[Stage]:
    tiers = [
        RedisTier(RedisOptions(server.address), num_partitions=1, layout=request.param)
        for _ in "ab"
    ]
    for tier in tiers:
        tier.open_table(SPEC)
    with server.client() as client:
        yield Stage(threads, tiers, client, apart=True, queue=LookingBackfills)
    for tier in tiers:
        tier.close()


def spans_that_lag(s: Followers) -> None:
    s.apply("a", (0, 1), (1, 2), (2, 3))
    s.apply("b", (0, 1), (1, 2), (2, 3))


def spans_cut_elsewhere(s: Followers) -> None:
    s.apply("a", (0, 2), (2, 3))
    s.apply("b", (0, 1), (1, 3))


def a_long_span_and_a_short_one(s: Followers) -> None:
    s.apply("a", (0, 3))
    s.apply("b", (0, 1))


def spans_and_eviction(s: Followers) -> None:
    s.apply("a", (0, 1), (1, 2))
    s.apply("b", (0, 2))
    s.evict("a")


def spans_that_delete(s: Followers) -> None:
    s.apply("a", (0, 1), (1, 2), deleted=1)
    s.apply("b", (0, 1), (1, 2), deleted=1)
    s.evict("b")


def span_again_after_an_update(s: Followers) -> None:
    s.apply_and_update("a", 0, 1, version=9)
    s.apply("b", (0, 1))


def lookup_that_lags(s: Followers) -> None:
    s.apply("a", (0, 1))
    s.lookup("b")
    s.evict("a")


def lookup_that_lags_and_learns(s: Followers) -> None:
    lookup_that_lags(s)
    s.learn("b")


def lookup_that_lags_and_catches_up(s: Followers) -> None:
    s.apply("a", (0, 2))
    s.apply("b", (0, 1))
    s.lookup("b")
    s.evict("a")


def lookup_that_lags_behind_a_deletion(s: Followers) -> None:
    s.apply("a", (0, 1), deleted=0)
    s.lookup("b")
    s.learn("b")


def lookup_that_learns_and_catches_up(s: Followers) -> None:
    lookup_that_lags_and_catches_up(s)
    s.learn("b")


CASES = [
    spans_that_lag,
    spans_cut_elsewhere,
    a_long_span_and_a_short_one,
    spans_and_eviction,
    spans_that_delete,
    span_again_after_an_update,
    lookup_that_lags,
    lookup_that_lags_and_learns,
    lookup_that_lags_and_catches_up,
    lookup_that_lags_behind_a_deletion,
]
if os.environ.get("HPS_TEST_ALL_ORDERS"):
    CASES.append(lookup_that_learns_and_catches_up)


def world(
    stage: Stage, tasks: Tasks, kind: type[Followers] = Followers, *, warm: bool
) -> Callable[[], Followers]:
    def make() -> Followers:
        made = kind(stage, warm=warm)
        tasks(made)
        return made

    return make


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("tasks", CASES)
def test_no_order_brings_an_old_row_back(
    stage: Stage, tasks: Tasks, warm: bool
) -> None:
    seen = explore(world(stage, tasks, warm=warm), footprint)
    assert seen.schedules > 1
    assert [str(violation) for violation in seen.violations] == []


# Planted faults. Each must be seen, or the test above proves nothing.


def without(old: str, new: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """Return what takes a line out of the script."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        assert applying.APPLY.count(old) == 1
        patch.setattr(applying, "APPLY", applying.APPLY.replace(old, new))

    return plant


COMPARES = "if known and not before(known, till) then done = 0\nelseif"
SETS = "redis.call('HSET', KEYS[1], 'stream', place(stream, partition, till))"


@pytest.mark.parametrize(
    ("tasks", "plant"),
    [
        pytest.param(
            spans_that_lag, without(COMPARES, "if"), id="positions are not compared"
        ),
        pytest.param(
            spans_that_lag,
            without("offset < other or offset == other and", "offset == other and"),
            id="offsets are not compared",
        ),
        pytest.param(
            span_again_after_an_update,
            without("not before(known, till)", "before(till, known)"),
            id="a span that ends at the position is written again",
        ),
        pytest.param(
            a_long_span_and_a_short_one,
            without(SETS),
            id="no position follows what is written",
        ),
        pytest.param(
            lookup_that_lags,
            without("stamp(KEYS[1], buckets)\n"),
            id="a span stamps nothing",
        ),
    ],
)
def test_a_fault_planted_in_the_script_is_seen(
    stage: Stage,
    tasks: Tasks,
    plant: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    made = world(stage, tasks, warm=True)
    assert explore(made, footprint, stop_at_first=True).violations


class PositionsLater(Followers):
    """Sets the position in another transaction than the rows."""

    def write(self, name: str, rows: Rows | None, given: StreamSpan) -> None:
        with pytest.MonkeyPatch.context() as patch:
            without(SETS)(patch)
            super().write(name, rows, given)
        self._stage.point(f"{name}.redis.position")
        place = (given.partition, str(given.until))
        self._stage.client.eval(SEEK, 1, STAMPS, "all", *place)


class PositionsEarlier(Followers):
    """Claims the position before it writes the rows."""

    def write(self, name: str, rows: Rows | None, given: StreamSpan) -> None:
        nothing: Any = KEY[:0]
        tier = self._stage.servers[name].redis
        if not tier.positions(SPEC.tag)[given.partition] < given.until:
            return
        tier.apply(SPEC.tag, nothing, None, given)
        self._stage.point(f"{name}.redis.rows")
        tier.insert(SPEC.tag, KEY, rows)  # type: ignore[arg-type]  # nothing is deleted


@pytest.mark.parametrize("kind", [PositionsLater, PositionsEarlier])
def test_positions_in_another_transaction_are_seen(
    stage: Stage, kind: type[Followers]
) -> None:
    made = world(stage, spans_that_lag, kind, warm=True)
    assert explore(made, footprint, stop_at_first=True).violations


def every_number_is_a_token(tokens: Tokens, stored: object) -> bool:
    return True


def test_tokens_of_a_server_that_lags_are_seen(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokens, "_has", every_number_is_a_token)
    made = world(stage, lookup_that_lags_and_learns, warm=False)
    assert explore(made, footprint, stop_at_first=True).violations


def test_a_number_that_waits_is_no_token_before_its_positions_are_reached(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Tokens.reach

    def reach(tokens: Tokens, partition: int, position: Position) -> None:
        ours(tokens, partition, Position(position.offset + 1))

    monkeypatch.setattr(Tokens, "reach", reach)
    made = world(stage, lookup_that_lags_and_catches_up, warm=False)
    assert explore(made, footprint, stop_at_first=True).violations
