"""``python -m tests.support.fakegpu REPORTS TEST...``: tests over the stand-in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support import fakegpu
from tests.support.fakegpu.recorder import Recorder


def main() -> int:
    """Run the tests, and write what came of each to the file."""
    fakegpu.install()
    options = ["-p", "no:cacheprovider", "--tb=short"]
    recorder = Recorder(Path(sys.argv[1]))
    return int(pytest.main([*options, *sys.argv[2:]], plugins=[recorder]))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries call the driver once more when Python has gone, and it is Python.
    os._exit(status)
