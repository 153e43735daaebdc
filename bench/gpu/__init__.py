"""Checks and benchmarks on a real GPU: ``make gpu``.

Needs NumPy, Numba CUDA and cuda.core; baselines in PyTorch and CuPy, and what goes
through the server, run where their packages are, and are named as left out elsewhere.
"""
