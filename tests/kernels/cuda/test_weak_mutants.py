"""Orderings that are left out of the kernels are missed in a weak memory."""

from __future__ import annotations

import pytest

from tests.kernels.cuda.mutants import Mutant
from tests.kernels.cuda.weak_mutants import WEAK_MUTANTS, verdict_of


@pytest.mark.parametrize("mutant", WEAK_MUTANTS, ids=lambda mutant: mutant.name)
def test_an_ordering_that_is_left_out_is_missed(mutant: Mutant) -> None:
    assert verdict_of(mutant), "survived"
