"""Every Python block of the documentation runs; every link and command exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hps_numba.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
# An excerpt of an example runs there.
EXCERPT = re.compile(
    r"^<!-- from (\S+) -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL
)
BLOCK = re.compile(r"(?<! -->\n)^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ON_A_DEVICE = ("docs/gpu.md",)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMAND = re.compile(r"^\$ (hps-numba|make) ([a-z-]+)", re.MULTILINE)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def marked(page: Path) -> Any:
    name = page_id(page)
    marks = [pytest.mark.device] if name in ON_A_DEVICE else []
    return pytest.param(page, id=name, marks=marks)


@pytest.mark.parametrize(
    "page", [marked(p) for p in PAGES if BLOCK.search(p.read_text())]
)
def test_python_blocks_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_python_blocks_but_excerpts_of_examples_are_left_out(page: Path) -> None:
    text = page.read_text()
    n_excerpts = len(EXCERPT.findall(text))
    assert len(BLOCK.findall(text)) + n_excerpts == text.count("\n```python\n")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_excerpts_are_what_the_examples_have(page: Path) -> None:
    for source, excerpt in EXCERPT.findall(page.read_text()):
        example = (ROOT / source).read_text()
        indented = [
            "".join(" " * n + line for line in excerpt.splitlines(keepends=True))
            for n in range(0, 20, 4)
        ]
        assert any(one in example for one in indented), excerpt


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [
        link
        for link in LINK.findall(page.read_text())
        if not (page.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    for program, name in COMMAND.findall(page.read_text()):
        if program == "make":
            assert name in targets, f"make {name}"
        else:
            assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
