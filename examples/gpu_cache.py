"""The GPU cache, with nothing but NumPy and CUDA's own package for Python.

Looks rows up for the host and for the device, updates them, and prepares a lookup whose
launch may be part of a CUDA graph. Needs a GPU and `pip install 'hps-numba[cuda13]'`.

Run: python examples/gpu_cache.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Device

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

N_KEYS, DIM = 2000, 8


def configuration(folder: Path) -> hps.ParameterServerConfig:
    """Return a server with room for half of the rows on the GPU."""
    return hps.ParameterServerConfig(
        volatile_db=hps.VolatileDatabaseParams(cache_missed_embeddings=True),
        persistent_db=hps.PersistentDatabaseParams(
            backend="rocks_db", path=str(folder / "rocksdb")
        ),
        models=[
            hps.InferenceParams(
                model_name="ranker",
                sparse_model_files=[str(folder / "item")],
                embedding_table_names=["item"],
                embedding_vecsize_per_table=[DIM],
                maxnum_catfeature_query_per_table_per_sample=[4],
                default_value_for_each_table=[0.0],
                max_batchsize=64,
                use_gpu_embedding_cache=True,
                cache_size_percentage=0.5,
                hit_rate_threshold=1.1,  # every lookup waits for what the cache lacks
                number_of_worker_buffers_in_pool=2,  # lookups that run at once
                require_gpu=True,
            )
        ],
    )


def address(array: Any) -> int:
    """Return where an array on the device begins."""
    return int(array.__cuda_array_interface__["data"][0])


def on_host(array: Any) -> Any:
    """Return a copy of an array of the default stream in host memory."""
    described = array.__cuda_array_interface__
    host = np.empty(described["shape"], described["typestr"])
    (status,) = driver.cuMemcpyDtoH(host.ctypes.data, address(array), host.nbytes)
    assert not status, status
    return host


def main(folder: Path) -> None:
    keys = np.arange(N_KEYS)
    rows = np.random.default_rng(0).random((N_KEYS, DIM), dtype=np.float32)
    write_model_directory(folder / "item", keys, rows)
    Device(0).set_current()  # for the copies of this program

    with hps.HPS(configuration(folder)) as server:
        session = server.session("ranker", device=0)
        asked = np.array([[1, 2, 1, 1500], [3, 4, 5, 1_000_000]])

        # 1. Keys of the host give rows of the host, as without a GPU.
        found = np.zeros(asked.shape, bool)
        out = session.lookup("item", asked, found=found)
        print("on the host:", out.shape, np.array_equal(out[found], rows[asked[found]]))
        print("found:", found.tolist())  # nobody knows key 1,000,000: the default row

        # 2. With a stream, or keys on the device, rows stay there. 0 is the handle of
        #    the default stream; streams of other libraries are passed as they are.
        there = session.lookup("item", asked, stream=0)
        print("on the device:", np.array_equal(on_host(there), out))

        # 3. Updates change cached rows in place: later lookups see them.
        server.update("ranker", "item", [2], np.ones((1, DIM), np.float32))
        new = session.lookup("item", [2], stream=0)
        print("updated:", on_host(new)[0, :3])

        # 4. Fixed buffers: write keys, launch, read rows. `launch` neither allocates
        #    nor waits; `complete` fetches what the cache did not have.
        with session.prepare({"item": 256}) as prepared:
            batch = np.arange(N_KEYS - 256, N_KEYS)
            place = prepared.keys["item"]
            (status,) = driver.cuMemcpyHtoD(
                address(place), batch.ctypes.data, batch.nbytes
            )
            assert not status, status
            prepared.launch(stream=0)
            n_missing = prepared.complete(stream=0)
            print("some were missing:", 0 < n_missing <= 256)
            right = np.array_equal(on_host(prepared.rows["item"]), rows[batch])
            print("prepared:", right)
            prepared.launch(stream=0)
            print("missing now:", prepared.complete(stream=0))

        use = server.stats().table("ranker", "item").tiers[0]
        print(f"{use.tier}: {use.hits} of {use.asked} keys, {use.rows} rows")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
