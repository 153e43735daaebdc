"""The command line, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hps_numba._version import __version__
from hps_numba.cli import app
from hps_numba.demo import DemoOptions
from hps_numba.errors import ModelFileError
from hps_numba.runtime.hps import HPS
from hps_numba.tiers.model_files import write_model_directory

START = "from hps_numba.cli import main; main()"
ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # how Linux tells that the other end was closed
        return b""


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


WIDE_KEYS = [-1, 0, 2**63 - 1]
WIDE_ROWS = np.float32([[1.5], [np.nan], [-np.inf]])
DEEP_ROWS = np.arange(1000, dtype=np.float32).reshape(100, 10)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A deployment of two tables to host memory, which starts empty, over RocksDB."""
    write_model_directory(tmp_path / "wide", WIDE_KEYS, WIDE_ROWS)
    write_model_directory(tmp_path / "deep", range(100), DEEP_ROWS)
    model = {
        "model": "wdl",
        "sparse_files": [str(tmp_path / "wide"), str(tmp_path / "deep")],
        "embedding_table_names": ["wide", "deep"],
        "embedding_vecsize_per_table": [1, 10],
        "maxnum_catfeature_query_per_table_per_sample": [1, 1],
        "default_value_for_each_table": [0.0, -0.5],
        "max_batch_size": 1,
        "deployed_device_list": [0],
        "gpucache": False,
    }
    databases = {
        "volatile_db": {
            "type": "parallel_hash_map",
            "num_partitions": 2,
            "initialize_after_startup": False,
            "cache_missed_embeddings": True,
        },
        "persistent_db": {"type": "rocks_db", "path": str(tmp_path / "rocksdb")},
    }
    path = tmp_path / "ps.json"
    path.write_text(
        json.dumps({"supportlonglong": True, **databases, "models": [model]})
    )
    return path


def test_deploy_loads_the_files_once_and_then_resumes(config: Path) -> None:
    states = []
    for force in ([], [], ["--force"]):
        result = run("deploy", config, "--json", *force)
        assert result.exit_code == 0, result.output
        tables = json.loads(result.stdout)
        states.append([(each["table"], each["state"]) for each in tables])
        disk = [tier for each in tables for tier in each["tiers"] if tier["rows"]]
        assert [(tier["tier"], tier["rows"]) for tier in disk] == [
            ("rocksdb", 3),
            ("rocksdb", 100),
        ]
    loaded = [("wide", "loaded"), ("deep", "loaded")]
    assert states == [loaded, [("wide", "resumed"), ("deep", "resumed")], loaded]


def test_deploy_loads_only_the_table_whose_files_changed(
    config: Path, tmp_path: Path
) -> None:
    run("deploy", config)
    write_model_directory(tmp_path / "deep", range(100), -DEEP_ROWS)
    tables = json.loads(run("deploy", config, "--json").stdout)
    assert [each["state"] for each in tables] == ["resumed", "loaded"]
    printed = json.loads(run("lookup", config, "wdl", "deep", 7, "--json").stdout)
    assert printed["rows"][0]["row"] == (-DEEP_ROWS[7]).tolist()


def test_updates_stay_until_a_forced_deployment(config: Path) -> None:
    def shown() -> object:
        return json.loads(run("lookup", config, "wdl", "wide", -1, "--json").stdout)

    with HPS.from_json(config) as server:
        server.update("wdl", "wide", [-1], [[64.0]])
    run("deploy", config)
    assert shown()["rows"] == [{"key": -1, "tier": "rocksdb", "row": [64.0]}]
    run("deploy", config, "--force")
    assert shown()["rows"] == [{"key": -1, "tier": "rocksdb", "row": [1.5]}]


