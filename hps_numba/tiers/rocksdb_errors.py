"""What RocksDB says went wrong, as errors of this package."""

from __future__ import annotations

from hps_numba.errors import TierCorruptionError, TierError, TierUnavailableError

NAME = "rocksdb"


def tier_error(path: str, tag: str, status: str) -> TierError:
    """Return the error for the text of a RocksDB status."""
    kind: type[TierError] = TierUnavailableError
    advice = "check the path and its permissions, then retry"
    if status.startswith("Corruption") or (
        "No such file" in status and "MANIFEST" in status
    ):
        kind = TierCorruptionError
        advice = "the files are damaged: restore them, or remove them and deploy again"
    elif "lock hold" in status or "While lock file" in status:
        advice = "it is open elsewhere: close that one, or open this one read-only"
    elif "read only mode" in status:
        advice = "it was opened read-only: open it for writing"
    elif "No space left" in status:
        advice = "free disk space, then retry"
    return kind(f"{path}: {status}; {advice}", tier=NAME, tag=tag)
