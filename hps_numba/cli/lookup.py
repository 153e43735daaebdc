"""What ``hps-numba lookup`` does with a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hps_numba.runtime.hps import HPS


@dataclass(frozen=True)
class LocatedRow:
    """One key's row, float32 (dim,), and the name of the tier that it came from."""

    key: int
    tier: str
    row: NDArray[Any]


def look_up(
    server: HPS, model: str, table: str, keys: Sequence[int]
) -> list[LocatedRow]:
    """Return the rows of keys; a table may be given by its position, as digits.

    Raises
    ------
    UnknownTableError
        If there is no such model or table.
    TierError
        If a tier fails.
    """
    table_id = _table_id(server, model, table)
    return [_look_up_one(server, model, table_id, key) for key in keys]


def _look_up_one(server: HPS, model: str, table: int | str, key: int) -> LocatedRow:
    # First where, then what: a lookup may bring the row into an upper tier. One key at
    # a time, because a table may be configured for lookups of very few keys.
    (tier,) = server.locate(model, table, [key])
    return LocatedRow(key, tier, server.lookup([key], model, table)[0])


def _table_id(server: HPS, model: str, table: str) -> int | str:
    """Return a name as it is, and digits that are no name as a position."""
    names = {each.table for each in server.stats().tables if each.model == model}
    return int(table) if table not in names and table.isdecimal() else table
