"""Keys that were just brought into a cache are known for a while."""

from __future__ import annotations

import numpy as np

from hps_numba.runtime.gpu.recent import Recent

EDGES = np.array([0, -1, 1, np.iinfo(np.int64).min, np.iinfo(np.int64).max])


def test_nothing_is_known_at_first_not_even_key_0() -> None:
    assert not Recent().since(EDGES, 0.0).any()


def test_keys_are_known_to_those_who_asked_before_they_were_brought() -> None:
    recent = Recent()
    recent.note(EDGES[:3], 5.0)
    assert recent.since(EDGES, 4.0).tolist() == [True, True, True, False, False]
    assert recent.since(EDGES, 5.0).tolist() == [True, True, True, False, False]
    assert not recent.since(EDGES, 5.5).any()


def test_a_key_that_shares_a_place_is_forgotten_and_never_taken_for_another() -> None:
    recent, rng = Recent(), np.random.default_rng(0)
    keys = np.unique(rng.integers(-(2**62), 2**62, 100_000))
    recent.note(keys, 1.0)
    known = recent.since(keys, 1.0)
    assert 10_000 < known.sum() <= 1 << 14
    others = np.setdiff1d(rng.integers(-(2**62), 2**62, 100_000), keys)
    assert not recent.since(others, 0.0).any()
