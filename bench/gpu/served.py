"""The small call that HPS published, through the whole server, in every way of asking.

A table of 630,000 rows of dim 16, all of it in host memory and nine tenths on the GPU;
2000 keys a call, drawn by a power law of 1.2.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.baselines import DeviceArray
from bench.gpu.device import Array
from bench.gpu.plan import SEED, Run
from bench.gpu.records import Line, counted, ratio, timed
from bench.gpu.timing import HostClock, by_host
from bench.gpu.works import check_equal
from bench.workloads import power_law, table_rows

MODEL, TABLE = "bench", "table"
SHARE = 0.9  # of the rows that the GPU has room for
PUBLISHED_MEAN_S = 0.243e-3
PUBLISHED = {
    "source": "HugeCTR, docs/source/hierarchical_parameter_server/profiling_hps.md: "
    "lookup session end to end, on the authors' machine",
    "values": {"mean_s": PUBLISHED_MEAN_S, "p99_s": 0.346e-3},
}


def small_calls(run: Run) -> Iterator[Line]:
    """Time calls of a session, with keys and rows on the host or on the device."""
    try:
        from hps_numba.runtime.hps import HPS
    except ImportError as exc:
        run.not_run["served"] = f"{type(exc).__name__}: {exc}"
        return
    sizes = run.sizes
    with tempfile.TemporaryDirectory(prefix="hps-numba-served-") as folder:
        config = _deployed(run, Path(folder))
        with HPS(config) as server:
            session = server.session(MODEL, device=run.device.gpu.ordinal)
            calls = _Calls(run, session)
            try:
                found = by_host(calls.ways(), sizes.small_keys, run.host_plan)
            finally:
                calls.close()
            tiers = server.stats().table(MODEL, TABLE).tiers
    params = {"dim": sizes.small_dim, "n": sizes.small_keys, "rows": sizes.small_rows}
    for name, timing in found.items():
        if name == calls.AS_HPS:
            s_a_call = timing.per_item * timing.items
            ratios = [ratio("published for HPS", PUBLISHED_MEAN_S / s_a_call)]
            yield timed("served", timing, params, ratios=ratios, published=PUBLISHED)
        else:
            yield timed("served", timing, params)
    for use in tiers:
        rate = use.hits / max(1, use.asked)
        yield counted("served_hits", use.tier, 100 * rate, "% of keys asked", params)


class _Calls:
    """Calls of one session that return their own seconds; each has fresh keys."""

    AS_HPS = "host keys, device rows"
    LAUNCH_ONLY = "prepared, launch only"  # what a graph replays

    def __init__(self, run: Run, session: Any) -> None:
        sizes = run.sizes
        self._device, self._session = run.device, session
        self._clock = HostClock(run.device)
        self._dim, self._n = sizes.small_dim, sizes.small_keys
        self._sample = power_law(sizes.small_rows, seed=SEED)
        self._keys_on_device = run.device.block(8 * self._n)
        address, shape = self._keys_on_device.address, (self._n,)
        self._there = DeviceArray(address, shape, "int64")
        self._out = np.empty((self._n, self._dim), np.float32)
        self._prepared = session.prepare({TABLE: self._n})
        self._stream = run.device.stream

    def ways(self) -> dict[str, Callable[[], float]]:
        """Return the calls by what they are given and what they return."""
        stream, there = self._stream, self._there
        lookup = self._session.lookup
        ways: dict[str, Callable[[Array], Any]] = {
            self.AS_HPS: lambda keys: lookup(TABLE, keys, stream=stream),
            "host keys, host rows": lambda keys: lookup(TABLE, keys, out=self._out),
            "device keys, device rows": lambda _: lookup(TABLE, there, stream=stream),
            "prepared": lambda _: self._complete(),
            self.LAUNCH_ONLY: lambda _: self._launch(),
        }
        for name, call in ways.items():
            self._check(call, misses=name == self.LAUNCH_ONLY)
        return {name: self._timed(call) for name, call in ways.items()}

    def _launch(self) -> Any:
        self._prepared.launch(self._stream)
        return self._prepared.rows[TABLE]

    def _complete(self) -> Any:
        self._prepared.launch(self._stream)
        self._prepared.complete(self._stream)
        return self._prepared.rows[TABLE]

    def _timed(self, call: Callable[[Array], Any]) -> Callable[[], float]:
        return lambda: self._seconds(call, self._fresh())

    def _seconds(self, call: Callable[[Array], Any], keys: Array) -> float:
        return self._clock.until_done(lambda: call(keys))

    def _fresh(self) -> Array:
        """Draw keys, and put them where calls look for them on the device."""
        keys = self._sample(self._n)
        prepared = self._prepared.keys[TABLE].__cuda_array_interface__["data"][0]
        for address in (self._keys_on_device.address, prepared):
            self._device.write(address, keys)
        return keys

    def _check(self, call: Callable[[Array], Any], *, misses: bool) -> None:
        """Fail if a call returns wrong rows: its speed would mean nothing.

        With ``misses``, rows that the cache lacks may be default rows.
        """
        keys = self._fresh()
        rows = call(keys)
        if not isinstance(rows, np.ndarray):
            address = rows.__cuda_array_interface__["data"][0]
            rows = self._device.read(address, (self._n, self._dim), np.float32)
        hits = rows.any(1) if misses else np.full(self._n, True)
        assert hits.mean() > 0.5, f"{hits.mean():.1%} of the rows are there"
        check_equal(rows[hits], table_rows(keys, self._dim)[hits])

    def close(self) -> None:
        """Give the memory back."""
        self._prepared.close()
        self._keys_on_device.close()


def _deployed(run: Run, folder: Path) -> Any:
    """Write a model, and return a server of it that keeps all in host memory."""
    import hps_numba as hps
    from hps_numba.tiers.model_files import write_model_directory

    sizes = run.sizes
    keys = np.arange(sizes.small_rows, dtype=np.int64)
    write_model_directory(folder / TABLE, keys, table_rows(keys, sizes.small_dim))
    return hps.ParameterServerConfig(
        volatile_db=hps.VolatileDatabaseParams(
            type=hps.DatabaseType_t.parallel_hash_map
        ),
        persistent_db=hps.PersistentDatabaseParams(backend=hps.DatabaseType_t.disabled),
        models=(
            hps.InferenceParams(
                model_name=MODEL,
                sparse_model_files=(str(folder / TABLE),),
                embedding_table_names=(TABLE,),
                embedding_vecsize_per_table=(sizes.small_dim,),
                maxnum_catfeature_query_per_table_per_sample=(1,),
                max_batchsize=sizes.small_keys,
                deployed_devices=(run.device.gpu.ordinal,),
                use_gpu_embedding_cache=True,
                cache_size_percentage=SHARE,
                hit_rate_threshold=1.0,
                require_gpu=True,
            ),
        ),
    )
