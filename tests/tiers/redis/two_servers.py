"""One key in Redis, shared by two servers that a schedule steps through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache

import numpy as np
import redis

from hps_numba.runtime.chunk import Chunk
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.tiers.base import Tier
from hps_numba.tiers.redis.tier import RedisTier
from hps_numba.types import FailureMode, RowBlock, TableSpec
from tests.runtime.histories import DELETED, FIRST, LowerTier, SteppedBackfills, row
from tests.support.gates import Scheduler
from tests.support.orders import Footprint
from tests.support.wrappers import SteppedTier

SPEC = TableSpec("model", "table", 4)
KEY = np.array([7], np.int64)
OTHER = np.array([8], np.int64)
STAMPS = f"hps_et{{{SPEC.tag}/p0}}s"
HOUR_US = 3_600_000_000


class Server:
    """A hierarchy of its own over a Redis tier and a lower one."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        tiers: tuple[RedisTier, LowerTier],
        *,
        wrapper: Callable[[Tier, Callable[[str], None]], SteppedTier],
        queue: type[SteppedBackfills],
    ) -> None:
        self.name = name
        self.redis, self.lower = tiers
        wrapped = [wrapper(tiers[0], stage.point), SteppedTier(tiers[1], stage.point)]
        wrapped[0].name, wrapped[1].name = f"{name}.redis", f"{name}.lower"
        self.table = Hierarchy(
            SPEC,
            wrapped,
            backfills=queue(stage),  # type: ignore[arg-type]
            on_failure=FailureMode.RAISE,
            write_rows=8,
        )

    def learn(self) -> None:
        """See the present number of the partition, as by any other key's backfill."""
        epoch = self.redis.epoch(SPEC.tag)
        self.redis.backfill(SPEC.tag, OTHER, row(9), epoch)


class Stage:
    """Two servers, ``a`` and ``b``, for many histories, one after the other.

    Parameters
    ----------
    threads
        Where tasks run.
    redis_tiers
        The Redis tier of each server, with a single partition.
    client
        A back door to Redis.
    apart
        Whether each server has a lower tier of its own: that of ``a`` hears of no
        update.
    wrapper, queue
        Parts of both servers to use, such as ones with a planted fault.
    """

    def __init__(
        self,
        threads: Executor,
        redis_tiers: Sequence[RedisTier],
        client: redis.Redis,
        *,
        apart: bool = False,
        wrapper: Callable[[Tier, Callable[[str], None]], SteppedTier] = SteppedTier,
        queue: type[SteppedBackfills] = SteppedBackfills,
    ) -> None:
        self.threads = threads
        self.scheduler = Scheduler(threads)
        self.client = client
        self.apart = apart
        lowers = [LowerTier() for _ in range(1 + apart)]
        for lower in lowers:
            lower.open_table(SPEC)
        self.lower = lowers[-1]  # that updates reach
        self.servers = {
            name: Server(name, self, (tier, lower), wrapper=wrapper, queue=queue)
            for name, tier, lower in zip(
                "ab", redis_tiers, (lowers[0], lowers[-1]), strict=True
            )
        }

    def point(self, label: str) -> None:
        """Stop the calling task of the present history."""
        self.scheduler.point(label)

    def begin(self, *, warm: bool, failed_over: bool) -> None:
        """Make ready for another history."""
        self.scheduler = Scheduler(self.threads)
        a, b = self.servers.values()
        b.redis.insert(SPEC.tag, KEY, row(FIRST))
        if not warm:
            b.redis.evict(SPEC.tag, KEY)
        for server in (a, b):
            server.lower.applied.clear()
            server.lower.insert(SPEC.tag, KEY, row(FIRST))
        if failed_over:
            # The clock of the server that died was ahead, and its last write is lost.
            lost = self.client.hgetall(STAMPS)
            self.client.hincrby(STAMPS, "epoch", HOUR_US)
            a.learn()
            self.client.hset(STAMPS, mapping=lost)
        else:
            a.learn()
        b.learn()


@dataclass(frozen=True)
class Seen:
    """What a lookup returned, and when it began."""

    task: str
    version: int
    begin: int


