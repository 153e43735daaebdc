"""Readers beside writers on streams of a device: no torn, foreign or old row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.evict import evict_kernel
from hps_numba.kernels.cuda.gpu import Block, Event, Gpu
from hps_numba.kernels.cuda.insert import insert_kernel
from hps_numba.kernels.cuda.layout import (
    NO_POSITION,
    CacheLayout,
    Outcome,
    Policy,
    RowLayout,
    TableLayout,
    WorkLayout,
)
from hps_numba.kernels.cuda.operands import Bags, Batch, Workspace
from hps_numba.kernels.cuda.pooled import pooled_query_kernel
from hps_numba.kernels.cuda.query import query_kernel
from hps_numba.kernels.cuda.update import update_kernel
from tests.gpu.contents import contents_of
from tests.kernels.cuda.launcher import Answer
from tests.kernels.cuda.oracle import Array
from tests.kernels.cuda.races import (
    Asked,
    Reader,
    Reads,
    numbered_keys,
    rows_of,
)

MAX_VERSION = 4000  # of the 12 bits that a row has for it
N_READERS = 2
POISON = 0xEE
KEYS_A_BAG = 24
_NUMBER_BITS = 12


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything in a round."""

    n_keys: int = 4000  # of the 12 bits that a row has for them
    n_sets: int = 120  # not quite enough for all keys
    n_reads: int = 1 << 16
    n_turns: int = 6
    n_writes: int = 1000
    gate_bytes: int = 1 << 30  # cleared while launches are queued behind it


TINY = Sizes(n_keys=150, n_sets=5, n_reads=300, n_turns=3, n_writes=40, gate_bytes=4096)


