from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hps_numba.runtime.hps import HPS
from tests.runtime.deployments import ITEMS, USERS, model, server_config


@pytest.fixture(scope="session")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16, thread_name_prefix="test") as executor:
        yield executor


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Write a line to the terminal, past the capturing of output."""
    plugins = request.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    capture = plugins.get_plugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)

    return write


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HPS]:
    config = server_config(tmp_path, [model(tmp_path, [ITEMS, USERS])])
    with HPS(config) as made:
        yield made
