"""From a trainer's arrays to served rows: model directory, ps.json, lookup, update.

Run: python examples/quickstart.py [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

DIM = 16


def main(folder: Path) -> None:
    # 1. What a trainer leaves behind: one directory per table, with the files `key` and
    #    `emb_vector`. HugeCTR's model directories have the same format.
    keys = np.arange(100_000)
    rows = np.random.default_rng(0).random((len(keys), DIM), dtype=np.float32)
    write_model_directory(folder / "deep", keys, rows)

    # 2. The configuration. Rows live in RocksDB; host memory keeps the ones in use,
    #    within 4 MiB.
    config = {
        "volatile_db": {
            "type": "parallel_hash_map",
            "max_bytes": 4 << 20,
            "overflow_policy": "evict_oldest",
            "cache_missed_embeddings": True,
        },
        "persistent_db": {"type": "rocks_db", "path": str(folder / "rocksdb")},
        "models": [
            {
                "model": "wdl",
                "sparse_files": [str(folder / "deep")],
                "embedding_table_names": ["deep"],
                "embedding_vecsize_per_table": [DIM],
                "maxnum_catfeature_query_per_table_per_sample": [26],
                "default_value_for_each_table": [0.0],
                "deployed_device_list": [0],
                "max_batch_size": 1024,
                "gpucache": False,
            }
        ],
    }
    path = folder / "ps.json"
    path.write_text(json.dumps(config, indent=2))

    # 3. Serve it. The constructor returns when every table is loaded.
    with hps.HPS.from_json(path) as server:
        # Keys of any integer type and shape; the rows have one dimension more.
        asked = np.array([[1, 2], [3, 1_000_000]])
        found = np.zeros(asked.shape, bool)
        out = server.lookup(asked, "wdl", "deep", found=found)
        print("shape:", out.shape)
        print("found:", found.tolist())  # nobody knows key 1,000,000: the default row
        print("as trained:", np.array_equal(out[0], rows[[1, 2]]))

        # 4. Update while serving: when update() returns, every later lookup sees it.
        server.update("wdl", "deep", [3], np.ones((1, DIM), np.float32))
        print("updated:", server.lookup([3], "wdl", "deep")[0, :3])

    # 5. Starting again does not undo the update: the files have not changed since, so
    #    the table is resumed from RocksDB.
    with hps.HPS.from_json(path) as server:
        print("after a restart:", server.lookup([3], "wdl", "deep")[0, :3])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
