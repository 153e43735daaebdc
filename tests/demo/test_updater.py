from __future__ import annotations

import numpy as np
import pytest

from hps_numba.demo import DemoOptions
from hps_numba.demo.updater import ROUNDS, plan_updates
from hps_numba.demo.workload import build_workload


@pytest.fixture(scope="module")
def workload():
    return build_workload(DemoOptions(batch=512, requests=8))


def versions_in_order(plan, table):
    """Return, per position, the versions that a plan sends to it, in order."""
    sent: dict[int, list[int]] = {}
    for batch in plan:
        if batch.table is table:
            for position, version in zip(batch.positions, batch.versions, strict=True):
                sent.setdefault(int(position), []).append(int(version))
    return sent


def test_the_share_of_the_rows_is_updated_in_every_round(workload):
    plan = plan_updates(workload, 0.05, 1)
    for table in workload.tables:
        sent = versions_in_order(plan, table)
        n_used = len(np.unique(table.positions))
        assert len(sent) == round(0.05 * n_used)
        assert all(len(versions) == ROUNDS for versions in sent.values())


def test_versions_of_a_row_rise_by_one_from_what_is_stored(workload):
    plan = plan_updates(workload, 0.2, 1)
    for table in workload.tables:
        for position, versions in versions_in_order(plan, table).items():
            first = 2 if table.trained[position] else 1
            assert versions == list(range(first, first + ROUNDS))


def test_rows_that_the_model_was_not_trained_on_are_updated_too(workload):
    deep = workload.tables[1]
    sent = versions_in_order(plan_updates(workload, 0.2, 1), deep)
    assert any(not deep.trained[position] for position in sent)


def test_a_plan_depends_on_the_seed_alone(workload):
    def positions(seed):
        plan = plan_updates(workload, 0.05, seed)
        return [batch.positions.tolist() for batch in plan]

    assert positions(1) == positions(1)
    assert positions(1) != positions(2)


def test_no_share_is_no_plan(workload):
    assert plan_updates(workload, 0.0, 1) == []


def test_every_row_can_be_updated(workload):
    plan = plan_updates(workload, 1.0, 1)
    for table in workload.tables:
        used = np.unique(table.positions).tolist()
        assert sorted(versions_in_order(plan, table)) == used
