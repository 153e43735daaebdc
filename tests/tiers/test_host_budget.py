from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest

from hps_numba.errors import ConfigError
from hps_numba.tiers import host_partition, host_table
from hps_numba.tiers.host import HostTier
from hps_numba.tiers.host_table import Overflow, bytes_for_rows
from hps_numba.types import OverflowPolicy, RowBlock, TableSpec

POLICIES = list(OverflowPolicy)
MIB = 1 << 20
FIXED_BYTES = (1 << 17) + 8_192
BATCH_BYTES_PER_KEY = 32  # while a batch is being written, beside the table
INT64 = np.iinfo(np.int64)


def spec_of(dim: int, name: str = "table") -> TableSpec:
    return TableSpec("model", name, dim)


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(INT64.min, INT64.max, n)


def rows_of(keys: np.ndarray, dim: int) -> np.ndarray:
    return np.add.outer(keys % 4_096, np.arange(dim)).astype(np.float32)


def insert(tier: HostTier, spec: TableSpec, keys: np.ndarray) -> None:
    tier.insert(spec.tag, keys, rows_of(keys, spec.dim))


def held_by(tier: HostTier, spec: TableSpec, keys: np.ndarray) -> int:
    """Return how many of the keys the table holds, having compared their rows."""
    out = np.empty((keys.size, spec.dim), np.float32)
    found = np.zeros(keys.size, np.bool_)
    hits = tier.fetch(spec.tag, keys, out, found)
    np.testing.assert_array_equal(out[found], rows_of(keys, spec.dim)[found])
    return hits


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compile everything, so that its memory is not counted."""
    spec = spec_of(1)
    for policy in POLICIES:
        with closing(HostTier(overflow_policy=policy, overflow_margin=70)) as tier:
            tier.open_table(spec)
            insert(tier, spec, some_keys(1_000))
            tier.delete(spec.tag, some_keys(1_000))
            tier.evict(spec.tag)
            assert held_by(tier, spec, some_keys(1_000)) == 0


@contextmanager
def most_allocated() -> Iterator[list[int]]:
    """Yield a list that gets the most bytes allocated at once in the context."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_partitions", [1, 4])
