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
from hps_numba.tiers.base import PersistentTier
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
    tag = table.spec.tag
    loading = source is not None and _is_new(
        table, stores, source.directory, force=force, progress=progress
    )
    if source is not None and loading:
        _check(table, source, progress)
    with table.replacing():
        if source is not None and loading and stores.persistent is not None:
            _load_persistent(table, stores.persistent, source.directory, progress)
            table.forget_flights()
        if stores.volatile is not None and stores.fill_volatile:
            untouched = stores.persistent is not None and stores.persistent.untouched(
                tag
            )
            current = source if loading or untouched else None
            _load_volatile(table, stores, current, progress)
            table.forget_flights()
    logger.info("table=%s %s", tag, "loaded" if loading else "resumed")
    return loading


def _is_new(
    table: Hierarchy,
    stores: Stores,
    files: ModelDirectory,
    *,
    force: bool,
    progress: LoadProgress | None,
) -> bool:
    """Whether the files are to be loaded, by what is stored and configured."""
    tag, persistent = table.spec.tag, stores.persistent
    if persistent is None:
        return stores.fill_volatile or force
    stored = persistent.fingerprint(tag)
    report = _reporter(progress, table, "compare", files.n_rows, announce=False)
    if (
        stored is not None
        and not force
        and matches(files, Fingerprint.from_json(stored), progress=report)
    ):
        return False
    if persistent.read_only:
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
        progress=_reporter(progress, table, "check", source.directory.n_rows),
    )
    if report.n_duplicates or report.n_non_finite:
        logger.warning(
            "table=%s path=%s duplicate_keys=%d (last wins) non_finite_rows=%d",
            table.spec.tag,
            source.directory.path,
            report.n_duplicates,
            report.n_non_finite,
        )


def _load_persistent(
    table: Hierarchy,
    persistent: PersistentTier,
    files: ModelDirectory,
    progress: LoadProgress | None,
) -> None:
    persistent.load(
        table.spec.tag,
        files.sorted_blocks(table.spec.numpy_dtype),
        progress=_reporter(progress, table, persistent.name, files.n_rows),
        ascending=True,
        fingerprint=fingerprint(
            files, progress=_reporter(progress, table, "digest", files.n_rows)
        ).to_json(),
    )


def _load_volatile(
    table: Hierarchy,
    stores: Stores,
    source: Source | None,
    progress: LoadProgress | None,
) -> None:
    volatile, persistent = stores.volatile, stores.persistent
    assert volatile is not None
    tag = table.spec.tag
    if source is not None:
        blocks = source.directory.blocks(table.spec.numpy_dtype)
        n_rows = source.directory.n_rows
    elif persistent is not None:
        blocks, n_rows = persistent.iterate(tag), persistent.stats(tag).rows
    else:
        return
    reporter = _reporter(progress, table, volatile.name, n_rows)
    volatile.load(tag, blocks, progress=reporter)


def _reporter(
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
