"""Make plain asserts of the contract explain themselves, as those of tests do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("hps_numba.tiers.testing")
