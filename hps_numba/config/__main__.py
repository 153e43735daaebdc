"""Print the JSON schema of ps.json, or write the reference to a directory."""

from __future__ import annotations

import sys
from pathlib import Path

from hps_numba.config.reference import schema_text, write

if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]))
    else:
        sys.stdout.write(schema_text())
