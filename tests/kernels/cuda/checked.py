"""A cache beside its oracle: every operation is compared, to the last byte.

After each launch the whole block must be what it was, but for the sets that the oracle
changed: gaps between rows, other tables and empty ways included.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import process_time
from typing import Any

import numpy as np

from hps_numba.kernels.cuda.compiling import NUMBA_TYPES, KernelSpec
from hps_numba.kernels.cuda.layout import (
    CLOCK,
    DIGESTS,
    SCORES,
    SET_BYTES,
    TABLE_BYTES,
    WAYS,
    Outcome,
    Policy,
    RowLayout,
    TableLayout,
)
from tests.kernels.cuda import oracle as model
from tests.kernels.cuda.comparisons import CANARY, check_misses, check_rows, same_bits
from tests.kernels.cuda.harness import TOTALS, Answer, CpuCache, CpuLauncher, dumped
from tests.kernels.cuda.oracle import Array, Looked, OracleCache, Set
from tests.kernels.cuda.orders import Inserts, explain
from tests.kernels.cuda.static_orders import explain_static
from tests.support import cpuexec

UNTOUCHED_KEY = int.from_bytes(bytes([CANARY]) * 8, "little", signed=True)
# Of each kernel and row type, in this process: keys, and seconds of CPU time.
FIGURES: dict[tuple[str, str], list[float]] = {}


class Memory(cpuexec.DeviceMemory):
    """Device memory that gives back what was allocated inside ``scratch``."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Any] | None = None

    def array(self, shape: int | tuple[int, ...], dtype: Any, fill: Any = 0) -> Any:
        made = super().array(shape, dtype, fill)
        if self._made is not None:
            self._made.append(made)
        return made

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        outer, self._made = self._made, []
        try:
            yield
        finally:
            for made in self._made:
                self.free(made)
            self._made = outer


class TimedLauncher(CpuLauncher):
    """Notes the CPU time that launches take, without their compilation."""

    def __init__(self, memory: Any, **options: Any) -> None:
        super().__init__(memory, **options)
        self.cpu_s = 0.0

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int],
        args: Sequence[int | float],
        stream: Any = None,
    ) -> None:
        kinds = tuple(NUMBA_TYPES[letter] for letter in spec.argtypes)
        cpuexec.compile_kernel(spec.function, kinds)
        started = process_time()
        super().launch(spec, grid, args, stream)
        self.cpu_s = process_time() - started


