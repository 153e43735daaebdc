"""The hash that assigns keys to partitions, in every tier and in Kafka.

Source: HugeCTR's ``rrxmrrxmsx_0`` (a 64-bit mixer by Pelle Evensen), so that stores
written by HPS and by hps_numba agree on the partition of a key.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.compiling import njit

_M1 = np.uint64(0xA24BAED4963EE407)
_M2 = np.uint64(0x9FB21C651E98DF25)


@njit(nogil=True, cache=True, inline="always")
def hash_key(key):
    """Return the 64-bit hash of an int64 key as uint64."""
    x = np.uint64(key)
    x ^= ((x >> np.uint64(25)) | (x << np.uint64(39))) ^ (
        (x >> np.uint64(50)) | (x << np.uint64(14))
    )
    x *= _M1
    x ^= ((x >> np.uint64(24)) | (x << np.uint64(40))) ^ (
        (x >> np.uint64(49)) | (x << np.uint64(15))
    )
    x *= _M2
    return x ^ (x >> np.uint64(28))


@njit(nogil=True, cache=True)
def group_by_partition(keys, n_partitions):
    """Return the positions of ``keys``, partition by partition, and where each begins.

    Returns
    -------
    order
        int64 (n,); positions keep their order inside a partition.
    bounds
        int64 (n_partitions + 1,); partition p is ``order[bounds[p]:bounds[p + 1]]``.
    """
    n = keys.size
    parts = np.empty(n, np.int32)
    bounds = np.zeros(n_partitions + 1, np.int64)
    for i in range(n):
        p = np.int32(hash_key(keys[i]) % np.uint64(n_partitions))
        parts[i] = p
        bounds[p + 1] += 1
    for q in range(n_partitions):
        bounds[q + 1] += bounds[q]
    order = np.empty(n, np.int64)
    cursor = bounds[:-1].copy()
    for i in range(n):
        order[cursor[parts[i]]] = i
        cursor[parts[i]] += 1
    return order, bounds
