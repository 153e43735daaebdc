"""Filling the tiers of a table from its model directory, or from what is stored.

A table is loaded from its files once. Starting again finds their fingerprint beside the
rows and resumes, so that updates since then stay; files with other contents are a new
version and replace the table. Host memory is filled from the persistent database
whenever that holds the newer rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from hps_numba.config import InferenceParams
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.stores import Stores
from hps_numba.tiers.model_files import (
    Fingerprint,
    ModelDirectory,
    check,
    fingerprint,
    matches,
)
from hps_numba.types import Progress

logger = logging.getLogger(__name__)

LoadProgress = Callable[[str, int, int], None]
"""Called with what is being done, rows done so far, and rows in all."""


@dataclass(frozen=True)
class Source:
    """Where a table's rows come from."""

    directory: ModelDirectory
    params: InferenceParams


def load_table(
    table: Hierarchy,
    stores: Stores,
    source: Source | None,
    *,
    force: bool = False,
    progress: LoadProgress | None = None,
) -> bool:
    """Bring a table's tiers up to its files; return whether the files were loaded.

    Parameters
    ----------
    table
        The table; lookups may run meanwhile and see old rows or new ones.
    stores
        The tiers.
    source
        The files, or None for a table that only updates fill.
    force
        Load the files even if they are what is stored.
    progress
        Told how far it is.

    Raises
    ------
    ModelFileError
        If the files are refused; nothing is written then.
    TierError
        If a tier cannot be written.
    """
    tag, persistent = table.spec.tag, stores.persistent
    same = loading = False
    if source is not None:
        same = not force and _is_stored(table, stores, source.directory, progress)
        loading = not same and _may_load(tag, stores, source.directory, force=force)
        if loading:
            _check(table, source, progress)
    with table.replacing():
        try:
            if loading and source is not None:
                _load_last(table, stores, source.directory, progress)
                table.forget_flights()
            if stores.volatile is not None and persistent is not None:
                if loading and not stores.fill_volatile:
                    stores.volatile.evict(tag)
                elif loading or (
                    stores.fill_volatile and not stores.volatile.size(tag)
                ):
                    current = loading or (same and persistent.untouched(tag))
                    _fill_volatile(table, stores, source if current else None, progress)
                table.forget_flights()
        except BaseException:
            if stores.volatile is not None and persistent is not None:
                stores.volatile.evict(tag)  # the database may hold new rows already
            table.forget_flights()
            raise
    logger.info("table=%s %s", tag, "loaded" if loading else "resumed")
    if source is not None and not loading:
        _warn_if_empty(table, source.directory)
    return loading


def _warn_if_empty(table: Hierarchy, files: ModelDirectory) -> None:
    """Say that lookups will get default rows although there are files."""
    tag = table.spec.tag
    if files.n_rows and not any(tier.stats(tag).rows for tier in table.tiers):
        logger.warning(
            "table=%s serves default rows: nothing is stored, and by configuration "
            "(initialize_after_startup, read_only) %s is not loaded",
            tag,
            files.path,
        )


def _is_stored(
    table: Hierarchy,
    stores: Stores,
    files: ModelDirectory,
    progress: LoadProgress | None,
) -> bool:
    """Whether what is stored was loaded from these files; updates aside."""
    origin = table.origin
    if stores.persistent is not None:
        stored = stores.persistent.fingerprint(table.spec.tag)
        origin = None if stored is None else Fingerprint.from_json(stored)
    report = reporter(progress, table, "compare", files.n_rows, announce=False)
    return origin is not None and matches(files, origin, progress=report)


def _may_load(tag: str, stores: Stores, files: ModelDirectory, *, force: bool) -> bool:
    """Whether other files may replace what is stored."""
    if stores.persistent is None:
        return stores.fill_volatile or force
    if stores.persistent.read_only:
        logger.warning(
            "table=%s: the persistent database is read-only and holds other rows than "
            "%s; serving what is stored",
            tag,
            files.path,
        )
        return False
    return stores.fill_persistent or force


def _check(table: Hierarchy, source: Source, progress: LoadProgress | None) -> None:
    report = check(
        source.directory,
        duplicate_keys=source.params.duplicate_keys.value,
        non_finite=source.params.non_finite.value,
        dtype=table.spec.numpy_dtype,
        progress=reporter(progress, table, "check", source.directory.n_rows),
    )
    if report.n_duplicates or report.n_non_finite:
        logger.warning(
            "table=%s path=%s duplicate_keys=%d (last wins) non_finite_rows=%d",
            table.spec.tag,
            source.directory.path,
            report.n_duplicates,
            report.n_non_finite,
        )


def _load_last(
    table: Hierarchy,
    stores: Stores,
    files: ModelDirectory,
    progress: LoadProgress | None,
) -> None:
    """Replace the rows of the last tier by those of the files."""
    tag, dtype, persistent = table.spec.tag, table.spec.numpy_dtype, stores.persistent
    last = table.tiers[-1]
    origin = fingerprint(
        files, progress=reporter(progress, table, "digest", files.n_rows)
    )
    report = reporter(progress, table, last.name, files.n_rows)
    if persistent is None:
        table.origin = None  # until all rows are there
        last.load(tag, files.blocks(dtype), progress=report)
        table.origin = origin
        return
    persistent.load(
        tag,
        files.sorted_blocks(dtype),
        progress=report,
        ascending=True,
        fingerprint=origin.to_json(),
    )


def _fill_volatile(
    table: Hierarchy,
    stores: Stores,
    source: Source | None,
    progress: LoadProgress | None,
) -> None:
    """Fill host memory from the files, or else from the persistent database."""
    volatile, persistent = stores.volatile, stores.persistent
    assert volatile is not None
    assert persistent is not None
    tag = table.spec.tag
    if source is not None:
        blocks = source.directory.blocks(table.spec.numpy_dtype)
        n_rows = source.directory.n_rows
    else:
        blocks, n_rows = persistent.iterate(tag), persistent.stats(tag).rows
    report = reporter(progress, table, volatile.name, n_rows)
    volatile.load(tag, blocks, progress=report)


def reporter(
    progress: LoadProgress | None,
    table: Hierarchy,
    step: str,
    total: int,
    *,
    announce: bool = True,
) -> Progress | None:
    """Return what counts the rows of a step; ``announce`` tells of it at once."""
    if progress is None:
        return None
    label, done = f"{table.spec.model}/{table.spec.name} {step}", 0
    if announce:
        progress(label, 0, total)

    def report(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        progress(label, done, max(total, done))

    return report
