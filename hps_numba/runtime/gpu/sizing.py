"""How large the GPU cache of a model is: sets of every table, and bytes of the whole.

Pure arithmetic: no GPU is asked and no CUDA package is imported, so that a machine
without either can tell what one with them will need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hps_numba.config import EmbeddingCacheType, InferenceParams
from hps_numba.errors import ConfigError
from hps_numba.kernels.cuda.layout import (
    KEY_BYTES,
    MAX_DIM,
    SET_BYTES,
    WAYS,
    CacheLayout,
    Policy,
    RowLayout,
    TableLayout,
)
from hps_numba.types import TableSpec

MAX_SETS = ((1 << 32) - 1) // WAYS
ROWS_A_SET = 24  # of a table with a place for every row


@dataclass(frozen=True)
class GroupPlan:
    """Tables of one model with the same layout of rows and the same policy: one cache.

    Parameters
    ----------
    specs
        The tables, in the order of the model.
    layout
        Where everything of the cache lies; its tables are in the same order.
    policy
        Which row of a full set makes room.
    file_rows
        Rows of each table's model directory, 0 where unknown.
    """

    specs: tuple[TableSpec, ...]
    layout: CacheLayout
    policy: Policy
    file_rows: tuple[int, ...]


@dataclass(frozen=True)
class CachePlan:
    """The caches of one model on one device."""

    groups: tuple[GroupPlan, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of device memory that the caches take together."""
        return sum(group.layout.n_bytes for group in self.groups)

    def n_slots(self, tag: str) -> int:
        """Return how many rows of a table can be in the cache."""
        group, i = self._find(tag)
        return group.layout.tables[i].n_slots

    def n_rows(self, tag: str) -> int:
        """Return ``n_slots``, or the rows of the table's files if those are fewer."""
        group, i = self._find(tag)
        n_slots = group.layout.tables[i].n_slots
        return min(n_slots, group.file_rows[i] or n_slots)

    def table_bytes(self, tag: str) -> int:
        """Return a table's part of ``n_bytes``; the parts add up to the whole."""
        group, i = self._find(tag)
        return _bytes(group.layout.rows, group.layout.tables[i].n_sets)

    def _find(self, tag: str) -> tuple[GroupPlan, int]:
        for group in self.groups:
            for i, spec in enumerate(group.specs):
                if spec.tag == tag:
                    return group, i
        raise KeyError(tag)


def plan_cache(params: InferenceParams, rows: Sequence[int]) -> CachePlan:
    """Return the caches that a model gets on each of its devices.

    Parameters
    ----------
    params
        The model.
    rows
        Rows of each table's model directory; 0 where there is none, or it is empty.

    Raises
    ------
    ConfigError
        If the tables do not fit what the configuration or the kernels allow.
    """
    specs = params.tables()
    layouts = [_row_layout(spec) for spec in specs]
    if params.embedding_cache_type is EmbeddingCacheType.STATIC:
        n_sets = _sets_of_static(params, layouts, rows)
    elif params.gpu_cache_bytes is None:
        n_sets = _sets_by_share(params, rows)
    else:
        n_sets = _sets_by_bytes(params, layouts, rows)
    positions: dict[tuple[RowLayout, Policy], list[int]] = {}
    for i, policy in enumerate(_policies(params, rows, n_sets)):
        positions.setdefault((layouts[i], policy), []).append(i)
    return CachePlan(
        tuple(
            GroupPlan(
                specs=tuple(specs[i] for i in members),
                layout=CacheLayout(layout, tuple(_table(n_sets[i]) for i in members)),
                policy=policy,
                file_rows=tuple(rows[i] for i in members),
            )
            for (layout, policy), members in positions.items()
        )
    )


