"""The directory beside a database's files where a load writes its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOAD_DIRECTORY = "hps_load"


@contextmanager
def load_directory(path: str) -> Iterator[Path]:
    """Lend an empty directory on the file system of the database at ``path``."""
    parent = Path(path) / LOAD_DIRECTORY
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


def remove_leftovers(path: str) -> None:
    """Remove what killed loads left; called while no load runs."""
    shutil.rmtree(Path(path) / LOAD_DIRECTORY, ignore_errors=True)
