from __future__ import annotations

import numpy as np
import pytest

from hps_numba.demo.workload import TableLoad


@pytest.fixture
def table() -> TableLoad:
    """Ten ids that are 100 to 109, of which the last two are not in the model."""
    ids = np.arange(100, 110)
    trained = ids < 108
    positions = np.arange(10, dtype=np.int32).reshape(5, 2)
    return TableLoad("deep", 4, -1.0, ids, positions, trained)
