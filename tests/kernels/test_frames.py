from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.host.frames import gather_records


@pytest.mark.parametrize("row_bytes", [0, 2, 4, 6, 31, 32, 33, 128, 512, 516, 4096])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_records_are_gathered_one_after_the_other(n: int, row_bytes: int) -> None:
    rng = np.random.default_rng(n * 5000 + row_bytes)
    keys = rng.integers(-(2**63), 2**63, 100)
    rows = rng.integers(0, 256, (100, row_bytes), np.uint8)
    order = rng.permutation(100)[:n]
    beyond = np.full(n * (8 + row_bytes) + 64, 0xA5, np.uint8)
    out = beyond[: n * (8 + row_bytes)]
    gather_records(keys, rows, order, out)
    expected = [keys[i].tobytes() + rows[i].tobytes() for i in order]
    assert out.tobytes() == b"".join(expected)
    assert (beyond[out.size :] == 0xA5).all()
