from __future__ import annotations

import numpy as np
import pytest

from bench.workloads import SAMPLERS, power_law, table_rows, uniform, unique, zipf

N = 400_000


def frequencies(keys: np.ndarray, n_rows: int) -> np.ndarray:
    return np.bincount(keys, minlength=n_rows) / keys.size


@pytest.mark.parametrize("name", SAMPLERS)
def test_keys_are_rows_of_the_table(name: str) -> None:
    keys = SAMPLERS[name](1_000, 3)(N)
    assert keys.dtype == np.int64
    assert keys.shape == (N,)
    assert keys.min() >= 0
    assert keys.max() < 1_000


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_batch_is_drawn_anew_and_seeds_repeat_it(name: str) -> None:
    sampler, again = SAMPLERS[name](1_000, 3), SAMPLERS[name](1_000, 3)
    first, second = sampler(100), sampler(100)
    assert first.tolist() != second.tolist()
    assert again(100).tolist() == first.tolist()
    assert again(100).tolist() == second.tolist()


def test_uniform_keys_are_equally_frequent() -> None:
    seen = frequencies(uniform(50, seed=1)(N), 50)
    np.testing.assert_allclose(seen, 1 / 50, rtol=0.05)


def test_zipf_frequencies_fall_with_the_rank() -> None:
    n_rows = 100
    expected = np.arange(1, n_rows + 1) ** -1.05
    expected /= expected.sum()
    seen = np.sort(frequencies(zipf(n_rows, seed=1)(N), n_rows))[::-1]
    np.testing.assert_allclose(seen, expected, rtol=0.1)


def test_hot_keys_of_zipf_are_scattered() -> None:
    seen = frequencies(zipf(1_000, seed=1)(N), 1_000)
    assert np.argsort(seen)[-5:].min() > 10


def test_power_law_frequencies_are_the_integrals_of_its_density() -> None:
    n_rows, power = 1_000, -0.2

    def mass(low: float, high: float) -> float:
        whole = n_rows**power - 1
        return float((high**power - low**power) / whole)

    seen = frequencies(power_law(n_rows, seed=1, alpha=1.2)(N), n_rows)
    # key k is every y that rounds to k + 1; the first and last have half an interval
    expected = [mass(1, 1.5), mass(1.5, 2.5), mass(2.5, 3.5), mass(3.5, 4.5)]
    np.testing.assert_allclose(seen[:4], expected, rtol=0.02)
    assert seen[100:].sum() == pytest.approx(mass(100.5, n_rows), rel=0.02)
    assert seen.sum() == pytest.approx(1)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0])
def test_a_power_law_without_a_distribution_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        power_law(10, seed=1, alpha=alpha)


def test_unique_gives_as_many_different_keys_as_asked() -> None:
    keys = unique(uniform(1_000, seed=1), 700)
    assert len(set(keys.tolist())) == keys.size == 700
    assert keys.tolist() != sorted(keys.tolist())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_known_from_their_keys(dtype: str) -> None:
    rows = table_rows(np.array([0, 3, 70_000]), 4, dtype)
    assert rows.dtype == dtype
    expected = [[(key * 4 + d) % 2039 for d in range(4)] for key in (0, 3, 70_000)]
    assert rows.tolist() == expected


def test_rows_of_many_keys_are_those_of_each() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 40, 70_000)
    rows = table_rows(keys, 2)
    for i in (0, 65_535, 65_536, 69_999):
        assert rows[i].tolist() == table_rows(keys[i : i + 1], 2)[0].tolist()
