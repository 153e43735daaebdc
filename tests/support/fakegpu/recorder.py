"""In the child process: writes down what comes of each test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest


class Recorder:
    """In the child: writes down each report, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Write the report of a test's phase as pytest has made it."""
        report = yield
        hook = item.config.hook
        data = hook.pytest_report_to_serializable(config=item.config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data) + "\n")
        return report  # type: ignore[return-value]
