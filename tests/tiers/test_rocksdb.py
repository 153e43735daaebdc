"""What RocksDB adds to the contract: metadata, generations, restarts, read-only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from rocksdict import Options, Rdict

from hps_numba.errors import (
    ClosedError,
    ConfigError,
    TierUnavailableError,
    UnknownTableError,
)
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.tiers.testing.races import run_all, run_while
from hps_numba.tiers.testing.suite import (
    SPEC,
    assert_absent,
    assert_rows,
    fetch,
    filled_rows,
    keys_of,
    random_rows,
)
from hps_numba.types import Position, RowBlock, StreamSpan, TableSpec

KEYS = np.arange(10_000, dtype=np.int64)
KEY = keys_of(5)
SPAN = StreamSpan(0, Position(0), Position(1))


class InjectedError(Exception):
    """Raised by a test on purpose."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "db")


@pytest.fixture
def tier(path: str) -> Iterator[RocksDBTier]:
    tier = opened(path)
    yield tier
    tier.close()


def opened(path: str, **options: bool | int) -> RocksDBTier:
    tier = RocksDBTier(path, **{"cache_bytes": 8 << 20, **options})
    tier.open_table(SPEC)
    return tier


def reopened(tier: RocksDBTier, **options: bool | int) -> RocksDBTier:
    tier.close()
    return opened(tier._store.path, **options)


def block(keys: np.ndarray, value: float) -> RowBlock:
    return RowBlock(keys, filled_rows(SPEC, keys.size, value))


def families(path: str) -> set[str]:
    return set(Rdict.list_cf(path, Options(raw_mode=True))) - {"default", "hps_meta"}


def fail_writes(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch, *, after: int
) -> None:
    """Let so many batches pass and refuse the next one."""
    write, n_written = tier._store.write, 0

    def counted(batch: object, *, sync: bool = False) -> None:
        nonlocal n_written
        n_written += 1
        if n_written == after + 1:
            raise InjectedError
        write(batch, sync=sync)

    monkeypatch.setattr(tier._store, "write", counted)


# Metadata


def test_a_write_that_fails_refuses_backfills(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = tier.epoch(SPEC.tag)
    fail_writes(tier, monkeypatch, after=0)
    with pytest.raises(InjectedError):
        tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0))
    assert tier.backfill(SPEC.tag, KEY, filled_rows(SPEC, 1, 0.0), epoch) == 0


def test_rows_after_a_failed_first_write_outlive_the_tier(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(tier, monkeypatch, after=0)
    with pytest.raises(InjectedError):
        tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0))
    assert_absent(tier, SPEC, KEY)
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0))
    assert_rows(reopened(tier), SPEC, KEY, filled_rows(SPEC, 1, 2.0))


def test_the_epoch_outlives_the_tier(tier: RocksDBTier) -> None:
    for value in range(5):
        tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, value))
    epoch = tier.epoch(SPEC.tag)
    again = reopened(tier)
    assert again.epoch(SPEC.tag) == epoch >= 5
    again.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 9.0))
    assert again.backfill(SPEC.tag, KEY, filled_rows(SPEC, 1, 0.0), epoch) == 0


def test_backfilled_and_evicted_rows_outlive_the_tier(tier: RocksDBTier) -> None:
    rows = filled_rows(SPEC, 100, 1.0)
    tier.backfill(SPEC.tag, KEYS[:100], rows, tier.epoch(SPEC.tag))
    tier.evict(SPEC.tag, KEYS[:40])
    again = reopened(tier)
    assert_absent(again, SPEC, KEYS[:40])
    assert_rows(again, SPEC, KEYS[40:100], rows[40:])


def test_another_shape_is_refused_after_a_restart(tier: RocksDBTier) -> None:
    tier.close()
    again = RocksDBTier(tier._store.path)
    with pytest.raises(ConfigError, match=r"dim 4, float32.*dim 5, float32"):
        again.open_table(TableSpec("model", "table", 5))
    again.close()


def test_tables_lists_what_an_earlier_process_stored(tier: RocksDBTier) -> None:
    tier.open_table(TableSpec("model", "second", 8))
    tier.close()
    again = RocksDBTier(tier._store.path)
    assert again.tables("model") == ["second", "table"]
    again.drop_table("hps_et.model.second")
    assert again.tables("model") == ["table"]
    again.close()


# Whether the rows are those of the last load

