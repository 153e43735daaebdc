"""Numba code: everything that is compiled."""
