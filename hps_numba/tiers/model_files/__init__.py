"""Model directories: the files in which a trainer leaves one embedding table.

A directory holds ``key`` (int64, little-endian) and ``emb_vector`` (float32,
row-major), in the same order, without any header. ``meta`` and ``slot_id`` are ignored.
Key files of four bytes a key, which old trainers wrote for 32-bit keys, are read too.
"""

from hps_numba.tiers.model_files.checks import FileReport, check
from hps_numba.tiers.model_files.directory import (
    ModelDirectory,
    open_model_directory,
)
from hps_numba.tiers.model_files.summary import FileSummary, summarise
from hps_numba.tiers.model_files.versions import Fingerprint, fingerprint, matches
from hps_numba.tiers.model_files.writer import write_model_directory

__all__ = [
    "ModelDirectory",
    "open_model_directory",
    "write_model_directory",
    "FileReport",
    "check",
    "FileSummary",
    "summarise",
    "Fingerprint",
    "fingerprint",
    "matches",
]