AFTER_LOAD: dict[str, tuple[Callable[[RocksDBTier], object], bool]] = {
    "nothing": (lambda tier: None, True),
    "fetch": (lambda tier: fetch(tier, SPEC, KEYS), True),
    "hold": (lambda tier: tier.hold(SPEC.tag, KEY).__enter__(), True),
    "refused backfill": (
        lambda tier: tier.backfill(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0), 0),
        True,
    ),
    "evict absent": (lambda tier: tier.evict(SPEC.tag, KEY - 100), True),
    "second load": (lambda tier: tier.load(SPEC.tag, [block(KEYS[:9], 2.0)]), True),
    "seek": (lambda tier: tier.seek(SPEC.tag, {0: Position(1)}), True),
    "empty span": (lambda tier: tier.apply(SPEC.tag, KEYS[:0], None, SPAN), True),
    "span": (
        lambda tier: tier.apply(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0), SPAN),
        False,
    ),
    "span of deletes": (lambda tier: tier.apply(SPEC.tag, KEY, None, SPAN), False),
    "insert": (lambda tier: tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 2)), False),
    "delete": (lambda tier: tier.delete(SPEC.tag, KEY), False),
    "evict": (lambda tier: tier.evict(SPEC.tag, KEY), False),
    "evict all": (lambda tier: tier.evict(SPEC.tag), False),
    "evict all but a position": (
        lambda tier: (tier.seek(SPEC.tag, {0: Position(1)}), tier.evict(SPEC.tag)),
        False,
    ),
    "backfill": (
        lambda tier: tier.backfill(
            SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0), tier.epoch(SPEC.tag)
        ),
        False,
    ),
}


@pytest.mark.parametrize("operation", list(AFTER_LOAD))
def test_untouched_says_whether_the_rows_are_those_of_the_load(
    tier: RocksDBTier, operation: str
) -> None:
    change, untouched = AFTER_LOAD[operation]
    tier.load(SPEC.tag, [block(KEYS, 1.0)], fingerprint={"files": ["a"]})
    change(tier)
    assert tier.untouched(SPEC.tag) is untouched
    assert reopened(tier).untouched(SPEC.tag) is untouched


def test_a_table_that_was_never_loaded_is_not_untouched(tier: RocksDBTier) -> None:
    assert not tier.untouched(SPEC.tag)
    assert tier.fingerprint(SPEC.tag) is None


def test_the_fingerprint_is_that_of_the_last_load(tier: RocksDBTier) -> None:
    tier.load(SPEC.tag, [block(KEYS, 1.0)], fingerprint={"files": ["a"], "rows": 2})
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0))
    assert tier.fingerprint(SPEC.tag) == {"files": ["a"], "rows": 2}
    again = reopened(tier)
    assert again.fingerprint(SPEC.tag) == {"files": ["a"], "rows": 2}
    again.load(SPEC.tag, [])
    assert again.fingerprint(SPEC.tag) is None


def test_evicting_all_rows_forgets_their_fingerprint(tier: RocksDBTier) -> None:
    """A restart would otherwise take the empty table for the files."""
    tier.load(SPEC.tag, [block(KEYS, 1.0)], fingerprint={"a": 1})
    assert tier.evict(SPEC.tag) == KEYS.size
    assert tier.fingerprint(SPEC.tag) is None


# Loads and generations


@pytest.mark.parametrize("restart", [False, True])
def test_each_load_has_a_family_of_its_own(tier: RocksDBTier, restart: bool) -> None:
    path = tier._store.path
    steps: list[tuple[Callable[[RocksDBTier], object], float | None]] = [
        (lambda tier: tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1)), 1),
        (lambda tier: tier.load(SPEC.tag, [block(KEYS, 2)]), 2),
        (lambda tier: tier.load(SPEC.tag, [block(KEYS, 3)]), 3),
        (lambda tier: tier.evict(SPEC.tag), None),
        (lambda tier: tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 4)), 4),
        (lambda tier: tier.load(SPEC.tag, []), None),
        (lambda tier: tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 5)), 5),
        (lambda tier: tier.load(SPEC.tag, [block(KEYS, 6)]), 6),
    ]
    for step, value in steps:
        step(tier)
        tier = reopened(tier) if restart else tier
        if value is None:
            assert_absent(tier, SPEC, KEY)
        else:
            assert_rows(tier, SPEC, KEY, filled_rows(SPEC, 1, value))
        assert len(families(path)) <= 1
    tier.close()


