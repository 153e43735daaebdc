"""A model that asks for a GPU cache where none can be had."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.config import InferenceParams, ParameterServerConfig
from hps_numba.errors import ConfigError, DeviceError
from hps_numba.runtime.hps import HPS
from tests.runtime.deployments import Table, model, server_config, versions

TABLE = Table("items", dim=4, n_rows=20, version=3)


def cached(root: Path, name: str = "wdl", **options: Any) -> InferenceParams:
    """Return a model with a GPU cache."""
    return model(root, [TABLE], name=name, use_gpu_embedding_cache=True, **options)


def config(root: Path, **options: Any) -> ParameterServerConfig:
    return server_config(root, [cached(root, **options)])


def no_package(patch: pytest.MonkeyPatch) -> str:
    # None makes the import fail as that of a package that is not installed.
    patch.setitem(sys.modules, "hps_numba.kernels.cuda.launch", None)
    return r"import of hps_numba.kernels.cuda.launch.*install hps-numba\[cuda13\]"


def no_driver(patch: pytest.MonkeyPatch) -> str:
    def refuse() -> list[Any]:
        raise RuntimeError("libcuda.so.1 cannot be opened")

    patch.setattr("hps_numba.kernels.cuda.launch.Device.get_all_devices", refuse)
    return r"no CUDA driver on this machine.*libcuda.so.1 cannot be opened"


def no_device(patch: pytest.MonkeyPatch) -> str:
    found: list[Any] = []
    patch.setattr("hps_numba.kernels.cuda.launch.Device.get_all_devices", found.copy)
    return "the driver shows no device"


@pytest.fixture(params=[no_package, no_driver, no_device])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take the GPU away, and return what the server is to say of it."""
    take: Callable[[pytest.MonkeyPatch], str] = request.param
    return take(monkeypatch)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


class TestServedFromHostMemory:
    def test_one_warning_names_the_models_and_the_reason(
        self, tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        models = [cached(tmp_path, name) for name in ("wdl", "dcn")]
        models.append(model(tmp_path, [TABLE], name="plain"))
        with HPS(server_config(tmp_path, models)) as server:
            server.add_model(cached(tmp_path, "late"))
            assert versions(server, [5], name="late") == [3]
        (text,) = warnings(caplog)
        assert text.startswith("models=wdl,dcn gpucache=true: no GPU cache")
        assert "served from host memory" in text
        assert re.search(reason, text)

    def test_a_model_without_cache_asks_for_no_gpu(
        self, tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with HPS(server_config(tmp_path, [model(tmp_path, [TABLE])])) as server:
            assert versions(server, [5, 99]) == [3, 0]
            server.add_model(cached(tmp_path, "late"))
        (text,) = warnings(caplog)
        assert text.startswith("models=late gpucache=true")

    @pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])
    def test_every_lookup_waits_for_its_rows(
        self, tmp_path: Path, reason: str, threshold: float
    ) -> None:
        options = {"hit_rate_threshold": threshold, "deployed_devices": [0, 3]}
        with HPS(config(tmp_path, **options)) as server:
            for device in (0, 3):
                found = np.zeros(21, np.bool_)
                rows = server.session("wdl", device).lookup(
                    "items", np.arange(21), found=found
                )
                assert isinstance(rows, np.ndarray)
                assert np.array_equal(rows[:20], TABLE.rows)
                assert rows[20].tolist() == [TABLE.default] * TABLE.dim
                assert found.tolist() == [True] * 20 + [False]
            server.drain()
            stats = server.stats()
        assert [use.tier for use in stats.table("wdl", "items").tiers] == [
            "host",
            "rocksdb",
        ]
        assert stats.table("wdl", "items").deferred == 0
        assert stats.deferred.stored_rows == stats.deferred.queued_rows == 0

    def test_updates_deletes_and_refreshes_work(
        self, tmp_path: Path, reason: str
    ) -> None:
        options = {"refresh_interval": 0.001}
        options["cache_refresh_percentage_per_iteration"] = 1.0
        with HPS(config(tmp_path, **options)) as server:
            server.update("wdl", "items", [1, 2], np.full((2, 4), 1, np.float32))
            server.delete("wdl", "items", [2])
            assert server.refresh("wdl", "items", keys=[1, 2, 3]) == 0
            assert server.refresh() > 0
            assert versions(server, [1, 2, 3]) == [1, 0, 3]
            assert server.reload("wdl", force=True)
            assert versions(server, [1, 2, 3]) == [3, 3, 3]

    def test_a_stream_is_refused(self, tmp_path: Path, reason: str) -> None:
        with (
            HPS(config(tmp_path)) as server,
            pytest.raises(TypeError, match=r"'wdl' has no GPU cache here.*no stream"),
        ):
            server.session("wdl").lookup("items", [1], stream=0)

    def test_a_prepared_lookup_is_refused(self, tmp_path: Path, reason: str) -> None:
        with (
            HPS(config(tmp_path)) as server,
            pytest.raises(DeviceError, match="'wdl' has no GPU cache here"),
        ):
            server.session("wdl").prepare({"items": 8})

    def test_the_estimate_tells_what_a_gpu_would_need(
        self, tmp_path: Path, reason: str
    ) -> None:
        with HPS(config(tmp_path)) as server:
            estimate = server.estimate()
        assert estimate.gpu_bytes[0] == estimate.tables[0].gpu_bytes > 0


class TestRequired:
    def test_the_server_refuses_with_the_reason(
        self, tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ConfigError, match=f"'wdl': require_gpu is true.*{reason}"):
            HPS(config(tmp_path, require_gpu=True))
        assert warnings(caplog) == []

    def test_a_model_that_is_added_is_refused_and_the_others_stay(
        self, tmp_path: Path, reason: str
    ) -> None:
        with HPS(server_config(tmp_path, [model(tmp_path, [TABLE])])) as server:
            with pytest.raises(ConfigError, match=f"'late': require_gpu.*{reason}"):
                server.add_model(cached(tmp_path, "late", require_gpu=True))
            assert server.models == ("wdl",)
            assert versions(server, [5]) == [3]
            # The name is free again, and so are its tables.
            server.add_model(cached(tmp_path, "late"))
            assert versions(server, [5], name="late") == [3]


SCRIPT = """
import logging
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
from hps_numba.runtime.hps import HPS
from tests.runtime.deployments import versions
from tests.runtime.gpu.test_gpu_missing import config
with HPS(config(Path(__import__("sys").argv[1]))) as server:
    print("versions", versions(server, [5, 99]))
"""


def test_a_process_without_devices_serves_from_host_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.getcwd()},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "versions [3, 0]\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("WARNING models=wdl gpucache=true: no GPU cache")
