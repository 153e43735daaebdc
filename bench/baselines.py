"""What the tiers are measured against: the plain ways to do the same work.

Every table here holds the keys ``0 .. n_rows - 1``, and every ``fetch`` fills ``out``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
)

from hps_numba.types import Keys, Rows

DB_BENCH_HINT = "db_bench is not on the PATH; Debian's package rocksdb-tools has it"
BLOOM_BITS = 10
BLOCK_BYTES = 4096


class DictTable:
    """A ``dict`` from key to row number over one matrix."""

    def __init__(self, keys: Keys, rows: Rows) -> None:
        self._row_of = dict(zip(keys.tolist(), range(len(keys)), strict=True))
        self._rows = rows

    def fetch(self, keys: Keys, out: Rows) -> None:
        """Look every key up, then take all rows at once."""
        numbers = np.fromiter(map(self._row_of.__getitem__, keys.tolist()), np.int64)
        np.take(self._rows, numbers, axis=0, out=out, mode="clip")


class DenseTable:
    """Rows in the order of their keys: the key is the row number, nothing is hashed."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def fetch(self, keys: Keys, out: Rows) -> None:
        """Take all rows; ``mode="clip"`` saves NumPy a second copy of them."""
        np.take(self._rows, keys, axis=0, out=out, mode="clip")


class RocksdictTable:
    """A RocksDB used as rocksdict's documentation does: one key at a time.

    Block size, filter and compression are those of db_bench in ``DbBench``.
    """

    def __init__(self, path: Path, *, cache_bytes: int) -> None:
        self._db: Any = Rdict(str(path), _options(cache_bytes))

    def write(self, keys: Keys, rows: Rows, *, batch: int = 1000) -> None:
        """Write rows in the given order, ``batch`` of them in each WriteBatch."""
        names = _names(keys)
        for start in range(0, len(names), batch):
            changes = WriteBatch(raw_mode=True)
            for name, row in zip(
                names[start : start + batch], rows[start : start + batch], strict=True
            ):
                changes.put(name, row.tobytes())
            self._db.write(changes)

    def compact(self) -> None:
        """Bring the table into its read shape."""
        self._db.flush()
        self._db.compact_range(None, None)

    def fetch(self, keys: Keys, out: Rows) -> None:
        """Get every key and copy its row."""
        get, dtype = self._db.get, out.dtype
        for i, name in enumerate(_names(keys)):
            out[i] = np.frombuffer(get(name), dtype)

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _names(keys: Keys) -> list[bytes]:
    raw = keys.astype(">i8").tobytes()
    return [raw[i : i + 8] for i in range(0, len(raw), 8)]


def _options(cache_bytes: int) -> Any:
    blocks = BlockBasedOptions()
    blocks.set_block_cache(Cache(cache_bytes))
    blocks.set_bloom_filter(BLOOM_BITS, False)
    blocks.set_block_size(BLOCK_BYTES)
    options = Options(raw_mode=True)
    options.set_compression_type(DBCompressionType.none())
    options.set_block_based_table_factory(blocks)
    return options


@dataclass(frozen=True)
class DbBench:
    """RocksDB's own benchmark program on a table of the same shape.

    Parameters
    ----------
    directory
        Where its database lies.
    n_rows, row_bytes
        Shape of the table.
    cache_bytes
        Block cache.
    threads
        Reading threads; each sends batches of ``batch`` random keys.
    direct
        Read around the page cache, and leave the block cache cold.
    """

    directory: Path
    n_rows: int
    row_bytes: int
    cache_bytes: int
    threads: int = 1
    direct: bool = False
    batch: int = 1000

    @staticmethod
    def absent() -> dict[str, str]:
        """Return why the program cannot run, by name; empty if it can."""
        return {} if shutil.which("db_bench") else {"db_bench": DB_BENCH_HINT}

    def fill(self) -> None:
        """Write the table and compact it."""
        self._run("fillseq,compact", "--disable_wal", "--use_existing_db=false")

    def multi_get_s(self, n_keys: int, *, seed: int) -> float:
        """Return the seconds in which it read ``n_keys`` random keys by MultiGet."""
        # readtocache fills the block cache, which is empty in every new process.
        warm = [] if self.direct else ["readtocache"]
        output = self._run(
            ",".join([*warm, "multireadrandom"]),
            "--use_existing_db",
            "--readonly",
            "--multiread_batched",
            f"--batch_size={self.batch}",
            f"--reads={n_keys // self.threads}",
            f"--threads={self.threads}",
            f"--use_direct_reads={str(self.direct).lower()}",
            f"--seed={seed}",
        )
        return n_keys / ops_per_s(output, "multireadrandom")

    def _run(self, benchmarks: str, *flags: str) -> str:
        command = [
            shutil.which("db_bench") or "db_bench",
            f"--db={self.directory}",
            f"--benchmarks={benchmarks}",
            f"--num={self.n_rows}",
            f"--value_size={self.row_bytes}",
            f"--cache_size={self.cache_bytes}",
            f"--bloom_bits={BLOOM_BITS}",
            f"--block_size={BLOCK_BYTES}",
            "--key_size=8",
            "--compression_type=none",
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout


def ops_per_s(output: str, benchmark: str) -> float:
    """Return the rate that db_bench printed for a benchmark.

    Raises
    ------
    ValueError
        If the output has no such line, or not every key was found.
    """
    line = next(_lines(output, benchmark), "")
    rate = re.search(r"(\d+) ops/sec", line)
    found = re.search(r"\((\d+) of (\d+) found\)", line)
    if rate is None or found is None or found[1] != found[2]:
        raise ValueError(f"db_bench did not read all keys in {benchmark}: {line!r}")
    return float(rate[1])


def _lines(output: str, benchmark: str) -> Iterator[str]:
    pattern = rf"^{benchmark}\s+:.*$"
    return (match[0] for match in re.finditer(pattern, output, re.MULTILINE))
