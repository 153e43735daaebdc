"""How RocksDB takes spans of an update stream: batches, files, and what may fail."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from hps_numba.errors import TierCorruptionError, TierUnavailableError
from hps_numba.tiers import rocksdb_store, rocksdb_table
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.tiers.rocksdb_family import END_OF_ROWS, Batch, Family
from hps_numba.tiers.rocksdb_store import RocksStore
from hps_numba.tiers.testing.races import run_while
from hps_numba.tiers.testing.suite import (
    EXTREME_KEYS,
    SPEC,
    assert_absent,
    assert_rows,
    fetch,
    filled_rows,
    random_rows,
)
from hps_numba.types import Keys, Position, RowBlock, StreamSpan
from tests.support.redis_servers import wait_for

PIECE = np.arange(1000, dtype=np.int64)
BURST = np.arange(rocksdb_table._BURST_ROWS, dtype=np.int64)
SIZES = pytest.mark.parametrize("keys", [PIECE, BURST], ids=["piece", "burst"])


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


def opened(path: str, *, read_only: bool = False) -> RocksDBTier:
    tier = RocksDBTier(path, cache_bytes=8 << 20, read_only=read_only)
    tier.open_table(SPEC)
    return tier


def reopened(tier: RocksDBTier) -> RocksDBTier:
    tier.close()
    return opened(tier._store.path)


def put(tier: RocksDBTier, keys: Keys, version: int) -> int:
    """Apply message ``version``, whose rows name it."""
    over = StreamSpan(0, Position(version), Position(version + 1))
    return tier.apply(SPEC.tag, keys, filled_rows(SPEC, keys.size, version), over)


def assert_version(tier: RocksDBTier, keys: Keys, version: int) -> None:
    """Check that rows and position are those of a message."""
    assert_rows(tier, SPEC, keys, filled_rows(SPEC, keys.size, version))
    assert tier.positions(SPEC.tag) == {0: Position(version + 1)}


def files_left(tier: RocksDBTier) -> list[Path]:
    return list(Path(tier._store.path).glob("hps_load/*"))


# Batches and files


def batches_of(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int]]:
    """Return lists that fill with the sizes of batches and the numbers of files."""
    sizes: list[int] = []
    files: list[int] = []
    write, ingest = tier._store.write, Family.ingest

    def counted_write(batch: Batch, *, sync: bool = False) -> None:
        sizes.append(batch.pending.len())
        write(batch, sync=sync)

    def counted_ingest(family: Family, paths: list[str]) -> None:
        files.append(len(paths))
        ingest(family, paths)

    monkeypatch.setattr(tier._store, "write", counted_write)
    monkeypatch.setattr(Family, "ingest", counted_ingest)
    return sizes, files


def test_a_piece_is_one_batch_with_its_position(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tier, PIECE, 1)
    sizes, files = batches_of(tier, monkeypatch)
    most = BURST[1:]
    put(tier, most, 2)
    tier.apply(SPEC.tag, most, None, StreamSpan(0, Position(3), Position(4)))
    assert sizes == [most.size + 2] * 2  # the epoch, too
    assert files == []


@pytest.mark.parametrize(("file_bytes", "n_files"), [(1 << 20, 1), (32 << 10, 3)])
def test_a_burst_is_a_set_of_files_with_its_position(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch, file_bytes: int, n_files: int
) -> None:
    """The one batch has the epoch, so that a restart does not take the rows for old."""
    monkeypatch.setattr(rocksdb_table, "_FILE_BYTES", file_bytes)
    keys = np.concatenate([EXTREME_KEYS[:2], BURST, EXTREME_KEYS[-1:]])
    put(tier, PIECE, 1)
    sizes, files = batches_of(tier, monkeypatch)
    put(tier, keys[::-1].copy(), 2)
    assert len(sizes) == 1
    assert sizes[0] <= 2
    assert files[0] >= n_files
    assert files_left(tier) == []
    again = reopened(tier)
    assert_version(again, keys, 2)
    assert again.size(SPEC.tag) == keys.size
    again.apply(SPEC.tag, keys, None, StreamSpan(0, Position(3), Position(4)))
    assert_absent(again, SPEC, keys)
    assert again.size(SPEC.tag) == 0
    again.close()


def test_pieces_and_bursts_take_turns(tier: RocksDBTier) -> None:
    """Rows in memory, in the log and in files: the newest is seen in any order."""
    last: dict[int, int] = {}
    random = np.random.default_rng(0)
    for version in range(1, 25):
        n_keys = int(random.choice([3, 1000, BURST.size]))
        keys = random.choice(2 * BURST.size, n_keys, replace=False).astype(np.int64)
        put(tier, keys, version)
        last.update(dict.fromkeys(keys.tolist(), version))
        tier = reopened(tier) if version % 8 == 0 else tier
    keys = np.array([*last], np.int64)
    rows, found = fetch(tier, SPEC, keys)
    assert found.all()
    np.testing.assert_array_equal(rows[:, 0], [*last.values()])
    assert tier.size(SPEC.tag) == keys.size
    tier.close()


def test_a_wide_span_is_a_burst_whatever_its_rows(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rocksdb_table, "_BURST_BYTES", PIECE.size * SPEC.row_bytes)
    _, files = batches_of(tier, monkeypatch)
    put(tier, PIECE[1:], 1)
    assert files == []
    put(tier, PIECE, 2)
    assert files == [1]
    assert_version(tier, PIECE, 2)


@SIZES
def test_readers_see_a_span_as_a_whole(tier: RocksDBTier, keys: Keys) -> None:
    put(tier, keys, 0)
    asked = keys[:: keys.size // 500].copy()  # few enough to be read in one call

    def write() -> None:
        for version in range(1, 60):
            put(tier, keys, version)

    def read(_: int) -> None:
        at = tier.positions(SPEC.tag)[0].offset - 1
        rows, found = fetch(tier, SPEC, asked)
        assert found.all()
        np.testing.assert_array_equal(rows, rows[0, 0])
        assert rows[0, 0] >= at

    run_while(write, read)
    assert_version(tier, keys, 59)


# What fails


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let the next call of a method raise, before it does anything."""

    def fail(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise InjectedError

    monkeypatch.setattr(owner, name, fail)


STEPS: dict[str, tuple[type, str, Keys]] = {
    "piece": (RocksStore, "write", PIECE),
    "burst's batch": (RocksStore, "write", BURST),
    "burst's files": (RocksStore, "write_files", BURST),
    "burst's ingestion": (Family, "ingest", BURST),
}


@pytest.mark.parametrize("first", [False, True], ids=["rows", "no rows"])
@pytest.mark.parametrize("step", list(STEPS))
def test_a_span_that_fails_leaves_nothing_and_can_be_repeated(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch, step: str, first: bool
) -> None:
    owner, name, keys = STEPS[step]
    if not first:
        tier.load(SPEC.tag, [RowBlock(BURST, filled_rows(SPEC, BURST.size, 0.0))])
        put(tier, BURST[:0], 0)
    fail_once(monkeypatch, owner, name)
    with pytest.raises(InjectedError):
        put(tier, keys, 1)
    assert files_left(tier) == []
    for restarts in range(2):
        tier = reopened(tier) if restarts else tier
        if first:
            assert tier.positions(SPEC.tag) == {}
            assert_absent(tier, SPEC, BURST)
        else:
            assert_version(tier, BURST, 0)
    assert put(tier, keys, 1) == keys.size
    assert_version(tier, keys, 1)
    assert not tier.untouched(SPEC.tag)
    tier.close()


@pytest.mark.parametrize("step", ["piece", "burst's batch", "burst's ingestion"])
def test_a_span_that_fails_refuses_backfills(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It may have been written."""
    owner, name, keys = STEPS[step]
    epoch = tier.epoch(SPEC.tag)
    fail_once(monkeypatch, owner, name)
    with pytest.raises(InjectedError):
        put(tier, keys, 1)
    rows = filled_rows(SPEC, keys.size, 0.0)
    assert tier.backfill(SPEC.tag, keys, rows, epoch) == 0


def test_a_table_is_touched_before_files_are_taken_over(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed after that must not be taken for one that only loaded."""
    tier.load(SPEC.tag, [RowBlock(PIECE, random_rows(SPEC, PIECE.size))])
    fail_once(monkeypatch, Family, "ingest")
    with pytest.raises(InjectedError):
        put(tier, BURST, 1)
    assert not tier.untouched(SPEC.tag)
    again = reopened(tier)
    assert not again.untouched(SPEC.tag)
    again.close()


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault
@pytest.mark.parametrize("room", [0, 1, 5_000, 20_000])
@SIZES
def test_a_disk_without_room_leaves_rows_and_position(
    tier: RocksDBTier, keys: Keys, room: int
) -> None:
    """RocksDB may refuse all writes from then on, the last one at its end included."""
    put(tier, keys, 1)
    path = Path(tier._store.path)
    used = max(file.stat().st_size for file in path.glob("*.log"))
    n_put = 0
    with largest_file(used + room), suppress(TierUnavailableError):
        for version in range(2, 6):
            put(tier, keys, version)
            n_put += 1
    assert n_put < 2
    assert files_left(tier) == []
    assert_version(tier, keys, 1 + n_put)
    with suppress(TierUnavailableError):
        tier.close()
    again = opened(str(path))
    assert_version(again, keys, 1 + n_put)
    assert put(again, keys, 2 + n_put) == keys.size
    assert_version(again, keys, 2 + n_put)
    again.close()


@SIZES
def test_a_read_only_tier_tells_positions_and_refuses_spans(
    tier: RocksDBTier, keys: Keys
) -> None:
    put(tier, keys, 1)
    tier.close()
    reader = opened(tier._store.path, read_only=True)
    refused: tuple[Callable[[], object], ...] = (
        lambda: put(reader, keys, 2),
        lambda: put(reader, keys, 1),
        lambda: reader.seek(SPEC.tag, {0: Position(0)}),
    )
    for call in refused:
        with pytest.raises(TierUnavailableError, match="read-only"):
            call()
    assert_version(reader, keys, 1)
    reader.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"stream/0", b"many"), (b"stream/0", b"\xff"), (b"stream/x", b"1:0"), (b"", b"")],
)
def test_a_position_that_cannot_be_read_is_named(
    tier: RocksDBTier, key: bytes, value: bytes
) -> None:
    """Rows can still be read, and the tier does not guess where it is."""
    put(tier, PIECE, 1)
    tier._store._db.get_column_family(SPEC.tag)[END_OF_ROWS + key] = value
    with pytest.raises(TierCorruptionError, match="table: the position"):
        tier.positions(SPEC.tag)
    if key == b"stream/0":
        with pytest.raises(TierCorruptionError, match="deploy again"):
            put(tier, PIECE, 2)
    assert_rows(tier, SPEC, PIECE, filled_rows(SPEC, PIECE.size, 1))
    assert tier.size(SPEC.tag) == PIECE.size