class Servers:
    """The tasks of one schedule on a stage, and what they saw."""

    def __init__(
        self, stage: Stage, *, warm: bool = False, failed_over: bool = False
    ) -> None:
        stage.begin(warm=warm, failed_over=failed_over)
        self.scheduler = stage.scheduler
        self._stage = stage
        self._now = 0
        self._seen: list[Seen] = []
        self._acknowledged: list[tuple[int, int]] = []  # (version, when)

    def lookup(self, *names: str) -> None:
        """Add a lookup on each of these servers."""
        for name in names:
            self._spawn(name, "look up", lambda n=name: self._look_up(n))

    def update(self, name: str, version: int) -> None:
        """Add an update through one server."""
        table = self._stage.servers[name].table

        def call() -> None:
            table.update(KEY, row(version))
            self._acknowledge(name, version)

        self._spawn(name, "update", call)

    def delete(self, name: str) -> None:
        """Add a deletion through one server."""
        table = self._stage.servers[name].table

        def call() -> None:
            table.delete(KEY)
            self._acknowledge(name, DELETED)

        self._spawn(name, "delete", call)

    def load(self, name: str, version: int) -> None:
        """Add a load of the lower tier and Redis, as of a new model."""
        server = self._stage.servers[name]

        def blocks() -> Iterator[RowBlock]:
            self._stage.point(f"{name}.redis.block")
            yield RowBlock(KEY, row(version))
            self._stage.point(f"{name}.redis.end of load")

        def call() -> None:
            self._stage.point(f"{name}.lower.insert")
            server.lower.insert(SPEC.tag, KEY, row(version))
            self._stage.point(f"{name}.redis.begin of load")
            server.redis.load(SPEC.tag, blocks())
            self._acknowledge(name, version)

        self._spawn(name, "load", call)

    def evict(self, name: str) -> None:
        """Add an eviction of the row from Redis."""
        tier = self._stage.servers[name].redis
        self._spawn(name, "redis.evict", lambda: tier.evict(SPEC.tag, KEY))

    def learn(self, name: str) -> None:
        """Add a backfill of another key, whose answer has the partition's number."""
        self._spawn(name, "redis.learn", self._stage.servers[name].learn)

    def lose_stamps(self) -> None:
        """Add the loss of all stamps, as when memory is short."""
        self._spawn("-", "lose", lambda: self._stage.client.delete(STAMPS))

    def lose_stamps_and_touch(self, name: str) -> None:
        """Add the loss of all stamps, and an update of another key after it."""

        def call() -> None:
            self._stage.client.delete(STAMPS)
            self.scheduler.point(f"{name}.redis.touch")
            self._stage.servers[name].redis.insert(SPEC.tag, OTHER, row(9))

        self._spawn("-", "lose", call)

    def check(self) -> str | None:
        """Return what was seen that must not be, or None."""
        newest = self._stage.lower.applied[-1]
        out, found = row(-1), np.zeros(1, np.bool_)
        self._stage.servers["b"].redis.fetch(SPEC.tag, KEY, out, found)
        if found[0] and out[0, 0] != newest:
            return f"Redis holds version {int(out[0, 0])} under {newest}"
        if self._stage.apart:
            return None  # server a finds old rows in its own lower tier
        for name in self._stage.servers:
            self._look_up(name)
        age = {v: i for i, v in enumerate(self._stage.lower.applied)}
        for seen in self._seen:
            for version, end in self._acknowledged:
                if end < seen.begin and age[seen.version] < age[version]:
                    return f"{seen.task} saw {seen.version} after {version}"
        return None

    def _spawn(self, name: str, what: str, call: Callable[[], object]) -> None:
        label = f"{name}.{what}" if "." in what or name == "-" else f"{name}.begin"
        self.scheduler.spawn(f"{what} on {name}", call, label=label)  # type: ignore[arg-type]  # results are dropped

    def _look_up(self, name: str) -> None:
        begin = self._tick()
        chunk = Chunk(KEY, np.zeros((1, SPEC.dim), np.float32), np.zeros(1, np.bool_))
        table = self._stage.servers[name].table
        table.ask_remote(chunk)
        version = int(chunk.out[0, 0])
        assert chunk.found[0] == (version != DELETED)
        self._seen.append(Seen(f"the lookup on {name}", version, begin))

    def _acknowledge(self, name: str, version: int) -> None:
        self.scheduler.point(f"{name}.end")
        self._acknowledged.append((version, self._tick()))

    def _tick(self) -> int:
        self._now += 1
        return self._now


@cache
def footprint(label: str) -> Footprint:
    """Return what the step that begins at a stop point touches."""
    server, _, operation = label.partition(".")
    here = f"server {server}"  # its numbers, holds and flights
    return {
        "begin": Footprint(frozenset({"ended"}), frozenset({here})),
        "end": Footprint(adds=frozenset({"ended"})),
        "lose": Footprint(writes=frozenset({"stamps"})),
        "redis.epoch": Footprint(reads=frozenset({here})),
        "redis.fetch": Footprint(frozenset({"rows"}), frozenset({here})),
        "redis.hold": Footprint(writes=frozenset({here})),
        "redis.release": Footprint(writes=frozenset({here})),
        "redis.evict": Footprint(writes=frozenset({"rows"})),
        "redis.backfill": Footprint(frozenset({"stamps"}), frozenset({"rows", here})),
        "lower.fetch": Footprint(frozenset({"lower"}), frozenset({here})),
        "lower.insert": Footprint(writes=frozenset({"lower", here})),
        "lower.delete": Footprint(writes=frozenset({"lower", here})),
    }.get(operation) or Footprint(writes=frozenset({"rows", "stamps", here}))
