"""The configuration as HugeCTR's Python objects, without a ps.json.

A script that used `hugectr.inference` keeps its objects; only the import changes.

Run: python examples/python_config.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from hps_numba import (
    HPS,
    DatabaseType_t,
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    VolatileDatabaseParams,
    estimate,
)
from hps_numba.tiers.model_files import write_model_directory

TABLES = {"sparse_embedding1": 16, "sparse_embedding2": 32}


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, dim in TABLES.items():
        rows = rng.random((10_000, dim), dtype=np.float32)
        write_model_directory(folder / name, np.arange(10_000), rows)

    config = ParameterServerConfig(
        emb_table_name={"hps_demo": list(TABLES)},
        embedding_vec_size={"hps_demo": list(TABLES.values())},
        max_feature_num_per_sample_per_emb_table={"hps_demo": [2, 2]},
        inference_params_array=[
            InferenceParams(
                model_name="hps_demo",
                max_batchsize=1024,
                hit_rate_threshold=1.0,
                dense_model_file="",
                sparse_model_files=[str(folder / name) for name in TABLES],
                deployed_devices=[0],
                use_gpu_embedding_cache=False,
                cache_size_percentage=0.5,
                i64_input_key=True,
            )
        ],
        volatile_db=VolatileDatabaseParams(type=DatabaseType_t.parallel_hash_map),
        persistent_db=PersistentDatabaseParams(
            backend=DatabaseType_t.rocks_db, path=str(folder / "rocksdb")
        ),
    )

    # What it will take is known before anything is allocated.
    needed = estimate(config)
    print(
        f"host memory: {needed.host_bytes:,} bytes; disk: {needed.disk_bytes:,} bytes"
    )

    categories = rng.integers(0, 10_000, (1024, 2))
    with HPS(config) as hps:
        # HugeCTR's signature: keys, model, position of the table, device.
        flat = hps.lookup(categories.flatten(), "hps_demo", 0)
        print("flat keys:", flat.shape, flat.dtype)

        # Shapes are kept, so the reshape is not needed here...
        rows = hps.lookup(categories, "hps_demo", "sparse_embedding2")
        print("shaped keys:", rows.shape)

        # ... and one call looks several tables up at once.
        session = hps.session("hps_demo")
        both = session.lookup(dict.fromkeys(TABLES, categories))
        print("both tables:", {name: out.shape for name, out in both.items()})
        print("same rows:", np.array_equal(both["sparse_embedding2"], rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
