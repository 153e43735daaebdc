"""Rows for a PyTorch model, on the GPU from the cache to the first layer.

Keys are tensors on the device, rows come back as tensors in the same memory, and the
whole request is captured into a CUDA graph at the end. Needs a GPU, PyTorch and
`pip install 'hps-numba[cuda13]'`.

Run: python examples/gpu_torch.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

try:
    import torch
except ImportError:
    sys.exit("this example needs PyTorch: pip install torch")

import hps_numba as hps
from hps_numba.tiers.model_files import write_model_directory

N_KEYS, DIM, BATCH, KEYS_A_SAMPLE = 100_000, 16, 256, 8


def configuration(folder: Path) -> hps.ParameterServerConfig:
    """Return a server with room for a fifth of the rows on the GPU."""
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
                maxnum_catfeature_query_per_table_per_sample=[KEYS_A_SAMPLE],
                max_batchsize=BATCH,
                use_gpu_embedding_cache=True,
                cache_size_percentage=0.2,
                hit_rate_threshold=1.1,
                number_of_worker_buffers_in_pool=2,
                require_gpu=True,
            )
        ],
    )


def check(
    what: str, rows: torch.Tensor, keys: torch.Tensor, known: torch.Tensor
) -> None:
    """Compare rows with those that the model directory had."""
    right = torch.equal(rows, known[keys])
    print(f"{what}:", right)
    if not right:
        raise SystemExit(f"{what}: wrong rows")


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((N_KEYS, DIM), dtype=np.float32)
    write_model_directory(folder / "item", np.arange(N_KEYS), rows)
    known = torch.from_numpy(rows).cuda()
    layer = torch.nn.Linear(DIM, 1).cuda()

    with hps.HPS(configuration(folder)) as server, torch.no_grad():
        session = server.session("ranker", device=0)
        shape = (BATCH, KEYS_A_SAMPLE)

        # 1. Keys on the device, rows into a tensor of one's own: no copy between them.
        keys = torch.randint(N_KEYS, shape, device="cuda")
        out = torch.empty(*shape, DIM, device="cuda")
        session.lookup("item", keys, out=out)
        check("into a tensor", out, keys, known)

        # 2. Rows of a new array, as a tensor in the same memory.
        new = torch.from_dlpack(session.lookup("item", keys))
        check("from an array", new, keys, known)

        # 3. On a stream: the lookup comes after what the stream was given before, and
        #    what it is given next finds the rows.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            keys = torch.randint(N_KEYS, shape, device="cuda")
            out = torch.empty(*shape, DIM, device="cuda")
            session.lookup("item", keys, out=out, stream=stream.cuda_stream)
            scores = layer(out.mean(dim=1))
        stream.synchronize()
        check("on a stream", out, keys, known)
        print("scores:", tuple(scores.shape))

        # 4. A CUDA graph of the lookup and the model. Keys that the cache lacks have
        #    default rows after a replay; `complete` tells, and brings the rows.
        with session.prepare({"item": BATCH * KEYS_A_SAMPLE}) as prepared:
            flat_keys = torch.from_dlpack(prepared.keys["item"])
            flat_rows = torch.from_dlpack(prepared.rows["item"])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                prepared.launch(stream=stream.cuda_stream)
                replayed = layer(flat_rows.view(*shape, DIM).mean(dim=1))
            for _ in range(3):
                keys = torch.randint(N_KEYS, shape, device="cuda")
                with torch.cuda.stream(stream):
                    stream.wait_stream(torch.cuda.default_stream())
                    flat_keys.copy_(keys.view(-1))
                    graph.replay()
                    scores = replayed
                    if prepared.complete(stream=stream.cuda_stream):
                        scores = layer(flat_rows.view(*shape, DIM).mean(dim=1))
                stream.synchronize()
                check("from a graph", flat_rows, flat_keys, known)
        expected = layer(known[keys].mean(dim=1))
        print("same scores:", torch.allclose(scores, expected, atol=1e-5))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
