"""Value types shared by all parts: tables, blocks of rows, policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAG_PREFIX = "hps_et"

Keys = NDArray[np.int64]
Rows = NDArray[Any]  # float32 or float16, (n, dim), C-contiguous
Mask = NDArray[np.bool_]

Progress = Callable[[int], None]
"""Called with the number of rows done since the last call."""


class RowDtype(str, Enum):
    """How a row's values are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class OverflowPolicy(str, Enum):
    """Which rows a full table partition gives up first."""

    EVICT_RANDOM = "evict_random"
    EVICT_LEAST_USED = "evict_least_used"
    EVICT_OLDEST = "evict_oldest"


class FailureMode(str, Enum):
    """What a lookup does when a tier fails."""

    RAISE = "raise"
    DEGRADE = "degrade"


def table_tag(model: str, table: str) -> str:
    """Return the name of a table in every tier, as HugeCTR HPS builds it."""
    return f"{TAG_PREFIX}.{model}.{table}"


@dataclass(frozen=True)
class TableSpec:
    """One embedding table of a model.

    Parameters
    ----------
    model, name
        Model and table; together they give the tag.
    dim
        Values per row.
    dtype
        How rows are stored.
    default_value
        Every value of the default row, which a key gets that no tier knows.
    max_keys
        Most keys of this table in one lookup.
    """

    model: str
    name: str
    dim: int
    dtype: RowDtype = RowDtype.FLOAT32
    default_value: float = 0.0
    max_keys: int = 1 << 20
    tag: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tag", table_tag(self.model, self.name))

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of a stored row."""
        return np.dtype(self.dtype.value)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.dim * self.numpy_dtype.itemsize


@dataclass(frozen=True, order=True)
class Position:
    """Where a reader of an update stream goes on; ordered as the stream is.

    Parameters
    ----------
    offset
        Of the message to be read next.
    record
        Records of that message that were applied already.
    """

    offset: int
    record: int = 0

    @classmethod
    def parse(cls, text: str) -> Position:
        """Return the position that ``str`` wrote; ``ValueError`` for other text."""
        offset, _, record = text.partition(":")
        return cls(int(offset), int(record or 0))

    def __str__(self) -> str:
        return f"{self.offset}:{self.record}"


@dataclass(frozen=True)
class StreamSpan:
    """The records of one partition of a table's update stream that a write holds.

    Parameters
    ----------
    partition
        Of the stream, not of a tier.
    since, until
        The first record, and the one after the last.
    """

    partition: int
    since: Position
    until: Position


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a table: ``keys`` int64 (n,), ``rows`` (n, dim)."""

    keys: Keys
    rows: Rows

    def __len__(self) -> int:
        return len(self.keys)
