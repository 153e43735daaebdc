"""What a GPU run needs and starts: examples, packages, the sanitizer, the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench import records
from bench.gpu import checks, sanitizer
from bench.gpu.device import Device
from bench.gpu.runs import PARTS
from tests.bench.gpu_runs import run_of

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("cubins")]


def test_an_example_that_lacks_a_package_is_named(
    device: Device, tmp_path: Path
) -> None:
    run = run_of(device, tmp_path)
    example = tmp_path / "gpu_example.py"
    example.write_text("print(1)\nprint(2)\n")
    (line,) = checks.example(run, example)
    assert (line.variant, line.median) == ("gpu_example.py", 2)
    example.write_text("import surely_not_installed\n")
    assert list(checks.example(run, example)) == []
    assert "surely_not_installed" in run.not_run["gpu_example.py"]
    example.write_text("import sys\nsys.exit('this example needs Such: pip it')\n")
    assert list(checks.example(run, example)) == []
    assert run.not_run["gpu_example.py"] == "this example needs Such: pip it"
    example.write_text("import bench.gpu\nassert False, 'it is wrong'\n")
    with pytest.raises(AssertionError, match="it is wrong"):
        list(checks.example(run, example))


def test_an_example_that_hangs_is_named_and_the_others_run(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "EXAMPLE_S", 1.0)
    hanging, good = tmp_path / "gpu_a.py", tmp_path / "gpu_b.py"
    hanging.write_text("print('this far', flush=True)\nimport threading\n")
    with hanging.open("a") as file:
        file.write("threading.Event().wait()\n")
    good.write_text("print(1)\n")
    run, lines = run_of(device, tmp_path), []
    with pytest.raises(AssertionError, match=r"gpu_a.py did not end in 1 s\nthis far"):
        lines.extend(checks.examples(run, [hanging, good]))
    assert not run.not_run


def test_examples_end_with_the_time_of_the_checks(
    device: Device, tmp_path: Path
) -> None:
    hanging = tmp_path / "gpu_a.py"
    hanging.write_text("import threading\nthreading.Event().wait()\n")
    run = run_of(device, tmp_path, check_seconds=0.5)
    assert list(checks.examples(run, [hanging])) == []
    assert run.not_run == {"gpu_a.py": "no time left after 1 s"}
    run = run_of(device, tmp_path, check_seconds=0.0)
    assert list(checks.examples(run, [hanging])) == []
    assert run.not_run == {"gpu_a.py": "no time left"}


def test_what_takes_the_time_that_is_left_comes_last() -> None:
    assert list(PARTS)[-1] == "sanitizer"


def test_only_numpy_and_the_kernels_packages_are_needed(tmp_path: Path) -> None:
    program = f"""
import os
import subprocess
import sys
for name in ("pydantic", "typer", "redis", "rocksdict", "rich", "matplotlib"):
    sys.modules[name] = None
from tests.support.fakegpu import install, shim
if not shim.real_driver():
    install()
from bench.gpu.__main__ import main
status = main(["--smoke", "--only", "served", "--out", {str(tmp_path)!r}])
import bench.gpu.checks, tests.gpu.stress, tests.gpu.scale, tests.gpu.launches
sys.stdout.flush()
import os
os._exit(status)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: served: ModuleNotFoundError: " in done.stdout
    assert "pydantic" in records.read(tmp_path / "run.jsonl")[0].absent["served"]


def test_the_sanitizer_is_believed(device: Device, tmp_path: Path) -> None:
    run = run_of(device, tmp_path)
    good = "...\nfailed: none\n===== ERROR SUMMARY: 0 errors\n"
    (line,) = sanitizer.judged(run, good, 0)
    assert (line.median, line.unit) == (0, "errors")
    for output, status in (
        ("ERROR SUMMARY: 2 errors", 9),
        (good, 1),
        ("ERROR SUMMARY: 0 errors", 0),  # nothing was run
    ):
        with pytest.raises(AssertionError, match=r"2 errors|the run failed"):
            list(sanitizer.judged(run, output, status))
    assert not run.not_run
    assert list(sanitizer.judged(run, "no debugger here", 255)) == []
    assert "no debugger here" in run.not_run["compute-sanitizer memcheck"]
    refused = "========= Device not supported\n========= ERROR SUMMARY: 1 error\n"
    assert list(sanitizer.judged(run, refused, 9)) == []
    assert "not supported" in run.not_run["compute-sanitizer memcheck"]


def test_the_sanitizer_watches_a_tiny_run(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(device, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(sanitizer.memcheck(run)) == []
    assert run.not_run["compute-sanitizer memcheck"].endswith("is not on PATH")
    tool = tmp_path / "compute-sanitizer"
    said = 'echo "$@" >"$0.said"'
    ends = 'echo "failed: none"; echo "ERROR SUMMARY: 0 errors"'
    tool.write_text(f"#!/bin/sh\n{said}; {ends}\n")
    tool.chmod(0o755)
    assert [line.median for line in sanitizer.memcheck(run)] == [0]
    said = (tmp_path / "compute-sanitizer.said").read_text()
    assert said.startswith("--tool memcheck --error-exitcode 9 --report-api-errors no ")
    assert said.endswith("-m bench.gpu --smoke --only centre --alone --device 0\n")


def test_checks_are_found_beside_another_package_of_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModuleType("tests")
    other.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "tests", other)
    for name in ("tests.gpu", "tests.gpu.contents"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert hasattr(checks._tests("contents"), "contents_of")