@pytest.mark.parametrize(("dim", "budget"), [(1, MIB // 2), (16, MIB), (200, 2 * MIB)])
def test_memory_stays_within_the_budget_at_every_moment(
    policy, n_partitions, dim, budget
):
    spec = spec_of(dim)
    keys = some_keys(6 * budget // (4 * dim + 40))
    blocks = [(part, rows_of(part, dim)) for part in np.array_split(keys, 60)]
    halves = [block[::2].copy() for block, _ in blocks]
    with (
        closing(HostTier(num_partitions=n_partitions, overflow_policy=policy)) as tier,
        most_allocated() as peak,
    ):
        tier.open_table(spec, max_bytes=budget)
        for i, (block, rows) in enumerate(blocks):
            tier.insert(spec.tag, block, rows)
            assert tier.stats(spec.tag).bytes <= budget
            if i == 40:
                tier.evict(spec.tag)
                assert tier.size(spec.tag) == 0
                assert tier.stats(spec.tag).bytes <= budget
            if i % 3:  # tombstones, so that indexes are rebuilt at their largest
                tier.delete(spec.tag, halves[i - 1])
    assert 0.6 * budget < peak[0] <= budget + BATCH_BYTES_PER_KEY * blocks[0][0].size


def test_a_budget_is_used():
    spec, budget = spec_of(64), 4 * MIB
    with closing(HostTier(max_bytes=budget)) as tier:
        tier.open_table(spec)
        keys = some_keys(50_000)
        insert(tier, spec, keys)
        stats = tier.stats(spec.tag)
        held = held_by(tier, spec, keys)
    assert stats.evictions == keys.size - held
    assert held == stats.rows
    # Eviction leaves 0.8 of what fits; an index and its double take up to a third.
    assert held * spec.row_bytes > 0.5 * budget


def test_a_writer_waits_for_readers_rather_than_exceed_the_budget(monkeypatch):
    """A reader that keeps an old index must not make it three."""
    spec, budget = spec_of(1), MIB // 2
    keys = some_keys(40_000)
    blocks = [(part, rows_of(part, 1)) for part in np.array_split(keys, 400)]
    halves = [block[::2].copy() for block, _ in blocks]
    reader, waits = [], []

    def reader_goes_on(_seconds: float) -> None:
        waits.append(len(reader))
        reader.clear()

    monkeypatch.setattr(host_table.time, "sleep", reader_goes_on)
    with (
        closing(HostTier(num_partitions=1)) as tier,
        most_allocated() as peak,
    ):
        tier.open_table(spec, max_bytes=budget)
        for (block, rows), half in zip(blocks, halves, strict=True):
            reader.append(tier._tables[spec.tag].snapshot)
            tier.insert(spec.tag, block, rows)
            tier.delete(spec.tag, half)
    assert len(waits) > 3
    assert all(waits)
    assert peak[0] <= budget + BATCH_BYTES_PER_KEY * blocks[0][0].size


def test_a_table_that_forgets_all_rows_reuses_their_memory():
    """Even while a reader keeps what was there."""
    spec, budget = spec_of(32), MIB
    blocks = [
        (part, rows_of(part, 32)) for part in np.array_split(some_keys(20_000), 200)
    ]
    with closing(HostTier()) as tier, most_allocated() as peak:
        tier.open_table(spec, max_bytes=budget)
        for block, rows in blocks:
            tier.insert(spec.tag, block, rows)
        used = tier.stats(spec.tag).bytes
        kept = tier._tables[spec.tag].snapshot
        assert tier.evict(spec.tag) > 3_000
        assert tier.size(spec.tag) == 0
        for block, rows in blocks[:30]:
            tier.insert(spec.tag, block, rows)
        assert tier.size(spec.tag) == 3_000
        assert tier.stats(spec.tag).bytes == used <= budget
        assert kept.arrays
    assert peak[0] <= budget + BATCH_BYTES_PER_KEY * blocks[0][0].size


def test_a_reader_that_never_ends_does_not_stop_the_writer(monkeypatch, caplog):
    spec = spec_of(1)
    monkeypatch.setattr(host_table.time, "sleep", lambda _seconds: None)
    with closing(HostTier(num_partitions=1)) as tier:
        tier.open_table(spec, max_bytes=MIB // 2)
        kept = []
        with caplog.at_level(logging.WARNING, logger=host_table.__name__):
            for block in np.array_split(some_keys(2_000), 20):
                kept.append(tier._tables[spec.tag].snapshot)
                insert(tier, spec, block)
        assert f"tag={spec.tag} over_budget_indexes=" in caplog.text
        assert held_by(tier, spec, some_keys(2_000)) == tier.size(spec.tag) == 2_000


def test_tables_share_a_budget():
    names = ("a", "b", "c")
    specs = [spec_of(dim, name) for dim, name in zip((4, 16, 64), names, strict=True)]
    budget = 3 * MIB
    with closing(HostTier(max_bytes=budget)) as tier, most_allocated() as peak:
        tier.open_table(specs[0], max_bytes=MIB // 2)
        tier.open_table(specs[1], max_bytes=MIB)
        tier.open_table(specs[2])  # what is left
        for seed in range(20):
            for spec in specs:
                insert(tier, spec, some_keys(2_000, seed))
                used = [tier.stats(s.tag).bytes for s in specs]
                assert used[0] <= MIB // 2
                assert used[1] <= MIB
                assert sum(used) <= budget
        assert all(tier.stats(s.tag).evictions > 0 for s in specs)
    inputs = 2_000 * (8 + 3 * 64 * 8)  # what the test itself allocates at a time
    assert peak[0] <= budget + inputs


def test_no_table_gets_more_than_the_others_left():
    with closing(HostTier(max_bytes=2 * MIB)) as tier:
        tier.open_table(spec_of(4, "a"), max_bytes=MIB)
        with pytest.raises(ConfigError, match=f"{MIB + 1} bytes.*{MIB} of .*{2 * MIB}"):
            tier.open_table(spec_of(4, "b"), max_bytes=MIB + 1)
        assert tier.tables("model") == ["a"]
        tier.open_table(spec_of(4, "b"))
        with pytest.raises(ConfigError, match="c: 0 bytes of host memory"):
            tier.open_table(spec_of(4, "c"))
        tier.drop_table(spec_of(4, "a").tag)
        tier.open_table(spec_of(4, "c"), max_bytes=MIB)
        assert tier.tables("model") == ["b", "c"]


def test_a_budget_without_room_for_a_row_is_refused_with_its_numbers():
    spec = spec_of(1_000)
    with closing(HostTier(num_partitions=4)) as tier:
        with pytest.raises(ConfigError) as refusal:
            tier.open_table(spec, max_bytes=FIXED_BYTES + 20_000)
        message = str(refusal.value)
        for part in (
            spec.tag,
            f"{FIXED_BYTES + 20_000} bytes",
            "4 partitions",
            "4004",
            "volatile_db.max_bytes",
            "volatile_db.num_partitions",
        ):
            assert part in message
        assert tier.tables("model") == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dim", [1, 300])
def test_the_smallest_budget_that_is_accepted_works(policy, dim):
    spec = spec_of(dim)
    keys = some_keys(300)

    def accepts(budget: int) -> bool:
        with closing(HostTier(overflow_policy=policy)) as tier:
            try:
                tier.open_table(spec, max_bytes=budget)
            except ConfigError:
                return False
            for block in np.array_split(keys, 30):
                insert(tier, spec, block)
                insert(tier, spec, block)
                tier.delete(spec.tag, block[:3])
                assert tier.stats(spec.tag).bytes <= budget
            assert 1 <= tier.size(spec.tag) <= keys.size
            assert held_by(tier, spec, keys) == tier.size(spec.tag)
            return True

    low, high = FIXED_BYTES, FIXED_BYTES + 4 * MIB
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepts(middle) else (middle, high)
    assert not accepts(high - 1)
    assert accepts(high)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_partitions", [1, 8])
@pytest.mark.parametrize("n_rows", [0, 1, 500, 20_000])
@pytest.mark.parametrize("dim", [1, 32])
@pytest.mark.parametrize("capped", [True, False])
def test_bytes_for_rows_suffice(policy, n_partitions, n_rows, dim, capped):
    spec = spec_of(dim)
    estimate = bytes_for_rows(
        spec,
        n_rows,
        n_partitions=n_partitions,
        overflow=Overflow(policy),
        capped=capped,
    )
    keys = some_keys(n_rows, seed=n_rows + n_partitions)
    blocks = [(part, rows_of(part, dim)) for part in np.array_split(keys, 50)]
    with (
        closing(HostTier(num_partitions=n_partitions, overflow_policy=policy)) as tier,
        most_allocated() as peak,
    ):
        tier.open_table(spec, max_bytes=estimate if capped else None)
        for block, rows in blocks * 2:
            tier.insert(spec.tag, block, rows)
        for block, rows in blocks:
            tier.delete(spec.tag, block)
            tier.insert(spec.tag, block, rows)
        stats = tier.stats(spec.tag)
    assert (stats.rows, stats.evictions) == (n_rows, 0)
    assert stats.bytes <= estimate
    assert peak[0] <= estimate


@pytest.mark.parametrize("n_rows", [10_000, 15_000, 30_000, 100_000])
@pytest.mark.parametrize(("dim", "ratio"), [(32, 1.5), (64, 1.35), (128, 1.25)])
def test_bytes_for_rows_are_not_much_more_than_is_used(n_rows, dim, ratio):
    """The worst is just after a doubling, when both halves of an index count."""
    spec = spec_of(dim)
    estimate = bytes_for_rows(
        spec, n_rows, n_partitions=2, overflow=Overflow(), capped=True
    )
    with closing(HostTier()) as tier:
        tier.open_table(spec, max_bytes=estimate)
        insert(tier, spec, some_keys(n_rows))
        assert tier.size(spec.tag) == n_rows
        assert estimate <= ratio * tier.stats(spec.tag).bytes


def test_a_margin_bounds_the_bytes():
    spec, overflow = spec_of(64), Overflow(margin=1_000)
    few, many = (
        bytes_for_rows(spec, n, n_partitions=2, overflow=overflow, capped=False)
        for n in (3_000, 3_000_000)
    )
    assert few == many
    with closing(HostTier(overflow_margin=1_000)) as tier, most_allocated() as peak:
        tier.open_table(spec)
        for seed in range(50):
            insert(tier, spec, some_keys(200, seed))
        assert tier.stats(spec.tag).bytes <= many
    assert peak[0] <= many + 200 * (8 + 3 * 64 * 8)


def test_a_table_goes_on_after_memory_ran_out(monkeypatch):
    """Nothing is half changed, whichever allocation fails."""
    spec = spec_of(4)
    allocate = host_partition._aligned
    fails_at = []

    def scarce(n_bytes: int) -> np.ndarray:
        fails_at[0] -= 1
        if fails_at[0] == 0:
            raise MemoryError
        return allocate(n_bytes)

    monkeypatch.setattr(host_partition, "_aligned", scarce)
    keys = some_keys(3_000)
    for nth in range(1, 12):
        fails_at[:] = [1_000]
        with closing(
            HostTier(num_partitions=1, overflow_policy=OverflowPolicy.EVICT_OLDEST)
        ) as tier:
            tier.open_table(spec)
            epoch = tier.epoch(spec.tag)
            fails_at[:] = [nth]
            with pytest.raises(MemoryError):
                insert(tier, spec, keys)
            assert held_by(tier, spec, keys) == tier.size(spec.tag) < 3_000
            old = rows_of(keys, 4)
            assert tier.backfill(spec.tag, keys, old, epoch) == 0
            insert(tier, spec, keys)
            assert held_by(tier, spec, keys) == tier.size(spec.tag) == 3_000


def test_a_reload_within_the_budget_keeps_to_it():
    spec, budget = spec_of(16), MIB
    with closing(HostTier()) as tier:
        tier.open_table(spec, max_bytes=budget)
        for seed in range(4):
            parts = np.array_split(some_keys(30_000, seed), 10)
            blocks = (RowBlock(part, rows_of(part, 16)) for part in parts)
            tier.load(spec.tag, blocks)
            assert tier.stats(spec.tag).bytes <= budget
            assert held_by(tier, spec, some_keys(30_000, seed)) == tier.size(spec.tag)
            assert tier.size(spec.tag) > 4_000