def sets_for_all(n_rows: int) -> int:
    """Return sets in which as good as surely all rows find a place, of two sets each.

    With 24 rows to a set, fewer than 1 table in 1,000 lacks a place for one of its
    rows, however large: see docs/decisions/0009-two-sets-for-static-tables.md.
    """
    return 1 if n_rows <= WAYS else -(-n_rows // ROWS_A_SET)


def _policies(
    params: InferenceParams, rows: Sequence[int], n_sets: Sequence[int]
) -> list[Policy]:
    """Return the policy of each table: nobody has to yield where all rows have a place.

    With less than that for one table, all tables are as configured, so that those whose
    rows are alike stay together.
    """
    configured = Policy(params.gpu_cache_policy.value)
    if params.embedding_cache_type is EmbeddingCacheType.STATIC:
        whole = True
    elif params.gpu_cache_bytes is None:
        whole = params.cache_size_percentage == 1
    else:
        known = [(n, sets) for n, sets in zip(rows, n_sets, strict=True) if n]
        whole = all(sets >= sets_for_all(n) for n, sets in known)
    return [Policy.STATIC if n and whole else configured for n in rows]


def _sets_of_static(
    params: InferenceParams, layouts: Sequence[RowLayout], rows: Sequence[int]
) -> list[int]:
    """Return sets with a place for every row."""
    for spec, n_rows in zip(params.tables(), rows, strict=True):
        if not n_rows:
            raise ConfigError(
                f"table {spec.tag}: a static cache holds the rows of the table's "
                f"model directory, and there are none; use embedding_cache_type dynamic"
            )
    n_sets = _checked(params, [sets_for_all(n) for n in rows])
    _check_budget(params, layouts, n_sets, "with a place for every row")
    return n_sets


def _sets_by_share(params: InferenceParams, rows: Sequence[int]) -> list[int]:
    """Return sets for the configured share of the rows.

    Without rows to take a share of, a table gets room for the keys of one lookup.
    """
    share = params.cache_size_percentage
    n_sets = []
    for spec, n_rows in zip(params.tables(), rows, strict=True):
        if share == 1 and n_rows:
            n_sets.append(sets_for_all(n_rows))
        else:
            n_sets.append(_sets_for(round(share * n_rows) if n_rows else spec.max_keys))
    return _checked(params, n_sets)


def _sets_by_bytes(
    params: InferenceParams, layouts: Sequence[RowLayout], rows: Sequence[int]
) -> list[int]:
    """Return the most sets that fit the budget, the same share of what all rows take.

    No table gets more than all its rows take. One without files counts as many bytes as
    the average of the others, has no such limit, and takes what they leave.
    """
    budget = params.gpu_cache_bytes
    assert budget is not None
    _check_budget(params, layouts, [1] * len(layouts), "with a set for every table")
    most = [min(sets_for_all(n), MAX_SETS) if n else MAX_SETS for n in rows]
    weights = _weights(params, layouts, rows)
    largest = max(weights)

    def sets(step: int) -> list[int]:
        return [
            max(1, min(limit, step * weight // largest))
            for limit, weight in zip(most, weights, strict=True)
        ]

    fits, too_many = 0, budget // (SET_BYTES + WAYS * KEY_BYTES) * largest
    while too_many - fits > 1:
        step = (fits + too_many) // 2
        if _total_bytes(layouts, sets(step)) <= budget:
            fits = step
        else:
            too_many = step
    return sets(fits)


def _weights(
    params: InferenceParams, layouts: Sequence[RowLayout], rows: Sequence[int]
) -> list[int]:
    """Return sets in proportion to which tables share a budget."""
    set_bytes = [SET_BYTES + WAYS * (KEY_BYTES + row.stride_bytes) for row in layouts]
    whole = [sets_for_all(n) if n else 0 for n in rows]
    known = [n * size for n, size in zip(whole, set_bytes, strict=True) if n]
    if not known:
        return [_sets_for(spec.max_keys) for spec in params.tables()]
    average = sum(known) // len(known)
    return [n or max(1, average // s) for n, s in zip(whole, set_bytes, strict=True)]


def _sets_for(n_rows: int) -> int:
    """Return sets with as many ways as there are rows."""
    return max(1, -(-n_rows // WAYS))


def _checked(params: InferenceParams, n_sets: list[int]) -> list[int]:
    """Return the sets if the kernels can work with them."""
    for spec, n in zip(params.tables(), n_sets, strict=True):
        if n > MAX_SETS:
            raise ConfigError(
                f"table {spec.tag}: a GPU cache of {n * WAYS:,} rows is more than the "
                f"{MAX_SETS * WAYS:,} that a table can have; use a dynamic cache and a "
                f"smaller gpucacheper"
            )
    return n_sets


def _check_budget(
    params: InferenceParams, layouts: Sequence[RowLayout], n_sets: list[int], what: str
) -> None:
    budget, least = params.gpu_cache_bytes, _total_bytes(layouts, n_sets)
    if budget is not None and budget < least:
        raise ConfigError(
            f"model {params.model_name!r}: gpu_cache_bytes is {budget:,}, but a GPU "
            f"cache {what} takes at least {least:,}"
        )


def _row_layout(spec: TableSpec) -> RowLayout:
    if spec.dim > MAX_DIM:
        raise ConfigError(
            f"table {spec.tag}: rows of {spec.dim} values are too long for the GPU "
            f"cache, which takes {MAX_DIM}; set gpucache to false"
        )
    return RowLayout(spec.dim, spec.dtype.value)


def _table(n_sets: int) -> TableLayout:
    return TableLayout.for_rows(n_sets * WAYS)


def _total_bytes(layouts: Sequence[RowLayout], n_sets: Sequence[int]) -> int:
    return sum(map(_bytes, layouts, n_sets))


def _bytes(rows: RowLayout, n_sets: int) -> int:
    """Return the bytes of a table; those of a cache are the sum over its tables."""
    return CacheLayout(rows, (_table(n_sets),)).n_bytes