def test_an_ascending_load_equals_a_sorted_one(tier: RocksDBTier) -> None:
    rows = random_rows(SPEC, KEYS.size)
    blocks = [RowBlock(KEYS[i : i + 999], rows[i : i + 999]) for i in KEYS[::999]]
    assert tier.load(SPEC.tag, blocks, ascending=True) == KEYS.size
    assert_rows(tier, SPEC, KEYS, rows)
    assert tier.size(SPEC.tag) == tier.stats(SPEC.tag).rows == KEYS.size


@pytest.mark.parametrize(
    "keys", [[3, 2], [2, 2], [5, 6, 6]], ids=["falls", "repeats", "repeats later"]
)
def test_keys_that_do_not_ascend_as_promised_are_refused(
    tier: RocksDBTier, keys: list[int]
) -> None:
    tier.load(SPEC.tag, [block(KEY, 1.0)], fingerprint={"v": 1})
    for blocks in (
        [block(keys_of(*keys), 2.0)],
        [block(keys_of(key), 2.0) for key in keys],
    ):
        with pytest.raises(ValueError, match=f"key {keys[-1]} follows"):
            tier.load(SPEC.tag, blocks, ascending=True)
    assert_rows(tier, SPEC, KEY, filled_rows(SPEC, 1, 1.0))
    assert tier.untouched(SPEC.tag)


@pytest.mark.parametrize("ascending", [False, True])
def test_a_load_that_fails_leaves_the_table_as_it_was(
    tier: RocksDBTier, ascending: bool
) -> None:
    def blocks() -> Iterator[RowBlock]:
        yield block(KEYS, 2.0)
        raise InjectedError

    tier.load(SPEC.tag, [block(KEY, 1.0)], fingerprint={"v": 1})
    with pytest.raises(InjectedError):
        tier.load(SPEC.tag, blocks(), ascending=ascending)
    path = Path(tier._store.path)
    assert list((path / "hps_load").iterdir()) == []
    assert len(families(str(path))) == 1
    for restarts in range(2):
        tier = reopened(tier) if restarts else tier
        assert_rows(tier, SPEC, KEY, filled_rows(SPEC, 1, 1.0))
        assert tier.size(SPEC.tag) == 1
        assert tier.untouched(SPEC.tag)


