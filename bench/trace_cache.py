"""Hit rates of a whole server's GPU cache on a trace: ``python -m bench.trace_cache``.

Every batch is one lookup, all keys of which have rows in host memory. Hits count per
occurrence, as the device counts them, and per unique key: what host memory was not
asked for. Exact LRU over the whole cache, batch by batch, is the measure for both.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import hps_numba as hps
from bench.policy import read_trace
from bench.policy_sim import replay_whole_lru, stream_of
from bench.records import Origin, Param, Result, counted, origin, write
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.model_files import write_model_directory

RESULTS = Path(__file__).parent / "results" / "traces" / "server.jsonl"
DIM = 4
SHARES = (0.01, 0.05, 0.1, 0.2)

Array = NDArray[Any]


def replay(keys: Array, share: float, batch: int, directory: Path) -> dict[str, float]:
    """Look up all whole batches; return rates, per occurrence and per unique key.

    Parameters
    ----------
    keys
        The lookups' keys, one after the other.
    share
        Size of the cache, as a share of the distinct keys.
    batch
        Keys of a lookup.
    directory
        Where the table's files are written.
    """
    distinct = np.unique(keys)
    rows = np.ones((distinct.size, DIM), np.float32)
    write_model_directory(directory, distinct, rows)
    n_batches = keys.size // batch
    n_unique = 0
    with HPS(_config(directory, share, batch)) as server:
        session = server.session("trace")
        for i in range(n_batches):
            part = keys[i * batch : (i + 1) * batch]
            assert (session.lookup("keys", part) == 1).all()
            n_unique += np.unique(part).size
        cache, host = server.stats().table("trace", "keys").tiers[:2]
    if not cache.tier.startswith("gpu"):
        raise RuntimeError("there is no GPU cache: the log says why")
    exact = replay_whole_lru(stream_of(keys), cache.rows, batch=batch)
    return {
        "per occurrence": cache.hits / cache.asked,
        "per unique key": 1 - host.asked / n_unique,
        "per occurrence, exact LRU": exact.hits / exact.keys,
        "per unique key, exact LRU": exact.unique_hits / exact.unique,
    }


def _config(directory: Path, share: float, batch: int) -> hps.ParameterServerConfig:
    return hps.ParameterServerConfig(
        models=(
            hps.InferenceParams(
                model_name="trace",
                max_batchsize=batch,
                sparse_model_files=(str(directory),),
                embedding_table_names=("keys",),
                embedding_vecsize_per_table=(DIM,),
                maxnum_catfeature_query_per_table_per_sample=(1,),
                cache_size_percentage=share,
                hit_rate_threshold=1.1,
                init_ec=False,
            ),
        ),
        volatile_db=hps.VolatileDatabaseParams(num_partitions=1),
    )


def rates(
    name: str, keys: Array, share: float, batch: int, where: Origin
) -> Iterator[Result]:
    """Yield the results of one trace, cache and batch."""
    with tempfile.TemporaryDirectory() as folder:
        found = replay(keys, share, batch, Path(folder) / "keys")
    params: dict[str, Param] = {"trace": name, "share": share, "batch": batch}
    for variant, rate in found.items():
        value = round(rate, 5)
        yield counted(
            "trace_cache", variant, value, unit="share", params=params, where=where
        )


def main(
    trace: Annotated[list[Path], typer.Option(help="A file of keys; may be repeated.")],
    share: Annotated[
        list[float] | None, typer.Option(help="Cache, as a share of distinct keys.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Keys of a lookup.")] = None,
    most: Annotated[int, typer.Option(help="Keys of a trace to look up.")] = 1 << 62,
    out: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Run the kernels on the CPU.")
    ] = False,
) -> None:
    """Replay traces through a server with a GPU cache, and write its hit rates."""
    if stand_in:
        from tests.support import fakegpu

        fakegpu.install()
    where = origin("full")
    for path in trace:
        keys = read_trace(path)[:most]
        for size in share or SHARES:
            for n in batch or (1024,):
                name = path.name.partition(".")[0]
                found = list(rates(name, keys, size, n, where))
                for result in found:
                    write(out, result)
                print(
                    f"{name} share={size:g} batch={n}",
                    " ".join(f"{r.variant}={r.median:.4f}" for r in found),
                    flush=True,
                )
    if stand_in:
        os._exit(0)  # the stand-in does not survive the end of Python


if __name__ == "__main__":
    typer.run(main)