# Compaction that falls behind


def test_writes_wait_for_compaction_without_the_gil(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RocksDB's own wait, inside a write, would stop every thread of the process."""
    monkeypatch.setattr(rocksdb_store, "_LONGEST_WAIT_S", 120.0)
    family = tier._store._db.get_column_family
    put(tier, BURST, 1)
    put(tier, BURST, 2)  # overlaps with the first, so it does not go to the bottom
    assert not tier._store.is_congested()
    family(SPEC.tag).set_options({"level0_slowdown_writes_trigger": "1"})
    asked, n_asked = tier._store.is_congested, 0

    def counted() -> bool:
        nonlocal n_asked
        n_asked += 1
        return asked()

    monkeypatch.setattr(tier._store, "is_congested", counted)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(put, tier, PIECE, 3)
        wait_for(lambda: n_asked >= 5)
        assert not waiting.done()
        assert_version(tier, BURST, 2)
        family(SPEC.tag).set_options({"level0_slowdown_writes_trigger": "20"})
        assert waiting.result(120) == PIECE.size
    assert_version(tier, PIECE, 3)


def test_a_write_does_not_wait_for_ever(
    tier: RocksDBTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong then, RocksDB has to say it."""
    monkeypatch.setattr(rocksdb_store, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(tier._store, "is_congested", lambda: True)
    assert put(tier, PIECE, 1) == PIECE.size
    assert_version(tier, PIECE, 1)
