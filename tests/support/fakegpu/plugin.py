"""Runs tests that need a device in a process that has the stand-in.

A test marked ``device`` runs as it is on a machine with a driver. On others, all such
tests of a file run in one child process (``python -m tests.support.fakegpu``), and what
it reports of each is reported here as the test's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakegpu import shim

_REPORTS = pytest.StashKey[dict[Path, "Reports"]]()
Reports = dict[str, list[dict[str, Any]]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> bool | None:
    """Report what the child said of a test that needs a device."""
    if not _needs_child(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # The test before this one may have left its file's fixtures to this one's care.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def _needs_child(item: pytest.Item) -> bool:
    marked = item.get_closest_marker("device") is not None
    return marked and not shim.loaded() and not shim.real_driver()


def _reports_of(item: pytest.Item) -> list[pytest.TestReport]:
    files = item.config.stash.setdefault(_REPORTS, {})
    if item.path not in files:
        chosen = [
            one.nodeid
            for one in item.session.items
            if one.path == item.path and _needs_child(one)
        ]
        files[item.path] = _run_child(item.config, chosen)
    found = files[item.path].get(item.nodeid, [])
    # A test that took its process with it has no report of its end.
    if not any(data["when"] == "teardown" for data in found):
        found = [*found, _lost(item, files[item.path])]
    hook = item.config.hook
    return [
        hook.pytest_report_from_serializable(config=item.config, data=data)
        for data in found
    ]


def _run_child(config: pytest.Config, chosen: list[str]) -> Reports:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports.jsonl"
        child = subprocess.run(
            [sys.executable, "-m", "tests.support.fakegpu", str(path), *chosen],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=config.rootpath,
            check=False,
        )
        lines = path.read_text().splitlines() if path.exists() else []
    reports: Reports = defaultdict(list)
    for data in map(json.loads, lines):
        reports[data["nodeid"]].append(data)
    reports[""] = [{"output": child.stdout, "status": child.returncode}]
    return dict(reports)


def _lost(item: pytest.Item, reports: Reports) -> dict[str, Any]:
    """Return the report of a test that the child never came to."""
    child = reports[""][0]
    report = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the child ended with {child['status']}:\n{child['output']}",
        when="call",
    )
    data = item.config.hook.pytest_report_to_serializable(
        config=item.config, report=report
    )
    assert isinstance(data, dict)
    return data
