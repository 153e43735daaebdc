"""Numba kernels that run on the CPU without holding the GIL."""