def test_a_load_whose_last_step_fails_can_be_repeated(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.load(SPEC.tag, [block(KEY, 1.0)])
    fail_writes(tier, monkeypatch, after=0)
    with pytest.raises(InjectedError):
        tier.load(SPEC.tag, [block(KEYS, 2.0)])
    assert_rows(tier, SPEC, KEY, filled_rows(SPEC, 1, 1.0))
    tier.load(SPEC.tag, [block(KEYS, 3.0)])
    again = reopened(tier)
    assert_rows(again, SPEC, KEYS, filled_rows(SPEC, KEYS.size, 3.0))
    assert len(families(tier._store.path)) == 1


def test_what_a_killed_load_left_is_removed_at_the_start(tier: RocksDBTier) -> None:
    tier.load(SPEC.tag, [block(KEYS, 1.0)])
    tier.close()
    path = Path(tier._store.path)
    stored = families(str(path))
    known = {name: Options(raw_mode=True) for name in ("hps_meta", *stored)}
    db = Rdict(str(path), Options(raw_mode=True), known)
    orphan = db.create_column_family(f"{SPEC.tag}#2", Options(raw_mode=True))
    orphan[b"key"] = b"row"
    orphan.close()
    db.close()
    (path / "hps_load" / "left").mkdir(parents=True)
    (path / "hps_load" / "left" / "000000.sst").write_bytes(b"half a file")
    again = opened(str(path))
    assert families(str(path)) == stored
    assert not (path / "hps_load").exists()
    assert_rows(again, SPEC, KEYS, filled_rows(SPEC, KEYS.size, 1.0))
    again.load(SPEC.tag, [block(KEYS, 2.0)])
    assert_rows(reopened(again), SPEC, KEYS, filled_rows(SPEC, KEYS.size, 2.0))


# Batches and pieces


@pytest.mark.parametrize(
    ("dim", "max_batch_size", "largest"),
    [(4, 64, 64), (4, 65_536, 1024), (128, 65_536, 505), (1 << 17, 65_536, 1)],
)
def test_batches_are_bounded_in_rows_and_bytes(
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    max_batch_size: int,
    largest: int,
) -> None:
    """No other thread runs while one is written."""
    tier = opened(path, max_batch_size=max_batch_size)
    spec = TableSpec("model", "other", dim)
    tier.open_table(spec)
    n_rows = 3 * largest
    keys, rows = KEYS[:n_rows], filled_rows(spec, n_rows, 1.0)
    tier.insert(spec.tag, keys[:1], rows[:1])
    sizes: list[int] = []
    write = tier._store.write

    def counted(batch: object, *, sync: bool = False) -> None:
        sizes.append(batch.pending.len())  # type: ignore[attr-defined]
        write(batch, sync=sync)

    monkeypatch.setattr(tier._store, "write", counted)
    tier.insert(spec.tag, keys, rows)
    assert sizes == [largest + 1] * 3  # the epoch, too
    assert_rows(tier, spec, keys, rows)
    tier.close()


@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize("direct_reads", [False, True])
def test_threads_read_what_one_would(
    path: str, num_threads: int, direct_reads: bool
) -> None:
    tier = opened(path, num_threads=num_threads, direct_reads=direct_reads)
    rows = random_rows(SPEC, KEYS.size)
    tier.load(SPEC.tag, [RowBlock(KEYS * 2, rows)])
    asked = np.random.default_rng(0).permutation(np.arange(2 * KEYS.size))
    out, found = fetch(tier, SPEC, asked)
    np.testing.assert_array_equal(found, asked % 2 == 0)
    assert out[found].tobytes() == rows[asked[found] // 2].tobytes()
    tier.close()


# Read-only


def test_a_read_only_tier_reads_beside_a_writer(tier: RocksDBTier) -> None:
    tier.load(SPEC.tag, [block(KEYS, 1.0)], fingerprint={"v": 1})
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0))
    tier.seek(SPEC.tag, {0: Position(3)})
    reader = opened(tier._store.path, read_only=True)
    assert reader.read_only
    assert not tier.read_only
    assert_rows(reader, SPEC, KEY, filled_rows(SPEC, 1, 2.0))
    assert reader.positions(SPEC.tag) == {0: Position(3)}
    assert reader.fingerprint(SPEC.tag) == {"v": 1}
    assert reader.size(SPEC.tag) == KEYS.size
    assert reader.tables("model") == ["table"]
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 4.0))
    assert_rows(reader, SPEC, KEY, filled_rows(SPEC, 1, 2.0))
    reader.close()


WRITES: dict[str, Callable[[RocksDBTier], object]] = {
    "insert": lambda tier: tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0)),
    "delete": lambda tier: tier.delete(SPEC.tag, KEY),
    "load": lambda tier: tier.load(SPEC.tag, []),
    "evict": lambda tier: tier.evict(SPEC.tag),
    "backfill": lambda tier: tier.backfill(
        SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0), tier.epoch(SPEC.tag)
    ),
    "apply": lambda tier: tier.apply(SPEC.tag, KEY, None, SPAN),
    "seek": lambda tier: tier.seek(SPEC.tag, {0: Position(1)}),
    "drop": lambda tier: tier.drop_table(SPEC.tag),
    "create": lambda tier: tier.open_table(TableSpec("model", "new", 4)),
}


@pytest.mark.parametrize("write", list(WRITES))
def test_a_read_only_tier_refuses_to_write(tier: RocksDBTier, write: str) -> None:
    tier.load(SPEC.tag, [block(KEYS, 1.0)])
    reader = reopened(tier, read_only=True)
    with pytest.raises(TierUnavailableError, match=r"read-only.*read_only to false"):
        WRITES[write](reader)
    assert_rows(reader, SPEC, KEYS, filled_rows(SPEC, KEYS.size, 1.0))
    reader.close()


def test_a_read_only_tier_needs_a_database(path: str) -> None:
    with pytest.raises(TierUnavailableError, match=path):
        RocksDBTier(path, read_only=True)
    assert not Path(path).exists()


# Races


