"""What tests of benchmarks on a GPU have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bench.gpu.device import Device


@pytest.fixture
def cubins(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.getbasetemp() / "cubins"
    monkeypatch.setenv("HPS_NUMBA_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def device(cubins: Path) -> Device:
    from bench.gpu.device import Device
    from hps_numba.kernels.cuda.gpu import Gpu

    return Device(Gpu(0))
