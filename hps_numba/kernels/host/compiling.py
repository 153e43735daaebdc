"""How host kernels are compiled: without the GIL, and kept on disk where possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger(__name__)


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function as ``numba.njit`` does, uncached if nothing can be written.

    A user without a home who cannot write the package's directory has no place for
    Numba's cache; ``NUMBA_CACHE_DIR`` gives one.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(**options)(function)
        except RuntimeError as exc:
            if "no locator available" not in str(exc):
                raise
            logger.info("function=%s is compiled anew: %s", function.__name__, exc)
            return numba.njit(**{**options, "cache": False})(function)

    return decorate
