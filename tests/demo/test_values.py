from __future__ import annotations

import numpy as np
import pytest

from hps_numba.demo.values import MAX_DIM, UNKNOWN, known_rows

INT64 = np.iinfo(np.int64)
EDGE_KEYS = np.array([0, 1, -1, INT64.max, INT64.min, 1 << 40], np.int64)


def rows_of(keys, versions, *, dim=16, salt=7, default=-1.0):
    return known_rows(salt, np.asarray(keys), versions, dim=dim, default=default)


def python_row(salt, key, version, dim):
    """The same function, in Python's integers."""
    mask = (1 << 64) - 1
    multipliers = np.random.default_rng(1).integers(
        1 << 62, 1 << 63, MAX_DIM, dtype=np.uint64
    )

    def mix(state, more):
        z = (state + more * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = mix(mix(key & mask, salt), version)
    words = [(state * (int(m) | 1)) & mask for m in multipliers[:dim]]
    return [(word >> 41) / 2**23 - 0.5 for word in words]


def test_rows_are_what_the_definition_says():
    versions = np.array([1, 2, 3, 4, 5, 6], np.int32)
    rows = rows_of(EDGE_KEYS, versions)
    expected = [
        python_row(7, int(key), int(version), 16)
        for key, version in zip(EDGE_KEYS, versions, strict=True)
    ]
    assert rows.dtype == np.float32
    assert rows.tolist() == expected


def test_values_are_finite_and_below_one_half():
    rows = rows_of(np.arange(10_000), 1)
    assert (rows >= -0.5).all()
    assert (rows < 0.5).all()


def test_an_unknown_version_is_the_default_row():
    rows = rows_of([5, 6, 7], np.array([1, UNKNOWN, 2], np.int32), default=-1.0)
    assert (rows[1] == -1.0).all()
    assert (rows[[0, 2]] > -1.0).all()


@pytest.mark.parametrize("dim", [1, 16])
def test_each_value_differs_between_versions(dim):
    keys = np.arange(2_000)
    versions = np.stack([rows_of(keys, v, dim=dim) for v in range(1, 6)])
    for i in range(5):
        for j in range(i):
            assert (versions[i] != versions[j]).all()


def test_rows_differ_between_keys_and_tables():
    keys = np.arange(100_000)
    rows = rows_of(keys, 1)
    assert len(np.unique(rows.view("V64"))) == len(keys)
    assert (rows != rows_of(keys, 1, salt=8)).any(axis=1).all()