def test_a_fetch_sees_one_generation(tier: RocksDBTier) -> None:
    tier.load(SPEC.tag, [block(KEYS, 0.0)])

    def write() -> None:
        for version in range(1, 25):
            tier.load(SPEC.tag, [block(KEYS, version)], ascending=True)

    def read(_: int) -> None:
        rows, found = fetch(tier, SPEC, KEYS)
        assert found.all()
        np.testing.assert_array_equal(rows, rows[0, 0])

    run_while(write, read)
    assert_rows(tier, SPEC, KEYS, filled_rows(SPEC, KEYS.size, 24.0))


def test_tables_are_loaded_side_by_side(tier: RocksDBTier) -> None:
    specs = [TableSpec("model", f"t{i}", 4) for i in range(4)]

    def load(spec: TableSpec) -> None:
        for value in range(6):
            tier.open_table(spec)
            rows = filled_rows(spec, KEYS.size, value)
            tier.load(spec.tag, [RowBlock(KEYS, rows)])

    run_all(load, specs)
    for spec in specs:
        assert_rows(tier, spec, KEYS, filled_rows(spec, KEYS.size, 5.0))


def test_a_table_can_be_dropped_under_its_users(tier: RocksDBTier) -> None:
    """A write to a dropped family would make RocksDB refuse every later write."""
    other = TableSpec("model", "other", 4)
    tier.open_table(other)
    dropped = threading.Event()

    def use(worker: int) -> None:
        while not dropped.is_set():
            with suppress(UnknownTableError):
                tier.insert(SPEC.tag, KEYS, filled_rows(SPEC, KEYS.size, worker))
                fetch(tier, SPEC, KEYS)
                tier.evict(SPEC.tag)

    def drop(_: int) -> None:
        try:
            for value in range(40):
                tier.drop_table(SPEC.tag)
                tier.open_table(SPEC)
                tier.insert(other.tag, KEY, filled_rows(other, 1, value))
        finally:
            dropped.set()

    run_all(lambda worker: drop(2) if worker == 2 else use(worker), range(3))
    assert_rows(tier, other, KEY, filled_rows(other, 1, 39.0))
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0))
    assert_rows(reopened(tier), SPEC, KEY, filled_rows(SPEC, 1, 1.0))


def test_a_writer_that_waited_for_a_drop_does_not_write(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tier._tables[SPEC.tag]
    writing = table.writing

    class DropFirst:
        def __enter__(self) -> None:
            table.writing = writing
            tier.drop_table(SPEC.tag)
            writing.acquire()

        def __exit__(self, *_: object) -> None:
            writing.release()

    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 1.0))
    monkeypatch.setattr(table, "writing", DropFirst())
    with pytest.raises(UnknownTableError, match=SPEC.tag):
        tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 2.0))
    tier.open_table(SPEC)
    tier.insert(SPEC.tag, KEY, filled_rows(SPEC, 1, 3.0))
    assert_rows(reopened(tier), SPEC, KEY, filled_rows(SPEC, 1, 3.0))


def test_a_fetch_that_fails_waits_for_its_threads(tier: RocksDBTier) -> None:
    """They write to the caller's arrays."""
    tier.load(SPEC.tag, [block(KEYS, 1.0)])
    family = tier._tables[SPEC.tag].family
    multi_get, n_done = family.multi_get, 0

    def failing(keys: list[bytes]) -> list[bytes | None]:
        nonlocal n_done
        if keys[0] == bytes([128, *[0] * 7]):
            raise InjectedError
        for _ in range(20):
            values = multi_get(keys)
        n_done += 1
        return values

    family.multi_get = failing
    with pytest.raises(InjectedError):
        fetch(tier, SPEC, KEYS)
    assert n_done == KEYS.size // 1024 - 1


def test_close_lets_large_fetches_finish(tier: RocksDBTier) -> None:
    tier.load(SPEC.tag, [block(KEYS, 1.0)])
    path = tier._store.path
    for _ in range(10):
        busy = threading.Barrier(3, timeout=60)

        def read(tier: RocksDBTier, busy: threading.Barrier) -> int:
            busy.wait()
            for n_fetched in range(1_000_000):
                try:
                    rows, found = fetch(tier, SPEC, KEYS)
                except ClosedError:
                    return n_fetched
                assert found.all()
                np.testing.assert_array_equal(rows, 1.0)
            raise AssertionError("close was not noticed")

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read, tier, busy) for _ in range(2)]
            busy.wait()
            fetch(tier, SPEC, KEYS)
            tier.close()
        assert sum(reader.result() for reader in readers) > 0
        tier = opened(path)  # possible only if the last reader released the files
    tier.close()
