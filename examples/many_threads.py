"""Lookups from several threads while a trainer updates rows.

Every row holds the number of its version in all of its values. The readers check that a
row is never a mixture of two versions, and that a version never goes back.

Run: python examples/many_threads.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

N_KEYS, DIM, N_READERS, N_VERSIONS = 20_000, 8, 3, 20


def configuration(folder: Path) -> hps.ParameterServerConfig:
    """Return a server whose host memory holds a part of the rows."""
    return hps.ParameterServerConfig(
        volatile_db=hps.VolatileDatabaseParams(
            max_bytes=512 << 10, num_partitions=2, cache_missed_embeddings=True
        ),
        persistent_db=hps.PersistentDatabaseParams(
            backend="rocks_db", path=str(folder / "rocksdb")
        ),
        models=[
            hps.InferenceParams(
                model_name="ranker",
                sparse_model_files=[str(folder / "item")],
                embedding_table_names=["item"],
                embedding_vecsize_per_table=[DIM],
                maxnum_catfeature_query_per_table_per_sample=[8],
                max_batchsize=256,
                use_gpu_embedding_cache=False,
            )
        ],
    )


def read(server: hps.HPS, done: threading.Event, seed: int) -> tuple[int, int]:
    """Look random keys up until the trainer is done; return rows and wrong rows."""
    rng = np.random.default_rng(seed)
    session = server.session("ranker")
    newest = np.zeros(N_KEYS, np.float32)
    n_rows = n_wrong = 0
    while True:
        last = done.is_set()
        keys = rng.integers(0, N_KEYS, 2048)
        rows = session.lookup("item", keys)
        versions = rows[:, 0]
        torn = (rows != versions[:, None]).any(axis=1)
        older = versions < newest[keys]
        np.maximum.at(newest, keys, versions)
        n_rows += len(keys)
        n_wrong += int(np.count_nonzero(torn | older))
        if last:
            return n_rows, n_wrong


def train(server: hps.HPS) -> None:
    """Send every tenth row again, N_VERSIONS times."""
    keys = np.arange(0, N_KEYS, 10)
    for version in range(1, N_VERSIONS + 1):
        server.update("ranker", "item", keys, np.full((len(keys), DIM), version, "f4"))


def main(folder: Path) -> None:
    rows = np.zeros((N_KEYS, DIM), np.float32)
    write_model_directory(folder / "item", np.arange(N_KEYS), rows)
    done = threading.Event()
    with (
        hps.HPS(configuration(folder)) as server,
        ThreadPoolExecutor(N_READERS) as pool,
    ):
        readers = [pool.submit(read, server, done, seed) for seed in range(N_READERS)]
        try:
            train(server)
        finally:
            done.set()
        results = [reader.result() for reader in readers]
        stats = server.stats().table("ranker", "item")
    print("wrong rows:", sum(wrong for _, wrong in results))
    print("every reader read:", all(n_rows > 0 for n_rows, _ in results))
    print("updated rows:", stats.updated_rows)
    for use in stats.tiers:
        print(f"{use.tier}: {use.hits:,} of {use.asked:,} keys, {use.hit_rate:.1%}")
    print(
        f"lookup p50 {stats.latency.p50_ms:.2f} ms, p99 {stats.latency.p99_ms:.2f} ms"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
