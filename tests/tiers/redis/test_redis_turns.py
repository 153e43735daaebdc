"""When the next batch may be asked for: all commands of the last are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from hps_numba.config.enums import RedisLayout
from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.redis import lane
from hps_numba.tiers.redis.channel import COMMANDS_IN_FLIGHT, KEYS_PER_COMMAND, Channel
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import TableSpec
from tests.oracle import versioned_rows
from tests.support.redis_servers import RedisServer

SPEC = TableSpec("model", "table", 4)
TIMEOUT_S = 5.0
KEYS = np.arange(KEYS_PER_COMMAND * (COMMANDS_IN_FLIGHT + 8), dtype=np.int64)
ROWS = versioned_rows(KEYS, 1, SPEC.dim)


@pytest.fixture(params=[1 << 20, 1000])
def tier(server: RedisServer, request: pytest.FixtureRequest) -> Iterator[RedisTier]:
    options = RedisOptions(server.address, timeout_s=TIMEOUT_S)
    with closing(
        RedisTier(
            options,
            num_partitions=1,
            layout=RedisLayout.HASHES,
            max_batch_size=request.param,
        )
    ) as tier:
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, KEYS, ROWS)
        yield tier


def test_what_is_not_answered_by_then_is_on_its_way(tier: RedisTier) -> None:
    out, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
    answered: list[int] = []
    hits = tier.fetch_and_tell(
        SPEC.tag, KEYS, out, found, lambda: answered.append(int(found.sum()))
    )
    assert hits == KEYS.size
    np.testing.assert_array_equal(out, ROWS)
    (before,) = answered
    assert before >= KEYS.size - COMMANDS_IN_FLIGHT * KEYS_PER_COMMAND


def test_a_server_that_is_down_has_nothing_left_to_be_asked(
    tier: RedisTier, server: RedisServer
) -> None:
    server.kill()
    try:
        out, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
        with pytest.raises(TierUnavailableError):
            tier.fetch_and_tell(SPEC.tag, KEYS, out, found, lambda: None)
        assert not found.any()
    finally:
        server.start()


def test_what_takes_this_process_long_is_no_silence_of_a_server(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_s = 0.0
    receive, clock = Channel.receive, lane.monotonic

    def slowly(channel: Channel) -> bool:
        nonlocal late_s
        late_s += 10 * TIMEOUT_S
        return receive(channel)

    monkeypatch.setattr(Channel, "receive", slowly)
    monkeypatch.setattr(lane, "monotonic", lambda: clock() + late_s)
    out, found = np.zeros_like(ROWS), np.zeros(KEYS.size, np.bool_)
    assert tier.fetch(SPEC.tag, KEYS, out, found) == KEYS.size
