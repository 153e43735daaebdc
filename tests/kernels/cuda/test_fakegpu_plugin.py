"""Tests that need a device run in a child, and are reported as if they had not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakegpu import shim

TESTS = """
import pytest

pytestmark = pytest.mark.device


def test_that_passes():
    pass


def test_that_fails():
    assert 6 * 7 == 41, "planted"


@pytest.fixture
def broken():
    raise OSError("planted fixture")


def test_whose_fixture_fails(broken):
    pass


def test_that_kills_its_process():
    import os

    os._exit(3)


def test_behind_the_killer():
    pass
"""

# The file's fixture is still set up when its last test goes to the child.
ENDS_IN_THE_CHILD = """
import pytest


@pytest.fixture(scope="module")
def resource():
    yield
    print("resource given back")


def test_here(resource):
    pass


@pytest.mark.device
def test_there():
    pass
"""
STAYS_HERE = """
def test_in_the_next_file():
    pass
"""


def run_pytest(folder: Path, **files: str) -> Any:
    """Run test files of these names, and return how pytest ended."""
    if shim.real_driver():
        pytest.skip("tests run in this process where there is a driver")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = device: planted\n")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"),
            *("-p", "tests.support.fakegpu.plugin", *(f"{name}.py" for name in files)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )


def test_what_the_child_says_is_reported_as_the_tests_own(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, test_planted=TESTS)
    out = done.stdout
    assert done.returncode == 1, out + done.stderr
    assert "PASSED" in out
    assert "3 failed, 1 passed, 1 error" in out, out
    assert "AssertionError: planted" in out
    assert "planted fixture" in out
    # Of the killer and of the one behind it, above and in the summary.
    assert out.count("the child ended with 3") == 4


def test_a_file_may_end_with_a_test_for_the_child(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, test_first=ENDS_IN_THE_CHILD, test_second=STAYS_HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
