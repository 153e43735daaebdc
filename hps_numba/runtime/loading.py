"""Filling the tiers of a table from its model directory, or from what is stored.

A table is loaded from its files once. Starting again finds their fingerprint beside the
rows and resumes, so that updates since then stay; files with other contents are a new
version and replace the table. The volatile database is filled from the persistent one
whenever that holds the newer rows.

A volatile database that servers share has a fingerprint, too. The first server that
comes with other files loads it; the others find the fingerprint and leave the rows and
later updates alone. They take turns, and look again when it is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from hps_numba.config import InferenceParams
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.stores import Stores
from hps_numba.tiers.base import LastingTier
from hps_numba.tiers.model_files import (
    Fingerprint,
    ModelDirectory,
    check,
    fingerprint,
    matches,
)
from hps_numba.types import Progress, RowBlock

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
    loader = _Loader(table, stores, source, progress)
    loaded = loader.run(force=force)
    logger.info("table=%s %s", table.spec.tag, "loaded" if loaded else "resumed")
    if source is not None and not loaded:
        _warn_if_empty(table, stores, source.directory)
    return loaded


@dataclass(frozen=True)
class _Loader:
    """One load of one table."""

    table: Hierarchy
    stores: Stores
    source: Source | None
    progress: LoadProgress | None

    @property
    def tag(self) -> str:
        return self.table.spec.tag

    def run(self, *, force: bool) -> bool:
        """Bring the tiers up to the files; return whether these were loaded."""
        stores, source = self.stores, self.source
        same = source is not None and not force and self._is_stored(source)
        new = None if same or source is None else self._to_load(source, force=force)
        with ExitStack() as stack:
            if not self._is_shared(new, force=force):
                assert stores.shared is not None
                stack.enter_context(stores.shared.loading(self.tag))
                # Another server may have done it meanwhile.
                if stores.persistent is None and self._is_shared(new, force=force):
                    new = None
            stack.enter_context(self.table.replacing())
            try:
                if source is not None and new is not None:
                    self._load_last(source, new)
                    self.table.forget_flights()
                if stores.persistent is not None:
                    untouched = same and stores.persistent.untouched(self.tag)
                    current = new is not None or untouched
                    self._fill_local(source if current else None, new is not None)
                    self._fill_shared(source if current else None, new, force=force)
                    self.table.forget_flights()
            except BaseException:
                if stores.local is not None and stores.persistent is not None:
                    # The database may hold new rows already.
                    stores.local.evict(self.tag)
                self.table.forget_flights()
                raise
        return new is not None

    def _is_stored(self, source: Source) -> bool:
        """Whether what is stored was loaded from these files; updates aside."""
        origin, files = self.table.origin, source.directory
        if self.stores.keeper is not None:
            origin = _origin(self.stores.keeper, self.tag)
        report = self._reporter("compare", files.n_rows, announce=False)
        return origin is not None and matches(files, origin, progress=report)

    def _to_load(self, source: Source, *, force: bool) -> Fingerprint | None:
        """Check files that are to be loaded, and return what identifies them."""
        if not _may_load(self.tag, self.stores, source.directory, force=force):
            return None
        _check(self.table, source, self.progress)
        report = self._reporter("digest", source.directory.n_rows)
        return fingerprint(source.directory, progress=report)

    def _is_shared(self, new: Fingerprint | None, *, force: bool) -> bool:
        """Whether the shared database holds the rows of the last tier, or newer ones.

        Also if nothing is known of where the rows of the last tier are from: updates
        alone brought them, and they went to the shared database as well.
        """
        shared, persistent = self.stores.shared, self.stores.persistent
        if shared is None:
            return True
        if new is not None and force:
            return False
        origin = new
        if origin is None and persistent is not None:
            origin = _origin(persistent, self.tag)
        if origin is None:
            return True
        theirs = _origin(shared, self.tag)
        return theirs is not None and _same_contents(theirs, origin)

    def _load_last(self, source: Source, new: Fingerprint) -> None:
        """Replace the rows of the last tier by those of the files."""
        table, files, keeper = self.table, source.directory, self.stores.keeper
        dtype, last = table.spec.numpy_dtype, table.tiers[-1]
        report = self._reporter(last.name, files.n_rows)
        if keeper is None:
            table.origin = None  # until all rows are there
            last.load(self.tag, files.blocks(dtype), progress=report)
            table.origin = new
        elif self.stores.persistent is None:
            self._share(files.blocks(dtype), files.n_rows, new)
        else:
            keeper.load(
                self.tag,
                files.sorted_blocks(dtype),
                progress=report,
                ascending=True,
                fingerprint=new.to_json(),
            )

    def _fill_local(self, source: Source | None, is_new: bool) -> None:
        """Fill host memory, if it is empty or the last tier was replaced."""
        local, fills = self.stores.local, self.stores.fill_volatile
        if local is None:
            return
        if is_new and not fills:
            local.evict(self.tag)
        elif is_new or (fills and not local.size(self.tag)):
            blocks, n_rows = self._rows(source)
            report = self._reporter(local.name, n_rows)
            local.load(self.tag, blocks, progress=report)

    def _fill_shared(
        self, source: Source | None, new: Fingerprint | None, *, force: bool
    ) -> None:
        """Fill the shared database, or empty it, unless another server has."""
        persistent = self.stores.persistent
        if persistent is None or self._is_shared(new, force=force):
            return
        origin = new or _origin(persistent, self.tag)
        assert origin is not None
        if self.stores.fill_volatile:
            self._share(*self._rows(source), origin)
        else:  # a load of nothing: backfills that other servers began are refused
            self._share((), 0, origin)

    def _share(
        self, blocks: Iterable[RowBlock], n_rows: int, origin: Fingerprint
    ) -> None:
        """Replace the rows of the shared database, for all servers."""
        shared = self.stores.shared
        assert shared is not None
        if shared.fingerprint(self.tag) is not None:
            logger.warning(
                "table=%s is replaced in %s, where it was loaded from other files, "
                "for all servers that use it",
                self.tag,
                shared.name,
            )
        report = self._reporter(shared.name, n_rows)
        shared.load(self.tag, blocks, progress=report, fingerprint=origin.to_json())

    def _rows(self, source: Source | None) -> tuple[Iterable[RowBlock], int]:
        """Return the rows of the files, or else of the persistent database."""
        if source is not None:
            files = source.directory
            return files.blocks(self.table.spec.numpy_dtype), files.n_rows
        persistent = self.stores.persistent
        assert persistent is not None
        return persistent.iterate(self.tag), persistent.stats(self.tag).rows

    def _reporter(
        self, step: str, total: int, *, announce: bool = True
    ) -> Progress | None:
        return reporter(self.progress, self.table, step, total, announce=announce)


def _origin(tier: LastingTier, tag: str) -> Fingerprint | None:
    """Return which files the rows of a tier are from; None if it does not know."""
    stored = tier.fingerprint(tag)
    return None if stored is None else Fingerprint.from_json(stored)


def _same_contents(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two servers' copies of the files are equal; times may differ."""
    return (a.key_bytes, a.row_bytes, a.dim, a.digest) == (
        b.key_bytes,
        b.row_bytes,
        b.dim,
        b.digest,
    )


def _warn_if_empty(table: Hierarchy, stores: Stores, files: ModelDirectory) -> None:
    """Say that lookups will get default rows although there are files."""
    tag = table.spec.tag
    if any(tier.fingerprint(tag) is not None for tier in stores.lasting):
        return
    if files.n_rows and not any(tier.stats(tag).rows for tier in table.tiers):
        logger.warning(
            "table=%s serves default rows: nothing is stored, and by configuration "
            "(initialize_after_startup, read_only) %s is not loaded",
            tag,
            files.path,
        )


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
