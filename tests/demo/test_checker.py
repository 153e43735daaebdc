from __future__ import annotations

import numpy as np
import pytest

from hps_numba.demo.checker import Answer, RowChecker, Tally, VersionLedger
from hps_numba.demo.values import known_rows

ALL = np.arange(10, dtype=np.int32)


@pytest.fixture
def ledger(table):
    return VersionLedger(table)


@pytest.fixture
def checker(table, ledger):
    return RowChecker(table, ledger)


def answer(table, versions):
    """Return what a lookup of all ids gives if these versions are stored."""
    versions = np.asarray(versions, np.int32)
    rows = known_rows(table.salt, table.ids, versions, dim=4, default=table.default)
    return Answer(ALL, rows, versions > 0)


def trained_versions(table):
    return table.trained.astype(np.int32)


def wrong_rows(checker, given):
    return checker.check(given, checker.oldest(ALL))


def update(ledger, position, version):
    ledger.begun[position] = version
    ledger.acknowledged[position] = version


def test_rows_of_the_model_directory_are_right(table, checker):
    assert wrong_rows(checker, answer(table, trained_versions(table))) == 0
    assert checker.tally == Tally(rows=10, defaults=2)


def test_an_acknowledged_version_must_be_returned(table, ledger, checker):
    versions = trained_versions(table)
    update(ledger, 3, 2)
    stale = answer(table, versions)
    versions[3] = 2
    assert wrong_rows(checker, answer(table, versions)) == 0
    assert wrong_rows(checker, stale) == 1
    assert checker.tally.wrong == {"stale version": 1}
    assert "table deep, key 103: stale version" in checker.tally.examples[0]


def test_a_version_that_was_begun_may_be_returned(table, ledger, checker):
    versions = trained_versions(table)
    ledger.begun[3] = 2
    assert wrong_rows(checker, answer(table, versions)) == 0
    versions[3] = 2
    assert wrong_rows(checker, answer(table, versions)) == 0
    assert checker.tally.early == 1


def test_a_version_never_goes_back(table, ledger, checker):
    versions = trained_versions(table)
    before = answer(table, versions)
    ledger.begun[3] = 2
    versions[3] = 2
    assert wrong_rows(checker, answer(table, versions)) == 0
    assert wrong_rows(checker, before) == 1
    assert checker.tally.wrong == {"stale version": 1}


def test_an_acknowledgement_during_the_lookup_does_not_forbid_the_older_row(
    table, ledger, checker
):
    oldest = checker.oldest(ALL)
    update(ledger, 3, 2)
    assert checker.check(answer(table, trained_versions(table)), oldest) == 0


def test_a_version_that_nobody_sent_is_wrong(table, checker):
    versions = trained_versions(table)
    versions[3] = 2
    assert wrong_rows(checker, answer(table, versions)) == 1
    assert checker.tally.wrong == {"version that was not sent": 1}


def test_a_torn_row_is_wrong(table, ledger, checker):
    versions = trained_versions(table)
    ledger.begun[3] = 2
    torn = answer(table, versions)
    versions[3] = 2
    torn.rows[3, 2:] = answer(table, versions).rows[3, 2:]
    assert wrong_rows(checker, torn) == 1
    assert checker.tally.wrong == {"not a row of this key": 1}


def test_one_bit_is_enough_to_be_wrong(table, checker):
    given = answer(table, trained_versions(table))
    given.rows.view(np.uint32)[6, 3] ^= 1
    assert wrong_rows(checker, given) == 1


def test_the_row_of_another_key_is_wrong(table, checker):
    given = answer(table, trained_versions(table))
    given.rows[1] = given.rows[2]
    assert wrong_rows(checker, given) == 1
    assert checker.tally.wrong == {"not a row of this key": 1}


def test_a_default_row_of_a_known_key_is_wrong(table, checker):
    versions = trained_versions(table)
    versions[0] = 0
    assert wrong_rows(checker, answer(table, versions)) == 1
    assert checker.tally.wrong == {"default row of a known key": 1}


def test_zeros_instead_of_the_default_row_are_wrong(table, checker):
    given = answer(table, trained_versions(table))
    given.rows[9] = 0.0
    assert wrong_rows(checker, given) == 1


@pytest.mark.parametrize("position", [0, 9])
def test_a_wrong_found_is_wrong(table, checker, position):
    given = answer(table, trained_versions(table))
    given.found[position] ^= True
    assert wrong_rows(checker, given) == 1
    assert checker.tally.wrong == {"found is wrong": 1}


def test_an_unknown_key_becomes_known(table, ledger, checker):
    versions = trained_versions(table)
    update(ledger, 9, 1)
    still_unknown = answer(table, versions)
    versions[9] = 1
    assert wrong_rows(checker, answer(table, versions)) == 0
    assert wrong_rows(checker, still_unknown) == 1
    assert checker.tally.wrong == {"default row of a known key": 1}


def test_answers_of_any_shape_are_flattened(table, checker):
    given = answer(table, trained_versions(table))
    shaped = Answer.of(
        ALL.reshape(5, 2), given.rows.reshape(5, 2, 4), given.found.reshape(5, 2)
    )
    assert checker.check(shaped, checker.oldest(ALL.reshape(5, 2))) == 0
    assert checker.tally.rows == 10


def test_tallies_add_up_and_keep_few_examples():
    total = Tally()
    for _ in range(3):
        tally = Tally(rows=4, defaults=1, early=2, examples=["a", "b"])
        tally.wrong["stale version"] = 2
        total.add(tally)
    assert (total.rows, total.defaults, total.early) == (12, 3, 6)
    assert total.wrong_rows == 6
    assert total.examples == ["a", "b", "a", "b", "a"]
