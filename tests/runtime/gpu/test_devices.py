from __future__ import annotations

import sys

import pytest

from hps_numba.runtime.gpu.devices import device_name


@pytest.mark.device
def test_a_device_has_the_name_that_its_driver_tells():
    from cuda.core import Device

    assert device_name() == Device(0).name != ""


def test_a_device_that_is_not_there_has_no_name():
    assert device_name(99) is None


def test_without_the_packages_there_is_no_device(monkeypatch):
    monkeypatch.delitem(sys.modules, "hps_numba.kernels.cuda.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert device_name() is None