class Memory:
    """Blocks by name, which are used again in every round."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream = gpu.stream()
        self._blocks: dict[str, Block] = {}

    def block(self, name: str, n_bytes: int, *, fill: int = POISON) -> int:
        """Return an address; all bytes are ``fill``, which is 0 or the poison."""
        if name not in self._blocks or self._blocks[name].n_bytes < n_bytes:
            self._blocks[name] = Block(self.gpu, n_bytes)
        address = self._blocks[name].address
        if fill:
            self.write(address, np.full(n_bytes, fill, np.uint8))
        else:
            self.gpu.zero(address, n_bytes, self.stream)
        return address

    def put(self, name: str, array: Array) -> int:
        address = self.block(name, array.nbytes, fill=0)
        self.write(address, array)
        return address

    def write(self, address: int, array: Array) -> None:
        array = np.ascontiguousarray(array)
        self.gpu.copy(address, array.ctypes.data, array.nbytes, self.stream)
        self.gpu.wait(self.stream)

    def read(self, address: int, shape: int | tuple[int, ...], dtype: type) -> Array:
        array: Array = np.empty(shape, dtype)
        self.gpu.copy(array.ctypes.data, address, array.nbytes, self.stream)
        self.gpu.wait(self.stream)
        return array

    def workspace(self, name: str, n_keys: int) -> Workspace:
        layout = WorkLayout(n_keys)
        base = self.block(name, layout.n_bytes, fill=0)
        self.write(base, layout.header(base))
        return Workspace(layout, base)


class Arena:
    """A table that several streams work on at once, and the truth below it.

    A round prepares all its operands, closes a gate, queues everything behind it, and
    lets all streams go together. ``versions`` are those below the cache.
    """

    rows_of = staticmethod(rows_of)
    policy = Policy.LRU

    def __init__(self, gpu: Gpu, sizes: Sizes, *, dim: int, seed: int) -> None:
        self.gpu, self.sizes, self.dim = gpu, sizes, dim
        self.rng = np.random.default_rng(seed)
        self.keys = numbered_keys(sizes.n_keys, seed)
        self.versions = np.zeros(sizes.n_keys, np.int64)
        self.epoch = 0
        self.readers = [
            Reader(np.zeros(sizes.n_keys, np.int64)) for _ in range(N_READERS)
        ]
        self.memory = Memory(gpu)
        self.streams = [gpu.stream() for _ in range(N_READERS + 3)]
        self.opened = Event(gpu)
        table = TableLayout(sizes.n_sets, n_stamps=1 << 14, tick_shift=10)
        self.layout = CacheLayout(RowLayout(dim), (table,))
        base = self.memory.block("cache", self.layout.n_bytes, fill=0)
        self.memory.write(base, self.layout.header(base))
        self.cache = Cache(self.layout, self.policy, base=base, launcher=gpu.launcher)
        self.checks: list[Callable[[], None]] = []
        self.seen = Reads()
        # Nothing is compiled or loaded behind the gate.
        gpu.launcher.warm_up(self.kernels())
        everyone = np.arange(sizes.n_keys)
        self._insert("first", everyone, self.versions, 0, self.streams[0])()
        gpu.wait(self.streams[0])

    def kernels(self) -> Iterator[KernelSpec]:
        """Yield what a round launches."""
        rows = self.layout.rows
        yield query_kernel(rows, self.policy)
        yield insert_kernel(rows, self.policy)
        yield update_kernel(rows, self.policy)
        yield evict_kernel(self.policy)

    def round(self) -> Reads:
        """Run one round and look at what everybody saw and left."""
        oldest = self.versions.copy()
        queued = list(self._prepared(oldest))
        self._close_gate()
        for launch in queued:
            launch()
        for stream in self.streams:
            self.gpu.wait(stream)
        for check in self.checks:
            check()
        self.checks.clear()
        for reader in self.readers:
            self.seen += reader.check(self.versions)
        self._check_cache()
        total, self.seen = self.seen, Reads()
        return total

    def _prepared(self, oldest: Array) -> Iterator[Callable[[], None]]:
        snapshot, epoch = self.versions.copy(), self.epoch
        *_, backfill, other, writer = self.streams
        for turn in range(self.sizes.n_turns):
            for reader in range(N_READERS):
                yield self._query(f"query {turn} {reader}", reader, oldest)
            # Rows as they were when the round began: stale wherever an update was.
            for i, stream in enumerate((backfill, other)):
                rows = self._some(), snapshot, epoch
                yield self._insert(f"insert {turn} {i}", *rows, stream)
            change = self._evict if turn % 3 == 2 else self._update
            yield change(f"change {turn}", self._some(), writer)

    def _close_gate(self) -> None:
        """Hold all streams up until some memory is cleared."""
        stream, n_bytes = self.memory.stream, self.sizes.gate_bytes
        block = self.memory.block("gate", n_bytes, fill=0)
        for _ in range(4):
            self.gpu.zero(block, n_bytes, stream)
        self.opened.record(stream)
        for one in self.streams:
            self.opened.hold_up(one)

    def _some(self) -> Array:
        n = self.sizes.n_writes
        return self.rng.choice(self.sizes.n_keys, n, replace=False)

    def _query(self, name: str, reader: int, oldest: Array) -> Callable[[], None]:
        n, memory = self.sizes.n_reads, self.memory
        numbers = self.rng.integers(0, self.sizes.n_keys, n)
        keys = memory.put(f"{name} keys", self.keys[numbers])
        out = memory.block(f"{name} out", n * 4 * self.dim)
        work = memory.workspace(f"{name} work", n)

        def launch() -> None:
            stream = self.streams[reader]
            self.cache.query(Batch(n, keys), out, work, stream=stream)

        def check() -> None:
            rows = memory.read(out, (n, self.dim), np.float32)
            block = memory.read(work.base, work.layout.n_bytes, np.uint8)
            answer = Answer(rows, work, block, [0, n], keys=self.keys[numbers])
            self.readers[reader].asked.append(Asked(numbers, answer, oldest))

        self.checks.append(check)
        return launch

    def _insert(
        self, name: str, numbers: Array, versions: Array, epoch: int, stream: int
    ) -> Callable[[], None]:
        operands = self._operands(name, numbers, versions)

        def launch() -> None:
            self.cache.insert(0, len(numbers), **operands, epoch=epoch, stream=stream)

        allowed = set(Outcome) - {Outcome.SKIPPED, Outcome.BUSY, Outcome.ABSENT}
        self._expect(operands["outcomes"], len(numbers), allowed)
        return launch

    def _update(self, name: str, numbers: Array, stream: int) -> Callable[[], None]:
        self.epoch += 1
        self.versions[numbers] += 1
        operands = self._operands(name, numbers, self.versions)
        epoch = self.epoch

        def launch() -> None:
            self.cache.update(0, len(numbers), **operands, epoch=epoch, stream=stream)

        allowed = {Outcome.REPLACED, Outcome.ABSENT}
        self._expect(operands["outcomes"], len(numbers), allowed)
        return launch

    def _evict(self, name: str, numbers: Array, stream: int) -> Callable[[], None]:
        self.epoch += 1
        operands = self._operands(name, numbers, self.versions)
        del operands["values"]
        epoch = self.epoch

        def launch() -> None:
            self.cache.evict(0, len(numbers), **operands, epoch=epoch, stream=stream)

        allowed = {Outcome.EVICTED, Outcome.ABSENT}
        self._expect(operands["outcomes"], len(numbers), allowed)
        return launch

    def _operands(self, name: str, numbers: Array, versions: Array) -> dict[str, int]:
        rows = self.rows_of(numbers, versions[numbers], self.dim)
        return {
            "keys": self.memory.put(f"{name} keys", self.keys[numbers]),
            "values": self.memory.put(f"{name} rows", rows),
            "outcomes": self.memory.block(f"{name} outcomes", len(numbers)),
        }

    def _expect(self, outcomes: int, n: int, allowed: set[Outcome]) -> None:
        """Look at outcomes when the round is over."""

        def check() -> None:
            got = set(np.unique(self.memory.read(outcomes, n, np.uint8)).tolist())
            assert got <= {int(one) for one in allowed}, f"outcomes {sorted(got)}"

        self.checks.append(check)

    def _check_cache(self) -> None:
        """Fail unless all that is there is whole, current, and there once."""
        block = self.memory.read(self.cache.base, self.layout.n_bytes, np.uint8)
        keys, rows = contents_of(self.layout, block)
        numbers = {int(key): i for i, key in enumerate(self.keys)}
        held = np.array([numbers[key] for key in keys.tolist()], np.int64)
        assert len(np.unique(held)) == len(held), "a key is there twice"
        wanted = self.rows_of(held, self.versions[held], self.dim)
        assert rows.tobytes() == wanted.tobytes(), "an old row has come back"


def flat_rows(numbers: Array, versions: Array, dim: int) -> Array:
    """Return float32 rows of one value each, exact: of number and version."""
    values = (numbers + (versions << _NUMBER_BITS)).astype(np.float32)
    return np.repeat(values[:, None], dim, axis=1)


class StaticArena(Arena):
    """The same with a table whose keys have two sets each, most of them full."""

    policy = Policy.STATIC


class PooledArena(Arena):
    """The same with sums over bags: of a torn row, the values of a sum differ."""

    rows_of = staticmethod(flat_rows)

    def kernels(self) -> Iterator[KernelSpec]:
        yield from super().kernels()
        yield pooled_query_kernel(self.layout.rows, self.policy)

    def _query(self, name: str, reader: int, oldest: Array) -> Callable[[], None]:
        memory, n_bags = self.memory, self.sizes.n_reads // KEYS_A_BAG
        n = n_bags * KEYS_A_BAG
        numbers = self.rng.integers(0, self.sizes.n_keys, n)
        keys = memory.put(f"{name} keys", self.keys[numbers])
        begins = np.arange(0, n + 1, KEYS_A_BAG, dtype=np.uint64)
        bags = Bags(memory.put(f"{name} begins", begins), n)
        out = memory.block(f"{name} out", n_bags * 4 * self.dim)
        work = memory.workspace(f"{name} work", n)

        def launch() -> None:
            stream = self.streams[reader]
            batch = Batch(n_bags, keys)
            self.cache.pooled_query(batch, bags, out, work, stream=stream)

        def check() -> None:
            sums = memory.read(out, (n_bags, self.dim), np.float32)
            assert (sums == sums[:, :1]).all(), "a sum over a torn row"
            block = memory.read(work.base, work.layout.n_bytes, np.uint8)
            answer = Answer(sums, work, block, [0, n], keys=self.keys[numbers])
            layout = work.layout
            noted = block[layout.missing : layout.missing + 8 * n].view(np.uint32)
            hit = noted.reshape(n, 2)[:, 1] == NO_POSITION
            assert answer.results()[:3:2] == [int((~hit).sum()), int(hit.sum())]
            self._check_sums(sums[:, 0], numbers, hit, oldest)
            self.seen += Reads(int(hit.sum()), int((~hit).sum()))

        self.checks.append(check)
        return launch

    def _check_sums(
        self, sums: Array, numbers: Array, hit: Array, oldest: Array
    ) -> None:
        """Fail if a sum is none of rows from ``oldest`` to those of now."""
        for versions, sign in ((oldest, 1), (self.versions, -1)):
            rows = flat_rows(numbers, versions[numbers], 1).astype(np.float64)[:, 0]
            bound = np.where(hit, rows, 0).reshape(-1, KEYS_A_BAG).sum(1)
            slack = bound * KEYS_A_BAG * 2.0**-24
            assert (sign * (sums - bound) >= -slack).all(), "a sum over another row"


CASES = (
    ("rows", Arena, 32),
    ("sums", PooledArena, 32),
    ("rows of a static table", StaticArena, 32),
    ("rows", Arena, 128),
    ("rows", Arena, 12),
)


def check_races(
    gpu: Gpu, sizes: Sizes, seconds: float, n_cases: int = 5
) -> Iterator[tuple[str, int]]:
    """Race for so long each, a round at least; yield how many reads hit and missed."""
    for seed, (what, kind, dim) in enumerate(CASES[:n_cases]):
        total, n_rounds, arena = Reads(), 0, kind(gpu, sizes, dim=dim, seed=seed)
        end = time.monotonic() + seconds
        while n_rounds == 0 or (
            time.monotonic() < end and arena.versions.max() < MAX_VERSION
        ):
            total += arena.round()
            n_rounds += 1
        name = f"{what} read beside writers, dim {dim}, {n_rounds} rounds"
        yield f"{name}: hits", total.n_hits
        yield f"{name}: misses", total.n_misses
