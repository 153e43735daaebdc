"""The command line: ``hps-numba``."""

from hps_numba.cli.app import app, main

__all__ = ["app", "main"]
