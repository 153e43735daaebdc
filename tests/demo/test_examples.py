"""The examples run as they are, and print what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

EXPECTED = {
    "quickstart.py": [
        "shape: (2, 2, 16)",
        "found: [[True, True], [True, False]]",
        "as trained: True",
        "updated: [1. 1. 1.]",
        "after a restart: [1. 1. 1.]",
    ],
    "python_config.py": [
        "flat keys: (2048, 16) float32",
        "shaped keys: (1024, 2, 32)",
        "both tables: {'sparse_embedding1': (1024, 2, 16), "
        "'sparse_embedding2': (1024, 2, 32)}",
        "same rows: True",
    ],
    "many_threads.py": [
        "wrong rows: 0",
        "every reader read: True",
        "updated rows: 40000",
    ],
    "migrate_from_hps.py": ["OUTPUT0: (4180,)", "right rows: True"],
}


def test_every_example_is_run():
    assert sorted(EXPECTED) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in EXPECTED[name] if line not in printed] == []
