from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hps_numba.kernels.cuda.gpu import Gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    """Return the first device."""
    from hps_numba.kernels.cuda.gpu import Gpu

    return Gpu(0)


@pytest.fixture
def devices() -> list[int]:
    """Return two devices, or one where there is no other."""
    from hps_numba.kernels.cuda.interchange import n_devices

    return list(range(min(2, n_devices())))


@pytest.fixture
def two_devices(devices: list[int]) -> list[int]:
    """Return two devices."""
    if len(devices) < 2:
        pytest.skip("this machine has one device")
    return devices
