"""What the kernels raise of a device reaches callers as one error."""

from __future__ import annotations

import pytest

from hps_numba.errors import DeviceError
from hps_numba.kernels.cuda.compiling import KernelCompileError
from hps_numba.kernels.cuda.gpu import OutOfDeviceMemoryError
from hps_numba.kernels.cuda.launch import DeviceUnavailableError, LaunchError
from hps_numba.runtime.gpu.errors import device_errors


@pytest.mark.parametrize(
    "kind",
    [LaunchError, DeviceUnavailableError, OutOfDeviceMemoryError, KernelCompileError],
)
def test_a_failure_of_the_device_becomes_a_device_error(kind: type[Exception]) -> None:
    failure = kind("what it said")
    with pytest.raises(DeviceError) as raised, device_errors("a lookup"):
        raise failure
    assert str(raised.value) == "a lookup: what it said"
    assert raised.value.__cause__ is failure


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyboardInterrupt])
def test_other_failures_stay_what_they_are(kind: type[BaseException]) -> None:
    failure = kind("untouched")
    with pytest.raises(kind) as raised, device_errors("a lookup"):
        raise failure
    assert raised.value is failure
    assert raised.value.__cause__ is None


def test_a_device_error_is_not_wrapped_again() -> None:
    with (
        pytest.raises(DeviceError, match=r"^inner: said$"),
        device_errors("outer"),
        device_errors("inner"),
    ):
        raise LaunchError("said")


def test_a_whole_function_may_be_covered() -> None:
    @device_errors("a refresh")
    def refresh(n: int) -> int:
        if n < 0:
            raise LaunchError("negative")
        return n + 1

    assert refresh(1) == 2
    with pytest.raises(DeviceError, match="a refresh: negative"):
        refresh(-1)
    assert refresh(2) == 3
