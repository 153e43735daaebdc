"""A gate that callers pass through, and that closes once they are all out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType

from hps_numba.errors import ClosedError, HPSError

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0


class Gate:
    """Count the callers inside, and refuse new ones after ``close``.

    Parameters
    ----------
    what
        What the gate protects, for the log.
    refusal
        Makes the error that callers get once the gate is closed.
    """

    def __init__(self, what: str, refusal: Callable[[], HPSError]) -> None:
        self._what = what
        self._refusal = refusal
        self._process = os.getpid()
        self._inside = 0  # guarded by _changed
        self._open = True  # guarded by _changed
        self._changed = threading.Condition(threading.Lock())

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            # Its threads did not come along, and two processes would write one log.
            raise ClosedError(
                f"the {self._what} belongs to process {self._process}, from which this "
                f"one was forked; make a server of its own after the fork"
            )
        with self._changed:
            if not self._open:
                raise self._refusal()
            self._inside += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._inside -= 1
            if self._inside == 0:
                self._changed.notify_all()

    def close(
        self,
        refusal: Callable[[], HPSError] | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Refuse newcomers and wait until everyone inside has left.

        Waits ``patience_s`` at the longest, so that a tier that hangs does not keep a
        process.
        """
        with self._changed:
            self._open = False
            if refusal is not None:
                self._refusal = refusal
            empty = self._changed.wait_for(lambda: self._inside == 0, patience_s)
        if not empty:
            logger.error("gate=%s closed with callers inside", self._what)
