from __future__ import annotations

import pytest


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
