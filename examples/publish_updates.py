"""A training loop that publishes the rows it changes, and a server that follows it.

It needs `pip install "hps-numba[kafka]"` and a Kafka broker that creates topics by
itself, or has the topic hps_et.kafka_example.item.

Run: KAFKA_BROKERS=127.0.0.1:9092 python examples/publish_updates.py [DIRECTORY]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

BROKERS = os.environ.get("KAFKA_BROKERS", "127.0.0.1:9092")
MODEL, TABLE = "kafka_example", "item"
N_KEYS, DIM, N_STEPS = 10_000, 16, 20


def configuration(folder: Path) -> hps.ParameterServerConfig:
    return hps.ParameterServerConfig(
        persistent_db=hps.PersistentDatabaseParams(
            backend="rocks_db", path=str(folder / "rocksdb")
        ),
        update_source=hps.UpdateSourceParams(
            type="kafka_message_queue", brokers=BROKERS
        ),
        models=[
            hps.InferenceParams(
                model_name=MODEL,
                sparse_model_files=[str(folder / TABLE)],
                embedding_table_names=[TABLE],
                embedding_vecsize_per_table=[DIM],
                maxnum_catfeature_query_per_table_per_sample=[26],
                max_batchsize=1024,
                use_gpu_embedding_cache=False,
            )
        ],
    )


def train(weights: np.ndarray, producer: hps.UpdateProducer) -> None:
    """Change some rows in each step, and publish them."""
    rng = np.random.default_rng(0)
    for _ in range(N_STEPS):
        batch = rng.integers(0, N_KEYS // 2, (64, 8))
        gradient = rng.normal(size=(*batch.shape, DIM)).astype(np.float32)
        np.subtract.at(weights, batch, 0.1 * gradient)
        step = hps.touched_rows(weights, batch)  # of PyTorch: (embedding, batch)
        producer.send(MODEL, TABLE, step.keys, step.rows)
    producer.delete(MODEL, TABLE, [N_KEYS - 1])
    producer.flush()  # all of it is with the brokers now


def main(folder: Path) -> None:
    weights = np.random.default_rng(1).random((N_KEYS, DIM), dtype=np.float32)
    keys = np.arange(N_KEYS)
    write_model_directory(folder / TABLE, keys, weights)

    with (
        hps.HPS(configuration(folder)) as server,
        hps.UpdateProducer(BROKERS) as producer,
    ):
        before = server.lookup(keys, MODEL, TABLE)
        print("as deployed:", np.array_equal(before, weights))

        train(weights, producer)
        print("caught up:", server.updates.catch_up())

        weights[-1] = 0.0  # the row of a key that is gone
        now = server.lookup(keys, MODEL, TABLE)
        print("as trained:", np.array_equal(now, weights))
        print("changed rows:", int((now != before).any(axis=1).sum()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
