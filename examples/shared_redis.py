"""Two servers that share the rows in a Redis, each over a RocksDB of its own.

It needs `pip install "hps-numba[redis]"` and a Redis, 6.2 or newer: a single server, or
addresses of a cluster, separated by commas.

Run: REDIS_ADDRESS=127.0.0.1:6379 python examples/shared_redis.py [DIRECTORY]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

ADDRESS = os.environ.get("REDIS_ADDRESS", "127.0.0.1:6379")
N_KEYS, DIM = 10_000, 16


def configuration(folder: Path, server: str) -> hps.ParameterServerConfig:
    """Return one of the servers: they differ in the path of RocksDB alone."""
    return hps.ParameterServerConfig(
        volatile_db=hps.VolatileDatabaseParams(
            type="redis_cluster", address=ADDRESS, cache_missed_embeddings=True
        ),
        persistent_db=hps.PersistentDatabaseParams(
            backend="rocks_db", path=str(folder / server)
        ),
        models=[
            hps.InferenceParams(
                model_name="shared_example",
                sparse_model_files=[str(folder / "item")],
                embedding_table_names=["item"],
                embedding_vecsize_per_table=[DIM],
                maxnum_catfeature_query_per_table_per_sample=[26],
                max_batchsize=1024,
                use_gpu_embedding_cache=False,
            )
        ],
    )


def main(folder: Path) -> None:
    keys = np.arange(N_KEYS)
    rows = np.random.default_rng(0).random((N_KEYS, DIM), dtype=np.float32)
    write_model_directory(folder / "item", keys, rows)

    # The first one loads the files into Redis. The second one finds them there, and
    # loads them into its RocksDB alone.
    with (
        hps.HPS(configuration(folder, "a")) as first,
        hps.HPS(configuration(folder, "b")) as second,
    ):
        table = ("shared_example", "item")
        print("same rows:", np.array_equal(second.lookup(keys, *table), rows))

        first.update(*table, [3], np.ones((1, DIM), np.float32))
        print("updated by the first:", second.lookup([3], *table)[0, :3])
        print("it came from:", second.locate(*table, [3]))

        # Otherwise the rows stay in Redis, for servers that start later.
        first.remove_model("shared_example", drop_tables=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
