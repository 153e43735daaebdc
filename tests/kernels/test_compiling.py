"""Kernels compile where nothing can be written, too."""

from __future__ import annotations

from typing import Any

import pytest
from numba.core import caching

from hps_numba.kernels.host.compiling import njit


def twice(value: int) -> int:
    return value + value


def test_a_function_without_a_place_for_its_cache_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Numba finds no place if neither package nor home can be written."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled: Any = njit(nogil=True, cache=True)(twice)
    assert compiled(21) == 42


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("numba.njit", refuse)
    with pytest.raises(RuntimeError, match="planted"):
        njit(cache=True)(twice)
