"""Options of ``pytest bench``."""

from __future__ import annotations

import pytest

from bench.defaults import FULL, SMOKE, Sizes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="Tiny tables and batches.")


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> Sizes:
    return SMOKE if pytestconfig.getoption("--smoke") else FULL


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give benchmarks their axes: ``dim`` and ``batch``."""
    axes = SMOKE if metafunc.config.getoption("--smoke") else FULL
    if "dim" in metafunc.fixturenames:
        dims = axes.micro_dims
        metafunc.parametrize("dim", dims, ids="dim{}".format, scope="module")
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", axes.micro_batches, ids="batch{}".format)
