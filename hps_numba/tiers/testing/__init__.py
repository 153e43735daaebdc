"""Tests that every tier passes; pytest and hypothesis are imported here alone.

::

    from hps_numba.tiers.testing import TierContract

    class TestMyTier(TierContract):
        def make_tier(self, directory):
            return MyTier(directory)

        def write_beneath(self, tier, tag, keys, rows): ...
        def read_beneath(self, tier, tag, keys): ...

A tier that outlives its process takes ``LastingTierContract`` instead.
"""

from __future__ import annotations

from hps_numba.tiers.testing.backfills import BackfillContract
from hps_numba.tiers.testing.lasting import LastingContract
from hps_numba.tiers.testing.machine import MachineContract
from hps_numba.tiers.testing.races import RaceContract
from hps_numba.tiers.testing.streams import StreamContract
from hps_numba.tiers.testing.suite import TierSuite
from hps_numba.tiers.testing.tables import TableContract
from hps_numba.tiers.testing.values import ValueContract


class TierContract(
    ValueContract, BackfillContract, TableContract, RaceContract, MachineContract
):
    """Every promise of ``hps_numba.tiers.base.Tier``, as tests; see ``TierSuite``."""


class LastingTierContract(TierContract, LastingContract, StreamContract):
    """Every promise of ``hps_numba.tiers.base.LastingTier``, too."""


__all__ = ["LastingTierContract", "TierContract", "TierSuite"]
