"""The command line, in this process and in one of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hps_numba._version import __version__
from hps_numba.cli import app
from hps_numba.errors import ModelFileError
from hps_numba.tiers.model_files import write_model_directory

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from hps_numba.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = np.float32([[1, 2], [0, 0], [np.inf, 5]])
    write_model_directory(tmp_path / "wide", [-4, 1_000_000, -4], rows)
    return tmp_path / "wide"


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"hps-numba {__version__}\n"


def test_inspect_prints_what_the_files_hold(table: Path) -> None:
    result = run("inspect", table)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        str(table),
        "  rows        3",
        "  dim         2",
        "  bytes       48",
        "  keys        -4 to 1,000,000 (int64)",
        "  duplicates  1",
        "  values      0 to 5, mean 1.6, std 1.85472",
        "  non-finite  1 values",
        "  zero rows   1",
    ]


def test_inspect_prints_json_for_a_script(table: Path) -> None:
    result = run("inspect", table, "--json")
    printed = json.loads(result.stdout)
    assert result.stderr == ""
    assert printed.pop("std") == pytest.approx(3.44**0.5)
    assert printed == {
        "path": str(table),
        "n_rows": 3,
        "dim": 2,
        "total_bytes": 48,
        "key_dtype": "int64",
        "min_key": -4,
        "max_key": 1_000_000,
        "n_unique": 2,
        "n_duplicates": 1,
        "min_value": 0.0,
        "max_value": 5.0,
        "mean": pytest.approx(1.6),
        "n_non_finite": 1,
        "n_zero_rows": 1,
    }


def test_inspect_reads_four_byte_keys_if_the_dim_says_so(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(np.uint32([3, 4_000_000_000]).tobytes())
    (tmp_path / "emb_vector").write_bytes(bytes(8))
    lines = run("inspect", tmp_path, "--dim", 1).stdout.splitlines()
    assert lines[4] == "  keys        3 to 4,000,000,000 (uint32)"


def test_inspect_describes_an_empty_table(tmp_path: Path) -> None:
    write_model_directory(tmp_path, [], np.empty((0, 4), np.float32))
    lines = run("inspect", tmp_path, "--dim", 4).stdout.splitlines()
    assert lines[4] == "  keys        none (int64)"
    assert lines[6] == "  values      none that are finite"


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "gone")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"error: model directory {tmp_path / 'gone'}: does not exist; check"
        " sparse_files\n"
    )


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "gone")
    assert result.exit_code == 1
    assert isinstance(result.exception, ModelFileError)


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["inspekt", "."], ["inspect", ".", "--dim", "0"], ["-x"]]
)
def test_arguments_that_cannot_be_used_are_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_the_example_of_the_documentation_is_what_inspect_prints(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "model-files.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    shown = re.findall(r"```\n\$ hps-numba (inspect .*?)\n(.*?)```", page, re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    result = run_process(*shown[0].split(), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, shown[1])


def test_help_and_version_load_neither_numba_nor_rocksdb(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from hps_numba.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'numba', 'rocksdict', 'numpy', 'pydantic', 'pandas'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
