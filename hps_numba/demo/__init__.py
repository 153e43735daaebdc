"""The main job on real data: deploy, look up, update, and check every row.

Needs the ``demo`` extra: ``pip install 'hps-numba[demo]'``.
"""

from __future__ import annotations

from hps_numba.demo.options import DemoOptions

__all__ = ["DemoOptions", "run"]


def run(options: DemoOptions) -> int:
    """Run the demo and return its exit code; see ``hps_numba.demo.job.run``."""
    from hps_numba.demo import job  # loads Numba, RocksDB and matplotlib

    return job.run(options)
