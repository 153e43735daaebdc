"""Serve with a ps.json that was written for HugeCTR, as it is.

The file below has the keys of the hierarchical deployment samples, some of them
obsolete. They are accepted; what has no effect here is said once in the log. Only Redis
and Kafka are left out of it, so that the example needs no servers.

Run: python examples/migrate_from_hps.py [DIRECTORY]
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np

import hps_numba as hps

PS_JSON = """
{
  "supportlonglong": true,
  "volatile_db": {
    "type": "parallel_hash_map",
    "num_partitions": 8,
    "allocation_rate": 268435456,
    "max_get_batch_size": 10000,
    "max_set_batch_size": 10000,
    "overflow_policy": "evict_oldest",
    "overflow_margin": 10000,
    "overflow_resolution_target": 0.8,
    "initial_cache_rate": 1.0,
    "cache_missed_embeddings": true,
    "update_filters": [".+"]
  },
  "persistent_db": {
    "type": "rocks_db",
    "path": "@FOLDER@/rocksdb",
    "num_threads": 16,
    "read_only": false,
    "max_get_batch_size": 10000,
    "max_set_batch_size": 10000,
    "update_filters": ["^hps_.+$"]
  },
  "models": [
    {
      "model": "hps_wdl",
      "sparse_files": [
        "@FOLDER@/wdl0_sparse_20000.model",
        "@FOLDER@/wdl1_sparse_20000.model"
      ],
      "num_of_worker_buffer_in_pool": 3,
      "embedding_table_names": ["embedding_table1", "embedding_table2"],
      "embedding_vecsize_per_table": [1, 16],
      "maxnum_catfeature_query_per_table_per_sample": [2, 26],
      "default_value_for_each_table": [0.0, 0.0],
      "deployed_device_list": [0],
      "max_batch_size": 1024,
      "cache_refresh_percentage_per_iteration": 0.2,
      "hit_rate_threshold": 0.9,
      "gpucacheper": 0.5,
      "gpucache": true
    }
  ]
}
"""


def write_hugectr_model(folder: Path, dim: int) -> None:
    """Write the two files that HugeCTR's trainer writes; each row holds its key."""
    folder.mkdir(parents=True)
    keys = np.arange(20_000, dtype="<i8")
    keys.tofile(folder / "key")
    np.repeat(keys, dim).astype("<f4").tofile(folder / "emb_vector")


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for number, dim in enumerate((1, 16)):
        write_hugectr_model(folder / f"wdl{number}_sparse_20000.model", dim)
    path = folder / "ps.json"
    path.write_text(PS_JSON.replace("@FOLDER@", str(folder)))

    with hps.HPS(hps_json_config_file=path) as server:
        # A request as the sample sends it: keys of table 0, then keys of table 1.
        n_keys = [20, 260]
        keys = np.random.default_rng(0).integers(0, 20_000, sum(n_keys))
        wide = server.lookup(keys[:20], "hps_wdl", 0)
        deep = server.lookup(keys[20:], "hps_wdl", 1)
        output = np.concatenate([wide.reshape(-1), deep.reshape(-1)])
        print("OUTPUT0:", output.shape)
        print("right rows:", np.array_equal(deep[:, 0], keys[20:].astype(np.float32)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
