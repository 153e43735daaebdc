"""Where messages go that cannot be applied: a file for people and scripts."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Protocol


class Letter(Protocol):
    """A message of a stream."""

    @property
    def topic(self) -> str:
        """The topic."""

    @property
    def partition(self) -> int:
        """The partition."""

    @property
    def offset(self) -> int:
        """The offset."""

    @property
    def timestamp_ms(self) -> int | None:
        """When it was sent."""

    @property
    def key(self) -> bytes | None:
        """The Kafka key."""

    @property
    def value(self) -> bytes | None:
        """The payload."""


class DeadLetters(Protocol):
    """Keeps messages that cannot be applied. Used by one thread."""

    def keep(self, letter: Letter, reason: str) -> None:
        """Keep a message and why it was refused.

        Raises
        ------
        OSError, UpdateSourceError
            If it cannot be kept.
        """

    def close(self) -> None:
        """Wait until all is kept."""


class DeadLetterFile:
    """Appends refused messages to a file, a JSON object a line.

    Fields are ``topic``, ``partition``, ``offset``, ``timestamp_ms``, ``reason``, and
    ``key`` and ``value`` in base64 (or null). A message that is read again after a new
    start may be there twice.

    Parameters
    ----------
    path
        The file; created if missing.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def keep(self, letter: Letter, reason: str) -> None:
        """Append a message; it is in the file when the call returns."""
        line = json.dumps(
            {
                "topic": letter.topic,
                "partition": letter.partition,
                "offset": letter.offset,
                "timestamp_ms": letter.timestamp_ms,
                "reason": reason,
                "key": _text(letter.key),
                "value": _text(letter.value),
            }
        )
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:  # in one write, so that servers may share the file
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is left to do."""


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()
