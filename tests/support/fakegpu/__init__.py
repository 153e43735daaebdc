"""A stand-in for the CUDA driver: host code for a GPU runs on a machine without one.

Loaded under the driver's name before anybody looks for it, so that unmodified libraries
allocate, copy, queue and launch; kernels run in ``cpuexec``. It lives in processes of
its own, into which ``plugin`` puts the tests marked ``device``, and keeps away from
machines with a driver, where the same tests run on the GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.support.fakegpu import shim

if TYPE_CHECKING:
    from tests.support.fakegpu.device import FakeDevice


def install() -> None:
    """Be the driver of this process from now on.

    Raises
    ------
    RuntimeError
        If there is a real driver, or somebody has looked for one already.
    """
    shim.load()
    from tests.support.fakegpu import driver, kernels  # noqa: F401 - registers functions

    kernels.remember_specs()


def current() -> FakeDevice | None:
    """Return the stand-in device, or None on a machine with a real one."""
    if not shim.loaded():
        return None
    from tests.support.fakegpu import driver

    return driver.device


def calls() -> Counter[str]:
    """Return how often each function of the driver was called."""
    return Counter(shim.calls)