def test_a_database_of_another_process_is_left_alone(
    config: Path, tmp_path: Path
) -> None:
    with HPS.from_json(config):
        result = run_process("deploy", config, "--force", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: rocksdb: ")
    assert "Traceback" not in result.stderr


def test_progress_is_drawn_in_a_terminal_beside_clean_output(config: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-c", START, "deploy", str(config), "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(stderr)
        drawn = b"".join(iter(lambda: read_terminal(terminal), b""))
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0
    assert [each["state"] for each in json.loads(printed)] == ["loaded", "loaded"]
    assert b"wdl/deep check" in drawn
    assert b"100/100" in drawn


def test_deploy_prints_a_line_per_table_and_tier(config: Path) -> None:
    lines = [line.split() for line in run("deploy", config).stdout.splitlines()]
    assert lines[0] == ["table", "state", "seconds", "tier", "rows", "bytes"]
    assert [(line[0], line[1], line[3], line[4]) for line in lines[1:]] == [
        ("wdl/wide", "loaded", "host", "0"),
        ("wdl/wide", "loaded", "rocksdb", "3"),
        ("wdl/deep", "loaded", "host", "0"),
        ("wdl/deep", "loaded", "rocksdb", "100"),
    ]


def test_an_estimate_names_the_bytes_and_stores_nothing(
    config: Path, tmp_path: Path
) -> None:
    expected = json.loads(run("deploy", config, "--estimate", "--json").stdout)
    assert [(each["table"], each["rows"]) for each in expected["tables"]] == [
        ("wide", 3),
        ("deep", 100),
    ]
    host_bytes = [each["host_bytes"] for each in expected["tables"]]
    assert host_bytes[1] >= 100 * (10 * 4 + 8)
    assert expected["host_bytes"] == sum(host_bytes)
    lines = run("deploy", config, "--estimate").stdout.splitlines()
    assert lines[2].split()[:3] == ["wdl/deep", "100", f"{host_bytes[1]:,}"]
    assert lines[3].split()[:3] == ["all", "103", f"{sum(host_bytes):,}"]
    assert not (tmp_path / "rocksdb").exists()


def test_an_estimate_names_the_bytes_of_each_gpu(config: Path) -> None:
    content = json.loads(config.read_text())
    content["models"][0] |= {"gpucache": True, "deployed_device_list": [0, 3]}
    config.write_text(json.dumps(content))
    told = json.loads(run("deploy", config, "--estimate", "--json").stdout)
    parts = [each["gpu_bytes"] for each in told["tables"]]
    assert told["gpu_bytes"] == {"0": sum(parts), "3": sum(parts)}
    lines = run("deploy", config, "--estimate").stdout.splitlines()
    assert lines[0].endswith("bytes a GPU  rows in GPU")
    assert lines[2].split()[5:] == [f"{parts[1]:,}", "28"]
    buffers = told["gpu_buffer_bytes"]["0"]
    assert buffers > 0
    assert lines[4:] == [
        f"GPU 0: {sum(parts):,} bytes for caches, {buffers:,} for buffers",
        f"GPU 3: {sum(parts):,} bytes for caches, {buffers:,} for buffers",
        f"pinned host memory: {told['pinned_bytes']:,} bytes for buffers",
    ]


def test_a_refused_file_stops_the_deployment_and_is_named(
    config: Path, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "deep" / "emb_vector", 3999)
    result = run("deploy", config)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "hps_et.wdl.deep" in result.stderr
    assert "emb_vector 3999" in result.stderr


def test_lookup_prints_rows_and_the_tier_of_each(config: Path) -> None:
    result = run("lookup", config, "wdl", "deep", 5, 99, 100, -1)
    assert result.exit_code == 0, result.output
    assert [re.sub(" +", " ", line).strip() for line in result.stdout.splitlines()] == [
        "key tier row",
        "5 rocksdb 50 51 52 53 54 55 56 57 ... 2 more",
        "99 rocksdb 990 991 992 993 994 995 996 997 ... 2 more",
        f"100 default {'-0.5 ' * 8}... 2 more",
        f"-1 default {'-0.5 ' * 8}... 2 more",
    ]


def test_lookup_prints_every_value_as_standard_json(config: Path) -> None:
    result = run("lookup", config, "wdl", "0", "--json", *WIDE_KEYS)
    assert json.loads(result.stdout) == {
        "model": "wdl",
        "table": "0",
        "rows": [
            {"key": -1, "tier": "rocksdb", "row": [1.5]},
            {"key": 0, "tier": "rocksdb", "row": ["NaN"]},
            {"key": 2**63 - 1, "tier": "rocksdb", "row": ["-Infinity"]},
        ],
    }


@pytest.mark.parametrize("arguments", [["wdk", "deep", "1"], ["wdl", "2", "1"]])
def test_lookup_of_what_is_not_served_names_what_is(
    config: Path, arguments: list[str]
) -> None:
    result = run("lookup", config, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: model 'wd")
    assert ("served are wdl" if arguments[0] == "wdk" else "1: deep") in result.stderr


@pytest.mark.parametrize("key", ["x", "1.5", str(2**63), "--jsn"])
def test_lookup_of_what_is_no_key_is_exit_code_2(config: Path, key: str) -> None:
    result = run("lookup", config, "wdl", "deep", "1", key)
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("contents", [None, "{", '{"supportlonglong": true}'])
def test_a_configuration_that_cannot_be_read_is_exit_code_1(
    tmp_path: Path, contents: str | None
) -> None:
    if contents is not None:
        (tmp_path / "ps.json").write_text(contents)
    result = run("deploy", tmp_path / "ps.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("exit_code", [0, 1])
def test_demo_passes_its_options_and_exit_code_on(
    monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    given = []

    def stand_in(options: DemoOptions) -> int:
        given.append(options)
        return exit_code

    monkeypatch.setattr("hps_numba.demo.run", stand_in)
    assert run("demo").exit_code == exit_code
    options = "--output o --requests 3 --batch 4 --trace t --update-share 0.5"
    run("demo", *options.split(), *["--host-share", "0.25", "--seed", "9", "--no-gpu"])
    assert given == [
        DemoOptions(),
        DemoOptions(Path("o"), 3, 4, Path("t"), 0.5, 0.25, 9, gpu=False),
    ]


def test_demo_options_out_of_range_are_refused(tmp_path: Path) -> None:
    assert run("demo", "--output", tmp_path, "--batch", 0).exit_code == 2
    result = run("demo", "--output", tmp_path, "--host-share", 0)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "host_share=0.0" in result.stderr


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
