"""What a configuration is said to take of a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hps_numba as hps
from hps_numba.config import InferenceParams, ParameterServerConfig, RedisLayout
from hps_numba.kernels.cuda.layout import DUMP_BYTES
from hps_numba.runtime.gpu.lane_layout import buffer_bytes, lane_layouts
from hps_numba.runtime.gpu.sizing import plan_cache
from hps_numba.tiers.model_files import write_model_directory
from hps_numba.tiers.redis.sizes import row_bytes


@pytest.fixture
def files(tmp_path: Path) -> str:
    """Return a model directory of 1,000 rows of 4 values."""
    write_model_directory(tmp_path / "t", range(1000), np.zeros((1000, 4), np.float32))
    return str(tmp_path / "t")


def model(name: str, files: str, **changes: Any) -> InferenceParams:
    """Return a model of two tables, the second without rows."""
    empty = Path(files).parent / "empty"
    write_model_directory(empty, [], np.zeros((0, 4), np.float32))
    return InferenceParams(
        name,
        sparse_model_files=[files, str(empty)],
        embedding_table_names=["some", "none"],
        embedding_vecsize_per_table=[4, 4],
        maxnum_catfeature_query_per_table_per_sample=[1, 1],
        max_batchsize=100,
        **changes,
    )


def test_a_table_takes_its_part_of_the_plan_on_every_device(files: str) -> None:
    models = [
        model("a", files, deployed_devices=[0, 2], cache_size_percentage=0.5),
        model("b", files, deployed_devices=[2], gpu_cache_bytes=400_000),
        model("c", files, use_gpu_embedding_cache=False),
    ]
    plans = [plan_cache(params, [1000, 0]) for params in models]
    told = hps.estimate(ParameterServerConfig(models=models))
    for i, each in enumerate(told.tables[:4]):
        plan, tag = plans[i // 2], f"hps_et.{each.model}.{each.table}"
        assert each.gpu_bytes == plan.table_bytes(tag)
        assert each.gpu_rows == plan.n_rows(tag)
    assert told.tables[0].gpu_rows == 504
    assert told.tables[1].gpu_rows == 112  # the keys of a lookup, in whole sets
    assert [each.gpu_devices for each in told.tables] == [(0, 2)] * 2 + [(2,)] * 2 + [
        ()
    ] * 2
    assert [(each.gpu_bytes, each.gpu_rows) for each in told.tables[4:]] == [(0, 0)] * 2
    assert told.gpu_bytes == {
        0: plans[0].n_bytes,
        2: plans[0].n_bytes + plans[1].n_bytes,
    }
    assert plans[1].n_bytes <= 400_000
    a, b = (buffer_bytes(plan, 65_536, 1) for plan in plans[:2])
    assert told.gpu_buffer_bytes == {0: a.device, 2: a.device + b.device}
    assert told.pinned_bytes == 2 * a.pinned + b.pinned


def test_each_lookup_at_a_time_has_buffers_of_its_own(files: str) -> None:
    plan = plan_cache(model("a", files), [1000, 0])
    one, three = (buffer_bytes(plan, 64, n) for n in (1, 3))
    lanes, block = lane_layouts(plan, 64)
    lane = sum(each.device_bytes for each in lanes) + 2 * block.n_bytes
    assert three.device - one.device == 2 * lane
    # A block has 64 rows, each with its key, a mark and an outcome.
    assert block.n_bytes >= 64 * (block.row_bytes + 8 + 1 + 1)
    assert one.device == lane + block.n_bytes + DUMP_BYTES


def test_a_cache_that_cannot_be_is_refused_before_anything_is_opened(
    files: str, tmp_path: Path
) -> None:
    config = ParameterServerConfig(
        models=[model("a", files, gpu_cache_bytes=1000)],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "rocksdb")},
    )
    with pytest.raises(hps.ConfigError, match="model 'a': gpu_cache_bytes is 1,000"):
        hps.HPS(config)
    assert not (tmp_path / "rocksdb").exists()


def test_a_frequency_file_that_cannot_be_read_is_refused_at_once(files: str) -> None:
    params = model("a", files, warm_up_keys_per_table=["", f"{files}/key"])
    text = r"hps_et\.a\.none: warm_up_keys_per_table: .*/t/key: is no whole \.npy file"
    with pytest.raises(hps.ConfigError, match=text):
        hps.estimate(ParameterServerConfig(models=[params]))
    hps.estimate(ParameterServerConfig(models=[params.replace(init_ec=False)]))
    host = params.replace(use_gpu_embedding_cache=False)
    hps.estimate(ParameterServerConfig(models=[host]))


@pytest.mark.parametrize("layout", ["strings", "hashes"])
def test_redis_takes_no_memory_of_this_machine(files: str, layout: str) -> None:
    redis: dict[str, Any] = {"type": "redis_cluster", "redis_layout": layout}
    models = [model("a", files, use_gpu_embedding_cache=False)]
    told = hps.estimate(ParameterServerConfig(models=models, volatile_db=redis))
    assert told.host_bytes == 0
    some, none = told.tables
    assert (none.redis_bytes, told.redis_bytes) == (0, some.redis_bytes)
    spec = models[0].tables()[0]
    assert some.redis_bytes == 1000 * row_bytes(spec, RedisLayout(layout))
    noted = redis | {"overflow_margin": 100}
    more = hps.estimate(ParameterServerConfig(models=models, volatile_db=noted))
    assert more.redis_bytes > told.redis_bytes
    host = hps.estimate(ParameterServerConfig(models=models))
    assert host.redis_bytes == 0
    assert host.host_bytes > 0


def test_an_estimate_loads_nothing_of_cuda() -> None:
    code = (
        "import sys, hps_numba.runtime.estimate\n"
        "print([name for name in ('numba.cuda', 'numba_cuda', 'cuda.core',"
        " 'cuda.bindings', 'hps_numba.kernels.cuda.gpu') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
