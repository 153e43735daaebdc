from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hps_numba import HPS
from hps_numba.demo import DemoOptions
from hps_numba.demo.checker import VersionLedger
from hps_numba.demo.deployment import write_deployment
from hps_numba.demo.updater import ROUNDS, UpdateBatch, Updater, plan_updates
from hps_numba.demo.workload import build_workload
from hps_numba.errors import UnknownTableError


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


@pytest.fixture
def server(workload, tmp_path):
    deployed = write_deployment(workload, tmp_path, host_share=0.5)
    with HPS.from_json(deployed.config) as server:
        yield server


def make_updater(server, workload, plan):
    ledgers = {table.name: VersionLedger(table) for table in workload.tables}
    return Updater(server, workload, ledgers=ledgers, plan=plan), ledgers


def test_a_plan_is_sent_acknowledged_and_checked(server, workload):
    plan = plan_updates(workload, 0.1, 1)
    updater, ledgers = make_updater(server, workload, plan)
    with updater:
        updater.advance(1.0)
    n_rows = sum(len(batch.positions) for batch in plan)
    assert [record.n_rows for record in updater.records] == [
        len(batch.positions) for batch in plan
    ]
    assert (updater.tally.rows, updater.tally.wrong_rows) == (n_rows, 0)
    for table in workload.tables:
        ledger = ledgers[table.name]
        assert (ledger.begun == ledger.acknowledged).all()
        for position, versions in versions_in_order(plan, table).items():
            assert ledger.acknowledged[position] == versions[-1]


def test_an_update_that_fails_ends_the_replay_with_its_error(server, workload):
    deep = workload.tables[1]
    absent = replace(deep, name="absent")
    batch = UpdateBatch(absent, np.array([0], np.int32), np.array([2], np.int32))
    updater = Updater(
        server, workload, ledgers={"absent": VersionLedger(absent)}, plan=[batch]
    )
    with pytest.raises(UnknownTableError, match="absent"), updater:
        updater.advance(1.0)


def test_a_replay_that_fails_stops_the_updates(server, workload):
    updater, _ = make_updater(server, workload, plan_updates(workload, 0.1, 1))
    with pytest.raises(ZeroDivisionError), updater:
        raise ZeroDivisionError
    assert len(updater.records) <= 1
