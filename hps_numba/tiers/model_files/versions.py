"""Whether a model directory is the one that a table was loaded from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hps_numba.tiers.model_files.checks import CHUNK_BYTES, row_chunks
from hps_numba.tiers.model_files.directory import ModelDirectory
from hps_numba.types import Progress


@dataclass(frozen=True)
class Fingerprint:
    """What identifies one version of a model directory.

    Parameters
    ----------
    key_bytes, row_bytes
        Sizes of the key file and of the row file.
    key_mtime_ns, row_mtime_ns
        When they were last written, in nanoseconds since the epoch.
    dim
        Values per row.
    digest
        BLAKE2b-128 of ``dim`` and both files' contents, hexadecimal.
    """

    key_bytes: int
    row_bytes: int
    key_mtime_ns: int
    row_mtime_ns: int
    dim: int
    digest: str

    def to_json(self) -> dict[str, int | str]:
        """Return the fields as a dictionary for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Fingerprint:
        """Return the fingerprint that ``to_json`` gave.

        Raises
        ------
        ValueError
            If a field is missing or has another type; unknown fields are ignored.
        """
        values: dict[str, Any] = {
            item.name: stored.get(item.name) for item in fields(cls)
        }
        for name, value in values.items():
            wanted = str if name == "digest" else int
            if type(value) is not wanted:
                raise ValueError(
                    f"fingerprint: {name} is {value!r}, no {wanted.__name__}"
                )
        return cls(**values)


def fingerprint(
    directory: ModelDirectory, *, progress: Progress | None = None
) -> Fingerprint:
    """Read both files and return their fingerprint.

    Parameters
    ----------
    directory
        The mapped files. Their times are those at which they were opened.
    progress
        Called with the rows read since the last call; they add up to ``n_rows``.
    """
    return Fingerprint(
        key_bytes=directory.raw_keys.nbytes,
        row_bytes=directory.rows.nbytes,
        key_mtime_ns=directory.key_mtime_ns,
        row_mtime_ns=directory.row_mtime_ns,
        dim=directory.dim,
        digest=_digest(directory, progress),
    )


def matches(
    directory: ModelDirectory,
    stored: Fingerprint,
    *,
    progress: Progress | None = None,
) -> bool:
    """Return whether the files hold what they held when ``stored`` was taken.

    Other sizes or another dim mean other contents; equal sizes and times mean the same.
    Both are told without reading. Otherwise the digest decides, so that a copied or
    touched file counts as the same, and one rewritten at the same size does not.

    Notes
    -----
    A tool that changes a file and then sets its old time again goes unnoticed.
    """
    if _shape(directory) != (stored.key_bytes, stored.row_bytes, stored.dim):
        return False
    times = (directory.key_mtime_ns, directory.row_mtime_ns)
    if times == (stored.key_mtime_ns, stored.row_mtime_ns):
        return True
    return _digest(directory, progress) == stored.digest


def _shape(directory: ModelDirectory) -> tuple[int, int, int]:
    return directory.raw_keys.nbytes, directory.rows.nbytes, directory.dim


def _digest(directory: ModelDirectory, progress: Progress | None) -> str:
    """Hash piece by piece; hashlib lets other threads run meanwhile."""
    state = hashlib.blake2b(digest_size=16)
    state.update(directory.dim.to_bytes(8, "little"))
    keys = directory.raw_keys
    for start in range(0, len(keys), CHUNK_BYTES // 8):
        state.update(keys[start : start + CHUNK_BYTES // 8].data)
    for _, rows in row_chunks(directory):
        state.update(rows.data)
        if progress is not None:
            progress(len(rows))
    return state.hexdigest()
