"""Planted bugs are caught, and what is there passes what catches them."""

from __future__ import annotations

import pytest

from tests.kernels.cuda import mutant_checks
from tests.kernels.cuda.mutants import (
    Mutant,
    all_mutants,
    judge,
    judge_all,
    mutated,
    users_of,
)

CHECKS = sorted({mutant.check for mutant in all_mutants()})
HARMLESS = Mutant("a comment", "device", '"""What kernels', '"""What all', "edges")


def test_every_planted_bug_is_caught() -> None:
    verdicts = judge_all(all_mutants())
    survivors = [one.mutant for one in verdicts if not one.error]
    assert not survivors


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_there_passes_what_catches_bugs(check: str) -> None:
    getattr(mutant_checks, check)()


def test_what_is_imported_anew_without_a_bug_passes() -> None:
    assert judge(HARMLESS).error == ""


def test_a_planted_bug_is_gone_afterwards() -> None:
    caught = next(one for one in all_mutants() if one.check == "edges")
    assert judge(caught).error
    assert judge(HARMLESS).error == ""
    mutant_checks.edges()


def test_names_of_bugs_tell_them_apart() -> None:
    names = [mutant.name for mutant in all_mutants()]
    assert len(set(names)) == len(names)


def test_a_bug_whose_text_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 0 times"):
        mutated(Mutant("nothing", "device", "no such text", "", "edges"))


def test_users_of_a_module_are_those_that_lead_from_it_to_the_checks() -> None:
    users = users_of("hps_numba.kernels.cuda.query")
    assert "hps_numba.kernels.cuda.pooled" in users
    assert "tests.kernels.cuda.mutant_checks" in users
    assert "hps_numba.kernels.cuda.insert" not in users