class CheckedCache:
    """Runs each operation, on the CPU unless told, and on the oracle, and compares.

    Parameters
    ----------
    rows, tables, policy
        Of the cache.
    memory, launcher
        A ``Memory`` and a ``TimedLauncher``, or what does as they do on a device.
    options
        For ``cpuexec.run``.
    """

    def __init__(
        self,
        rows: RowLayout,
        tables: Sequence[TableLayout] = (TableLayout(n_sets=2, n_stamps=64),),
        policy: Policy = Policy.LRU,
        *,
        memory: Any = None,
        launcher: Any = None,
        **options: Any,
    ) -> None:
        self.memory = memory or Memory()
        self.launcher = launcher or TimedLauncher(self.memory, **options)
        self.cpu = CpuCache(
            rows, tables, policy, memory=self.memory, launcher=self.launcher
        )
        self.rows = rows
        self.oracle = OracleCache(rows, tables, policy)
        base = self.cpu.cache.base
        for i, table in enumerate(self.oracle.tables):
            table.meta = base + self.cpu.layout.offset("meta", i)
        self.image = self.cpu.block.copy()
        self.keys: Counter[str] = Counter()

    # -- memory -------------------------------------------------------------------

    def set_default(self, n_table: int, row: Array) -> None:
        self.cpu.set_default(n_table, row)
        self.oracle.tables[n_table].default = row.astype(self.cpu.stored).tobytes()
        start = self.cpu.layout.default_row(n_table)
        self.image[start : start + self.rows.row_bytes] = row.view(np.uint8)

    def set_clock(self, n_table: int, clock: int) -> None:
        self.oracle.tables[n_table].clock = clock
        word = n_table * TABLE_BYTES + CLOCK
        for block in (self.cpu.block, self.image):
            block[word : word + 8].view(np.uint64)[0] = clock

    def restore(self, n_table: int, n_sets: Iterable[int]) -> None:
        """Write sets of the oracle to the cache's memory."""
        for n_set in n_sets:
            for block in (self.cpu.block, self.image):
                self._render(block, n_table, n_set)
        for block in (self.cpu.block, self.image):
            self._render_words(block, n_table)

    def _render(self, block: Array, n_table: int, n_set: int) -> None:
        one, layout = self.oracle.tables[n_table].sets[n_set], self.cpu.layout
        start = layout.offset("meta", n_table) + n_set * SET_BYTES
        block[start : start + 4].view(np.uint32)[0] = one.seq
        block[start + DIGESTS :][:WAYS] = one.digests
        block[start + SCORES :][:WAYS] = one.scores
        start = layout.offset("keys", n_table) + n_set * WAYS * 8
        block[start : start + 8 * WAYS].view(np.int64)[:] = one.keys
        stride = self.rows.stride_bytes
        start = layout.offset("rows", n_table) + n_set * WAYS * stride
        rows = block[start : start + WAYS * stride].reshape(WAYS, stride)
        packed = np.frombuffer(b"".join(one.rows), np.uint8)
        rows[:, : self.rows.row_bytes] = packed.reshape(WAYS, -1)

    def _render_words(self, block: Array, n_table: int) -> None:
        table = self.oracle.tables[n_table]
        words = block[n_table * TABLE_BYTES :][:TABLE_BYTES].view(np.uint64)
        values = {**table.totals, "clock": table.clock, "floor": table.floor}
        for name, offset in TOTALS.items():
            words[offset // 8] = values.get(name, 0)
        start = self.cpu.layout.offset("stamps", n_table)
        block[start : start + 8 * len(table.stamps)].view(np.uint64)[:] = table.stamps
        start = self.cpu.layout.offset("door", n_table)
        block[start : start + len(table.door)] = table.door

    def seen(self, n_table: int, n_set: int) -> Set:
        """Return a set as the cache's memory has it."""
        cpu, stride = self.cpu, self.rows.stride_bytes
        start = cpu.layout.offset("rows", n_table) + n_set * WAYS * stride
        raw = cpu.block[start : start + WAYS * stride].tobytes()
        return Set(
            int(cpu.seqs(n_table)[n_set]),
            cpu.digests(n_table)[n_set].tolist(),
            cpu.stored_keys(n_table)[n_set].tolist(),
            cpu.scores(n_table)[n_set].tolist(),
            [raw[w * stride :][: self.rows.row_bytes] for w in range(WAYS)],
        )

    def check(self, changed: Mapping[int, Iterable[int]]) -> None:
        """Compare the whole block with what the oracle says of these sets."""
        for n_table, n_sets in changed.items():
            for n_set in n_sets:
                self._render(self.image, n_table, n_set)
            self._render_words(self.image, n_table)
        wrong = np.flatnonzero(self.image != self.cpu.block)
        assert not wrong.size, self._describe(int(wrong[0]))

    def _describe(self, offset: int) -> str:
        for n_table, table in enumerate(self.oracle.tables):
            for n_set, one in enumerate(table.sets):
                got, wanted = vars(self.seen(n_table, n_set)), vars(one)
                for part in got:
                    if got[part] != wanted[part]:
                        where = f"{part} of table {n_table}, set {n_set}"
                        return f"{where}: {got[part]} is not {wanted[part]}"
        got_byte, wanted_byte = self.cpu.block[offset], self.image[offset]
        return f"byte {offset} of the block is {got_byte}, not {wanted_byte}"

    def count(self, kernel: str, n_keys: int) -> None:
        self.keys[kernel] += n_keys
        name = f"{self.rows.stored} -> {self.rows.out}"
        figure = FIGURES.setdefault((kernel, name), [0, 0.0])
        figure[0] += n_keys
        figure[1] += self.launcher.cpu_s

    # -- queries ------------------------------------------------------------------

    def query(
        self,
        *parts: Array,
        fill: bool = False,
        count_unique: bool = False,
        touch: bool = True,
        first_table: int = 0,
        **options: Any,
    ) -> tuple[Answer, list[Looked]]:
        """Look up one array of keys a table, from the first table on."""
        given = parts[0] if len(parts) == 1 else parts
        options |= {"fill": fill, "count_unique": count_unique, "touch": touch}
        answer = self.cpu.query(given, first_table=first_table, **options)
        self.count("query", sum(map(len, parts)))
        found, changed = [], {}
        for i, keys in enumerate(parts):
            table = first_table + i
            scores = self.scores(table)
            looked = self.oracle.query(table, keys.tolist(), touch=touch)
            found.append(looked)
            start = answer.starts[i]
            out = answer.out[start : start + len(keys)]
            check_rows(out, looked, self.rows, fill=fill)
            check_misses(answer, i, keys, looked)
            n_missing = len(keys) - sum(looked.touched.values())
            n_unique_hits = looked.n_unique_hits if count_unique else 0
            results = [n_missing, len(looked.unique_missing)]
            results += [len(keys) - n_missing, n_unique_hits]
            assert answer.results(i) == results
            if touch:
                self.adopt_counts(table, looked, scores)
            changed[table] = {n_set for n_set, _ in looked.touched}
        self.check(changed)
        return answer, found

    def scores(self, n_table: int) -> dict[tuple[int, int], int]:
        if self.oracle.tables[n_table].policy != Policy.LFU:
            return {}
        sets = self.oracle.tables[n_table].sets
        return {
            (s, w): sets[s].scores[w] for s in range(len(sets)) for w in range(WAYS)
        }

    def adopt_counts(
        self, n_table: int, looked: Looked, before: dict[tuple[int, int], int]
    ) -> None:
        """Take over counts of ways that several keys of a launch counted up at once.

        Each of them may have read the count before or after another one wrote it.
        """
        table = self.oracle.tables[n_table]
        for (n_set, way), times in looked.touched.items():
            if table.policy != Policy.LFU or times == 1:
                continue
            most, seen = table.sets[n_set].scores[way], self.seen(n_table, n_set)
            least = min(before[n_set, way] + 1, most)
            assert least <= seen.scores[way] <= most
            table.sets[n_set].scores[way] = seen.scores[way]

    def scatter(
        self, answer: Answer, found: list[Looked], n_table: int, values: Array,
        first: int = 0,
    ) -> None:  # fmt: skip
        """Hand out rows of unique missing keys from ``first`` on."""
        keys = answer.keys[answer.starts[n_table] : answer.starts[n_table + 1]].tolist()
        unique = answer.unique(n_table).tolist()[first : first + len(values)]
        fetched = dict(zip(unique, model.handed_out(values, self.rows), strict=False))
        expected = answer.out.copy()
        part = slice(answer.starts[n_table], answer.starts[n_table + 1])
        expected[part] = model.scatter(expected[part], found[n_table], keys, fetched)
        self.cpu.scatter(answer, n_table, values, first)
        self.count("scatter", answer.results(n_table)[0])
        assert same_bits(answer.out, expected, self.rows)
        self.check({n_table: ()})

    # -- writers ------------------------------------------------------------------

    def insert(
        self,
        keys: Array,
        values: Array,
        *,
        table: int = 0,
        epoch: int = 0,
        selected: Array | None = None,
        admit: bool = False,
        make_room: bool = True,
    ) -> list[Outcome]:
        options = {"selected": selected, "admit": admit, "make_room": make_room}
        outcomes, evicted = self.cpu.insert(
            keys, values, table=table, epoch=epoch, **options
        )
        self.count("insert", len(keys))
        skipped = outcomes == Outcome.SKIPPED
        chosen = np.ones(len(keys), bool) if selected is None else selected != 0
        assert (skipped == ~chosen).all()
        gone = outcomes == Outcome.EVICTED
        assert (evicted[~gone] == UNTOUCHED_KEY).all()
        one = self.oracle.tables[table]
        wanted = np.flatnonzero(chosen)
        sets = {n_set for key in keys[wanted].tolist() for n_set in one.sets_of(key)}
        start = self.cpu.layout.offset("door", table)
        inserts = Inserts(
            keys.tolist(),
            [row.tobytes() for row in values.astype(self.cpu.stored)],
            epoch,
            admit,
            make_room,
            outcomes.tolist(),
            evicted.tolist(),
            {n_set: self.seen(table, n_set) for n_set in sets},
            self.cpu.block[start : start + len(one.door)].tolist(),
        )
        find_order = explain_static if one.policy == Policy.STATIC else explain
        assert find_order(one, inserts), "no order of the keys leads there"
        self.check({table: sets})
        return [Outcome(outcome) for outcome in outcomes]

    def update(
        self, keys: Array, values: Array, *, table: int = 0, epoch: int = 1
    ) -> list[Outcome]:
        outcomes = self.cpu.update(keys, values, table=table, epoch=epoch)
        self.count("update", len(keys))
        one = self.oracle.tables[table]
        rows = values.astype(self.cpu.stored)
        expected = [
            one.update(key, row.tobytes(), epoch=epoch)
            for key, row in zip(keys.tolist(), rows, strict=True)
        ]
        return self._compare(table, keys, outcomes, expected)

    def evict(self, keys: Array, *, table: int = 0, epoch: int = 1) -> list[Outcome]:
        outcomes = self.cpu.evict(keys, table=table, epoch=epoch)
        self.count("evict", len(keys))
        one = self.oracle.tables[table]
        expected = [one.evict(key, epoch=epoch) for key in keys.tolist()]
        return self._compare(table, keys, outcomes, expected)

    def _compare(
        self, n_table: int, keys: Array, outcomes: Array, expected: list[Outcome]
    ) -> list[Outcome]:
        assert outcomes.tolist() == expected
        table = self.oracle.tables[n_table]
        changed = {n_set for key in keys.tolist() for n_set in table.sets_of(key)}
        self.check({n_table: changed})
        return expected

    def clear(self, *, table: int = 0, epoch: int = 1) -> None:
        one = self.oracle.tables[table]
        n_keys = one.totals["size"]
        busy = self.cpu.clear(table=table, epoch=epoch)
        self.count("clear", n_keys)
        one.clear(epoch=epoch)
        assert not busy.any()
        self.check({table: range(len(one.sets))})

    def dump(
        self, first_set: int = 0, n_sets: int | None = None, *, table: int = 0
    ) -> Array:
        one = self.oracle.tables[table]
        if n_sets is None:
            n_sets = len(one.sets) - first_set
        keys, busy = dumped(self.cpu.dump(first_set, n_sets, table=table))
        self.count("dump", len(keys))
        expected = one.dump(first_set, n_sets)
        assert busy == 0
        assert sorted(keys.tolist()) == sorted(expected)
        self.check({table: ()})
        return keys
