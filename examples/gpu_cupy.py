"""Rows as CuPy arrays: with CuPy installed, that is what lookups on the device return.

Needs a GPU, CuPy and `pip install 'hps-numba[cuda13]'`.

Run: python examples/gpu_cupy.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

try:
    import cupy
except ImportError:
    sys.exit("this example needs CuPy: pip install cupy-cuda13x")

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

N_USERS, N_ITEMS, DIM, BATCH = 20_000, 50_000, 16, 512


def configuration(folder: Path) -> hps.ParameterServerConfig:
    """Return a server with two tables, and 8 MiB for both on the GPU."""
    return hps.ParameterServerConfig(
        volatile_db=hps.VolatileDatabaseParams(cache_missed_embeddings=True),
        persistent_db=hps.PersistentDatabaseParams(
            backend="rocks_db", path=str(folder / "rocksdb")
        ),
        models=[
            hps.InferenceParams(
                model_name="ranker",
                sparse_model_files=[str(folder / "user"), str(folder / "item")],
                embedding_table_names=["user", "item"],
                embedding_vecsize_per_table=[DIM, DIM],
                maxnum_catfeature_query_per_table_per_sample=[1, 10],
                max_batchsize=BATCH,
                use_gpu_embedding_cache=True,
                gpu_cache_bytes=8 << 20,
                hit_rate_threshold=1.1,
                require_gpu=True,
            )
        ],
    )


def check(what: str, rows: Any, expected: Any) -> None:
    """Compare rows with those that they have to be."""
    right = bool((rows == expected).all())
    print(f"{what}:", type(rows).__module__.partition(".")[0], rows.shape, right)
    if not right:
        raise SystemExit(f"{what}: wrong rows")


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    known = {}
    for name, n_rows in (("user", N_USERS), ("item", N_ITEMS)):
        rows = rng.random((n_rows, DIM), dtype=np.float32)
        write_model_directory(folder / name, np.arange(n_rows), rows)
        known[name] = cupy.asarray(rows)

    with hps.HPS(configuration(folder)) as server:
        session = server.session("ranker", device=0)

        # 1. Two tables in one launch, since their rows are alike.
        users = cupy.random.randint(N_USERS, size=BATCH, dtype=np.int64)
        items = cupy.random.randint(N_ITEMS, size=(BATCH, 10), dtype=np.int64)
        rows = session.lookup({"user": users, "item": items})
        check("users", rows["user"], known["user"][users])
        check("items", rows["item"], known["item"][items])
        scores = (rows["item"] * rows["user"][:, None]).sum(axis=2)
        print("scores:", scores.shape)

        # 2. On a stream of CuPy. Rows are valid in its order, so nobody waits.
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            items = cupy.random.randint(N_ITEMS, size=BATCH, dtype=np.int64)
            rows = session.lookup("item", items, stream=stream.ptr)
            expected = known["item"][items]
        stream.synchronize()
        check("on a stream", rows, expected)

        # 3. A prepared lookup in a CUDA graph.
        with session.prepare({"user": BATCH}) as prepared:
            with stream:
                stream.begin_capture()
                prepared.launch(stream=stream.ptr)
                graph = stream.end_capture()
                for _ in range(3):
                    prepared.keys["user"][...] = cupy.random.randint(
                        N_USERS, size=BATCH, dtype=np.int64
                    )
                    graph.launch(stream)
                    prepared.complete(stream=stream.ptr)
            stream.synchronize()
            users = prepared.keys["user"]
            check("from a graph", prepared.rows["user"], known["user"][users])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
