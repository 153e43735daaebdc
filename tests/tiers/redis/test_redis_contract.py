"""The Redis tier keeps every promise of a tier, in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import redis
from redis._parsers import _RESP2Parser

from hps_numba.config.enums import RedisLayout
from hps_numba.tiers.base import Tier
from hps_numba.tiers.redis.client import RedisOptions
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.tiers.testing import LastingTierContract
from hps_numba.types import Keys, Mask, Rows
from tests.support.redis_servers import RedisServer
from tests.tiers.redis.stored import StoredTable


class Suite(LastingTierContract):
    """Rows in a single server, which is empty for each new directory."""

    layout: ClassVar[RedisLayout]
    options: ClassVar[type[RedisOptions]] = RedisOptions

    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self._address = server.address
        self._last: Path | None = None

    def make_tier(self, directory: Path) -> Tier:
        if directory != self._last:
            with redis.Redis.from_url(f"redis://{self._address}") as client:
                client.flushall()
        self._last = directory
        return RedisTier(
            self.options(self._address), layout=self.layout, num_partitions=4
        )

    def write_beneath(self, tier: Tier, tag: str, keys: Keys, rows: Rows) -> None:
        with StoredTable(self._address, tag, self.layout, 4) as stored:
            for key, row in zip(keys.tolist(), rows, strict=True):
                stored.put(key, row.tobytes())

    def read_beneath(self, tier: Tier, tag: str, keys: Keys) -> tuple[Rows, Mask]:
        with StoredTable(self._address, tag, self.layout, 4) as stored:
            values = [stored.get(key) for key in keys.tolist()]
        width = max(len(value or b"") for value in values)
        rows = b"".join(value or bytes(width) for value in values)
        return (
            np.frombuffer(rows, np.float32).reshape(keys.size, -1),
            np.array([value is not None for value in values]),
        )


class TestStrings(Suite):
    layout = RedisLayout.STRINGS


class TestHashes(Suite):
    layout = RedisLayout.HASHES


class Plain(RedisOptions):
    """The older protocol, parsed in Python: what redis-py does without hiredis."""

    def connection_kwargs(self) -> dict[str, Any]:
        return super().connection_kwargs() | {
            "protocol": 2,
            "parser_class": _RESP2Parser,
        }


class TestPlainly(Suite):
    layout = RedisLayout.STRINGS
    options = Plain
