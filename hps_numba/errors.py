"""Every error that hps_numba raises on purpose.

::

    HPSError
    +-- ConfigError (ValueError)          a configuration that cannot be used
    +-- UnknownTableError (KeyError)      no such model, table or device
    +-- ModelFileError                    a model directory that cannot be read
    +-- CacheError                        the GPU cache
    +-- DeviceError                       a GPU that is missing or refused
    +-- UpdateError                       an update that was not applied
    |   +-- StreamGapError                records before it are missing in a tier
    +-- UpdateSourceError                 the update stream cannot be read or written
    +-- ClosedError                       the object was closed
    +-- TierError (.tier .tag)            a storage tier
        +-- TierUnavailableError          it cannot be reached; retry later
        +-- TierTimeoutError (TimeoutError)
        +-- TierCorruptionError           it answered with something that is no row

A key that no tier knows is not an error, and neither is a full cache.
Arguments of the wrong type, shape or range are ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations


class HPSError(Exception):
    """Base of all errors of this package."""


class ConfigError(HPSError, ValueError):
    """The configuration cannot be used; the message has the JSON path."""


class UnknownTableError(HPSError, KeyError):
    """There is no such model, table or device."""

    def __str__(self) -> str:
        """Return the message itself; ``KeyError`` would return its ``repr``."""
        return str(self.args[0]) if self.args else ""


class ModelFileError(HPSError):
    """A model directory is missing, truncated or inconsistent."""


class CacheError(HPSError):
    """The GPU cache cannot do what was asked."""


class DeviceError(HPSError):
    """The device is missing or refused the work."""


class UpdateError(HPSError):
    """An update was not applied; the message says to what extent."""


class StreamGapError(UpdateError):
    """A tier lacks records before those that it was given.

    Parameters
    ----------
    message
        What happened.
    offset, record
        Where the tier is: records are to be given again from there.
    """

    def __init__(self, message: str, *, offset: int, record: int) -> None:
        super().__init__(message)
        self.offset = offset
        self.record = record


class UpdateSourceError(HPSError):
    """The update stream cannot be reached, read or written."""


class ClosedError(HPSError):
    """The object was closed before or during the call."""


class TierError(HPSError):
    """A storage tier failed.

    Parameters
    ----------
    message
        What happened and what to do.
    tier
        Name of the tier, as in ``stats()``.
    tag
        Tag of the table, ``hps_et.<model>.<table>``, or ``""`` if it concerns none.
    """

    def __init__(self, message: str, *, tier: str, tag: str = "") -> None:
        where = f"{tier}:{tag}" if tag else tier
        super().__init__(f"{where}: {message}")
        self.tier = tier
        self.tag = tag


class TierUnavailableError(TierError):
    """The tier cannot be reached or cannot be written now; retry later."""


class TierTimeoutError(TierError, TimeoutError):
    """The tier did not answer in time."""


class TierCorruptionError(TierError):
    """The tier answered with something that is no row of the table."""
