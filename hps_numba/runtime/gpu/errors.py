"""Failures of a device as the package's own error."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType

from hps_numba.errors import DeviceError


class device_errors(ContextDecorator):  # noqa: N801 - used as a word: with, or @
    """Turn what the kernels raise of a device into :class:`DeviceError`.

    Parameters
    ----------
    what
        What was being done, which begins the message.

    Notes
    -----
    Keeps nothing of a call, so one object serves any number of them at a time.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if failure is None:
            return
        # Imported late: where nothing of it is installed, nothing of it is raised.
        from hps_numba.kernels.cuda.compiling import KernelCompileError
        from hps_numba.kernels.cuda.launch import DeviceUnavailableError, LaunchError

        if isinstance(
            failure, (LaunchError, DeviceUnavailableError, KernelCompileError)
        ):
            raise DeviceError(f"{self.what}: {failure}") from failure
