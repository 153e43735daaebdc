"""What a kernel derives from the 64-bit hash of a key; no two uses share all bits.

The hash is the one that assigns keys to partitions on the host.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from hps_numba.kernels.cuda.ptx import multiply_high
from hps_numba.kernels.host import hashing as host

hash_key = cuda.jit(device=True, forceinline=True)(host.hash_key.py_func)


@cuda.jit(device=True, forceinline=True)
def set_of(hashed, n_sets):
    """Return the set of a key: the hash scaled to the sets, without a division."""
    return multiply_high(hashed, n_sets)


@cuda.jit(device=True, forceinline=True)
def second_set_of(hashed, n_sets):
    """Return the other set of a key of a static table: its home set in none but one."""
    step = multiply_high(np.uint64(hashed << np.uint64(24)), n_sets - np.uint64(1))
    n_set = set_of(hashed, n_sets) + step + np.uint64(1)
    if n_set >= n_sets:
        n_set -= n_sets
    return n_set


@cuda.jit(device=True, forceinline=True)
def digest_of(hashed):
    """Return 1 to 255; 0 marks an empty way."""
    low = np.uint32(hashed & np.uint64(0xFF))
    return np.uint32(np.uint32(1) + (np.uint32(low * np.uint32(255)) >> np.uint32(8)))


@cuda.jit(device=True, forceinline=True)
def stamp_of(hashed, mask):
    """Return which update stamp a key has."""
    return np.uint64(hashed >> np.uint64(8)) & mask


@cuda.jit(device=True, forceinline=True)
def door_of(hashed, mask):
    """Return the doorkeeper's entry of a key."""
    return np.uint64(hashed >> np.uint64(10)) & mask


@cuda.jit(device=True, forceinline=True)
def door_mark_of(hashed):
    """Return what a key leaves in the doorkeeper: 1 to 255."""
    bits = np.uint32((hashed >> np.uint64(36)) & np.uint64(0xFF))
    return np.uint32(np.uint32(1) + (np.uint32(bits * np.uint32(255)) >> np.uint32(8)))


@cuda.jit(device=True, forceinline=True)
def claim_of(hashed, table, mask):
    """Return where a launch begins to look for other occurrences of a missing key."""
    return np.uint64((hashed >> np.uint64(20)) + table * np.uint64(0x9E3779B1)) & mask
