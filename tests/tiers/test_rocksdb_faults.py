"""What the RocksDB tier says about paths, locks and files that are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rocksdict import Options, Rdict

from hps_numba.errors import (
    ConfigError,
    HPSError,
    TierCorruptionError,
    TierUnavailableError,
)
from hps_numba.tiers.rocksdb import RocksDBTier
from hps_numba.tiers.testing.suite import (
    SPEC,
    assert_rows,
    fetch,
    filled_rows,
    keys_of,
    random_rows,
)
from hps_numba.types import RowBlock

pytestmark = pytest.mark.fault

KEYS = np.arange(5000, dtype=np.int64)
ROWS = random_rows(SPEC, KEYS.size)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a closed database with rows in a file and in the log."""
    path = tmp_path / "db"
    tier = opened(path)
    tier.load(SPEC.tag, [RowBlock(KEYS, ROWS)])
    tier.insert(SPEC.tag, KEYS[:100], ROWS[:100])
    tier.close()
    return path


def opened(path: Path, *, read_only: bool = False) -> RocksDBTier:
    tier = RocksDBTier(str(path), cache_bytes=1 << 20, read_only=read_only)
    tier.open_table(SPEC)
    return tier


def test_an_open_that_is_refused_leaves_a_running_load_alone(path: Path) -> None:
    def blocks() -> Iterator[RowBlock]:
        yield RowBlock(KEYS, ROWS)
        with pytest.raises(TierUnavailableError, match="open elsewhere"):
            RocksDBTier(str(path))
        yield RowBlock(KEYS + KEYS.size, ROWS)

    tier = opened(path)
    assert tier.load(SPEC.tag, blocks(), ascending=True) == 2 * KEYS.size
    assert tier.size(SPEC.tag) == 2 * KEYS.size
    tier.close()


def raw(path: Path, *families: str) -> Rdict:
    """Open a closed database without this package."""
    stored = Rdict.list_cf(str(path), Options(raw_mode=True)) if path.exists() else []
    known = {name: Options(raw_mode=True) for name in stored if name != "default"}
    db = Rdict(str(path), Options(raw_mode=True), known)
    for name in families:
        db.create_column_family(name, Options(raw_mode=True)).close()
    return db


def put_raw(path: Path, family: str, key: bytes, value: bytes) -> None:
    db = raw(path)
    rows = db.get_column_family(family)
    rows[key] = value
    rows.close()
    db.close()


def largest(path: Path, pattern: str) -> Path:
    return max(path.glob(pattern), key=lambda file: file.stat().st_size)


# Paths and locks


def test_a_path_that_is_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a database")
    for bad in (tmp_path / "file", tmp_path / "file" / "db"):
        for read_only in (False, True):
            with pytest.raises(TierUnavailableError, match=r"file.*check the path"):
                RocksDBTier(str(bad), read_only=read_only)
    assert (tmp_path / "file").read_text() == "not a database"


def test_a_path_that_cannot_be_made_is_unavailable() -> None:
    with pytest.raises(TierUnavailableError, match=r"/proc/hps.*check the path"):
        RocksDBTier("/proc/hps")


def test_a_second_tier_is_refused(path: Path) -> None:
    tier = opened(path)
    with pytest.raises(TierUnavailableError, match="open elsewhere"):
        RocksDBTier(str(path))
    assert_rows(tier, SPEC, KEYS, ROWS)
    tier.close()
    again = opened(path)
    assert_rows(again, SPEC, KEYS, ROWS)
    again.close()


def test_a_second_process_is_refused(path: Path) -> None:
    holder = (
        "import sys\n"
        "from hps_numba.tiers.rocksdb import RocksDBTier\n"
        "tier = RocksDBTier(sys.argv[1])\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
        "tier.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(TierUnavailableError, match=r"open elsewhere.*read-only"):
            RocksDBTier(str(path))
        reader = opened(path, read_only=True)
        assert_rows(reader, SPEC, KEYS, ROWS)
        reader.close()
        process.communicate()
    assert process.returncode == 0
    tier = opened(path)
    assert_rows(tier, SPEC, KEYS, ROWS)
    tier.close()


def test_a_failed_start_leaves_the_database_free(path: Path) -> None:
    put_raw(path, "hps_meta", b"format", b"99")
    with pytest.raises(ConfigError, match="format b'99'"):
        RocksDBTier(str(path))
    put_raw(path, "hps_meta", b"format", b"1")
    tier = opened(path)
    assert_rows(tier, SPEC, KEYS, ROWS)
    tier.close()


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    raw(path, "hps_et.model.table").close()
    put_raw(path, "hps_et.model.table", b"key", b"row")
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=r"another program.*hps_et\.model\.table"):
            RocksDBTier(str(path), read_only=read_only)
    db = raw(path)
    assert db.get_column_family("hps_et.model.table")[b"key"] == b"row"


# Damage


def damage_nothing(path: Path) -> None:
    pass


def garble_current(path: Path) -> None:
    (path / "CURRENT").write_text("garbage\n")


def empty_current(path: Path) -> None:
    (path / "CURRENT").write_bytes(b"")


def name_another_manifest(path: Path) -> None:
    (path / "CURRENT").write_text("MANIFEST-999999\n")


def garble_manifest(path: Path) -> None:
    manifest = largest(path, "MANIFEST-*")
    manifest.write_bytes(bytes(reversed(manifest.read_bytes())))


def empty_manifest(path: Path) -> None:
    largest(path, "MANIFEST-*").write_bytes(b"")


def remove_rows(path: Path) -> None:
    largest(path, "*.sst").unlink()


def truncate_rows(path: Path) -> None:
    file = largest(path, "*.sst")
    file.write_bytes(file.read_bytes()[:-100])


def empty_rows(path: Path) -> None:
    largest(path, "*.sst").write_bytes(b"")


def garble_rows(path: Path, *, at: float = 0.01) -> None:
    """Flip one bit of a row, at a fraction of the largest file."""
    file = largest(path, "*.sst")
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def garble_all_rows(path: Path) -> None:
    file = largest(path, "*.sst")
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = (
    garble_current,
    empty_current,
    name_another_manifest,
    garble_manifest,
    empty_manifest,
    remove_rows,
    truncate_rows,
    empty_rows,
    garble_rows,
    garble_all_rows,
)


@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(
    path: Path, damage: Callable[[Path], None], read_only: bool
) -> None:
    """A damaged file is never silently a table with fewer rows or other values."""
    damage(path)

    def read() -> None:
        tier = opened(path, read_only=read_only)
        try:
            assert_rows(tier, SPEC, KEYS, ROWS)
        finally:
            tier.close()

    with pytest.raises(TierCorruptionError, match="restore them, or remove") as raised:
        read()
    assert str(path) in str(raised.value)
    assert raised.value.tier == "rocksdb"


@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.9])
def test_a_damaged_row_fails_whatever_reads_it(path: Path, at: float) -> None:
    """Iteration in particular does not end early."""
    garble_rows(path, at=at)
    tier = opened(path)
    reads: tuple[Callable[[], object], ...] = (
        lambda: fetch(tier, SPEC, KEYS),
        lambda: list(tier.iterate(SPEC.tag)),
        lambda: list(tier.iterate(SPEC.tag, block_rows=10)),
        lambda: tier.size(SPEC.tag),
    )
    for read in reads:
        with pytest.raises(TierCorruptionError, match="restore them, or remove"):
            read()
    part = KEYS[-100:] if at < 0.5 else KEYS[:100]
    assert_rows(tier, SPEC, part, ROWS[part])
    tier.close()


@pytest.mark.parametrize("width", [0, 15, 17, 32])
def test_a_row_of_another_width_is_named(path: Path, width: int) -> None:
    family = next(
        name
        for name in Rdict.list_cf(str(path), Options(raw_mode=True))
        if name.startswith(SPEC.tag)
    )
    put_raw(path, family, (7 + (1 << 63)).to_bytes(8, "big"), bytes(width))
    tier = opened(path)
    expected = rf"hps_et\.model\.table: the row of key 7 has {width} bytes.*takes 16"
    with pytest.raises(TierCorruptionError, match=expected):
        fetch(tier, SPEC, KEYS[:10])
    with pytest.raises(TierCorruptionError, match=expected):
        list(tier.iterate(SPEC.tag))
    assert_rows(tier, SPEC, KEYS[8:], ROWS[8:])
    tier.insert(SPEC.tag, keys_of(7), filled_rows(SPEC, 1, 7.0))
    assert_rows(tier, SPEC, keys_of(7), filled_rows(SPEC, 1, 7.0))
    tier.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"table/{SPEC.tag}", b"no JSON", "metadata .* cannot be read"),
        (f"table/{SPEC.tag}", b'{"model": 1}', "metadata .* cannot be read"),
        (f"table/{SPEC.tag}", b"[]", "metadata .* cannot be read"),
        (f"epoch/{SPEC.tag}", b"many", "metadata b'many' cannot be read"),
    ],
)
def test_metadata_that_cannot_be_read_is_named(
    path: Path, key: str, value: bytes, message: str
) -> None:
    put_raw(path, "hps_meta", key.encode(), value)
    with pytest.raises(TierCorruptionError, match=message):
        opened(path)


def test_a_missing_family_is_named(path: Path) -> None:
    db = raw(path)
    entry = json.loads(db.get_column_family("hps_meta")[f"table/{SPEC.tag}".encode()])
    db.close()
    entry["family"] = "hps_et.model.table#77"
    put_raw(path, "hps_meta", f"table/{SPEC.tag}".encode(), json.dumps(entry).encode())
    with pytest.raises(TierCorruptionError, match="table#77 is missing"):
        opened(path)


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        ("Corruption: bad block", TierCorruptionError, "restore them, or remove"),
        (
            "IO error: No space left on device: While appending to file",
            TierUnavailableError,
            "free disk space",
        ),
        ("IO error: While open a file", TierUnavailableError, "check the path"),
    ],
)
def test_errors_of_a_running_database_are_translated(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    kind: type[HPSError],
    advice: str,
) -> None:
    tier = opened(path)

    def fail(*_: object, **__: object) -> None:
        raise Exception(status)  # as rocksdict does

    monkeypatch.setattr(tier._store, "write", fail)
    with pytest.raises(kind, match=f"{status}.*{advice}"):
        tier.insert(SPEC.tag, KEYS, ROWS)
    monkeypatch.undo()
    assert_rows(tier, SPEC, KEYS, ROWS)
    tier.close()
